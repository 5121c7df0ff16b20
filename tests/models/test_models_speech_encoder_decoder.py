"""Pairs of a speech encoder and a text decoder against transformers' SpeechEncoderDecoderModel."""

import dataclasses

import numpy as np
import pytest
import torch
from parity import check_head, torch_twin
from waves import SIZES, STABLE, waves

import fmjax
from fmjax.config import config_to_json, parse_config
from fmjax.models import bert, gpt2, hubert, speech_encoder_decoder, vit, wav2vec2

BERT = bert.Config(
    vocab_size=51, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=20, is_decoder=True, add_cross_attention=True,
)  # fmt: skip
GPT2 = gpt2.Config(
    vocab_size=51, n_positions=20, n_embd=24, n_layer=2, n_head=3, add_cross_attention=True
)
PLAIN = wav2vec2.Config(**SIZES)
SHORT = wav2vec2.Config(**SIZES | {"add_adapter": True, "num_adapter_layers": 2})


def tied(twin):
    """transformers 5 has the last hidden state before the norm; 4 and trained files, after it."""
    twin.encoder.config.tie_last_hidden_states = True


def pair_inputs(config, length=6):
    mask = np.ones((2, length), np.int64)
    mask[1, length - 2 :] = 0
    ids = np.random.default_rng(1).integers(3, 51, mask.shape)
    return waves(config.encoder) | {"decoder_input_ids": ids, "decoder_attention_mask": mask}


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        pytest.param(SHORT, GPT2, marks=pytest.mark.slow),
        pytest.param(PLAIN, BERT, marks=pytest.mark.slow),
        pytest.param(wav2vec2.Config(**SIZES | STABLE), GPT2, marks=pytest.mark.slow),
        pytest.param(
            dataclasses.replace(hubert.VARIANTS["tiny"], hidden_act="gelu"), BERT,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["shortened-gpt2", "plain-bert", "stable-gpt2", "hubert-bert"],
)  # fmt: skip
def test_pairs_equal_pytorch(encoder, decoder, tmp_path):
    """Of one width, and of two, with a projection between; the second row is padded."""
    config = speech_encoder_decoder.Config(
        encoder, decoder, pad_token_id=0, decoder_start_token_id=1
    )
    prepare = tied if encoder.do_stable_layer_norm else lambda twin: None
    check_head(
        speech_encoder_decoder, config, "seq2seq_lm", tmp_path, pair_inputs(config), prepare=prepare
    )


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_pytorch(beams, tmp_path):
    config = speech_encoder_decoder.Config(SHORT, GPT2)
    twin = torch_twin(speech_encoder_decoder, config, "seq2seq_lm", spread=0.3)
    twin.save_pretrained(tmp_path)
    inputs = waves(SHORT)
    options = {
        "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": 7, "num_beams": beams,
        "decoder_start_token_id": 1,
    }  # fmt: skip
    theirs = twin.generate(
        inputs=torch.tensor(inputs["input_values"]),
        attention_mask=torch.tensor(inputs["attention_mask"]),
        **options,
    ).numpy()
    out = fmjax.generate(*fmjax.load(tmp_path), **inputs, **options)
    for row, length in enumerate(out.lengths):
        end = min(1 + length, theirs.shape[1])
        np.testing.assert_array_equal(out.sequences[row, :end], theirs[row, :end], str(row))


def test_config_goes_there_and_back():
    for config in speech_encoder_decoder.VARIANTS.values():
        data = config_to_json(config, {"model_type": "speech-encoder-decoder"})
        data["decoder"]["is_decoder"] = True
        read = parse_config(speech_encoder_decoder.Config, data, speech_encoder_decoder.FIXED)
        assert read == config


def test_bad_configs_and_inputs_are_refused():
    with pytest.raises(ValueError, match="vit reads no input_values"):
        speech_encoder_decoder.Config(vit.Config(), GPT2)
    model = speech_encoder_decoder.Model(speech_encoder_decoder.VARIANTS["tiny"])
    with pytest.raises(ValueError, match="exactly one of input_values and encoder_outputs"):
        model.apply({}, decoder_input_ids=np.ones((1, 2), np.int32))
