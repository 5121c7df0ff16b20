"""Pairs of an image encoder and a text decoder against transformers' VisionEncoderDecoderModel."""

import dataclasses

import jax
import numpy as np
import pytest
from parity import check_head, shuffled

import fmjax
from fmjax.config import config_to_json, parse_config
from fmjax.models import (
    bart,
    beit,
    bert,
    efficientnet_lite,
    encoder_decoder,
    gpt2,
    resnet,
    roberta,
    swin,
    trocr,
    vision_encoder_decoder,
    xglm,
)

TINY = vision_encoder_decoder.VARIANTS["tiny"]
VIT = TINY.encoder
SWIN = dataclasses.replace(swin.VARIANTS["tiny"], drop_path_rate=0.0)
BERT = bert.Config(
    vocab_size=51, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=20, is_decoder=True, add_cross_attention=True,
)  # fmt: skip
ROBERTA = roberta.Config(
    vocab_size=51, hidden_size=30, num_hidden_layers=1, num_attention_heads=3, intermediate_size=44,
    max_position_embeddings=20, is_decoder=True, add_cross_attention=True,
)  # fmt: skip
GPT2 = gpt2.Config(
    vocab_size=51, n_positions=20, n_embd=24, n_layer=2, n_head=3, add_cross_attention=True
)
BART = bart.Config(
    vocab_size=51, max_position_embeddings=20, d_model=24, encoder_layers=2, decoder_layers=2,
    decoder_ffn_dim=26, decoder_attention_heads=3, encoder_ffn_dim=26, encoder_attention_heads=3,
)  # fmt: skip
XGLM = xglm.Config(
    vocab_size=51, max_position_embeddings=20, d_model=24, ffn_dim=26, num_layers=2,
    attention_heads=3, add_cross_attention=True,
)  # fmt: skip
TROCR = dataclasses.replace(trocr.VARIANTS["tiny"], vocab_size=51, eos_token_id=3)


def pictures(config, rows=2, seed=0):
    """float64 [B, X, Y, C], of the encoder's size."""
    shape = vision_encoder_decoder.inputs(config, "model")["pixel_values"].shape[1:]
    return np.random.default_rng(seed).normal(size=(rows, *shape))


def pair_inputs(config, length=6):
    mask = np.ones((2, length), np.int64)
    mask[1, length - 2 :] = 0
    ids = np.random.default_rng(1).integers(3, config.vocab_size, mask.shape)
    return {
        "pixel_values": pictures(config),
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
    }


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        (VIT, GPT2),
        pytest.param(VIT, BERT, marks=pytest.mark.slow),
        pytest.param(beit.VARIANTS["tiny"], ROBERTA, marks=pytest.mark.slow),
        pytest.param(SWIN, BERT, marks=pytest.mark.slow),
        (VIT, TROCR),
    ],
    ids=["vit-gpt2", "vit-bert", "beit-roberta", "swin-bert", "vit-trocr"],
)
def test_pairs_equal_pytorch(encoder, decoder, tmp_path):
    """Of one width, and of two, with a projection between."""
    config = vision_encoder_decoder.Config(
        encoder, decoder, pad_token_id=0, decoder_start_token_id=1
    )
    inputs = pair_inputs(config)
    if decoder is ROBERTA:  # its positions count the tokens that are no padding
        mask = inputs["decoder_attention_mask"]
        inputs["decoder_input_ids"] = np.where(mask == 1, inputs["decoder_input_ids"], 1)
    check_head(vision_encoder_decoder, config, "seq2seq_lm", tmp_path, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [resnet.VARIANTS["tiny"], efficientnet_lite.VARIANTS["tiny"]])
def test_maps_are_read_row_by_row(encoder, tmp_path):
    """A convolutional encoder: its map is what the decoder sees, and the files come back."""
    config = vision_encoder_decoder.Config(encoder, GPT2)
    model, variables = fmjax.create(
        "vision-encoder-decoder", config, head="seq2seq_lm", rng=jax.random.key(0)
    )
    variables |= {"params": shuffled(variables["params"], spread=0.02)}
    pixels, ids = pictures(config).astype(np.float32), np.array([[3, 4, 5], [6, 7, 8]])
    alone = type(model).make_part(model, encoder, "model", parent=None)
    own = {name: part["encoder"] for name, part in variables.items() if "encoder" in part}
    features = alone.apply(own, pixels).last_hidden_state
    states = features.reshape(2, -1, features.shape[-1])
    out = model.apply(variables, pixels, decoder_input_ids=ids)
    np.testing.assert_allclose(out.encoder_last_hidden_state, states, atol=1e-5)
    again = model.apply(variables, encoder_outputs=states, decoder_input_ids=ids)
    np.testing.assert_allclose(again.logits, out.logits, atol=1e-4)
    fmjax.save(tmp_path, model, variables)
    read_model, read = fmjax.load(tmp_path)
    assert read_model == model
    np.testing.assert_array_equal(
        read_model.apply(read, pixels, decoder_input_ids=ids).logits, out.logits
    )


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [BART, XGLM], ids=lambda d: type(d).__module__)
def test_other_decoders_in_one_pass_and_from_the_cache(decoder):
    """Pairs whose configs transformers 5 does not take: against themselves."""
    config = vision_encoder_decoder.Config(VIT, decoder)
    model, variables = fmjax.create(
        "vision-encoder-decoder", config, head="seq2seq_lm", rng=jax.random.key(0), scan=True
    )
    variables = shuffled(variables)
    pixels, ids = pictures(config).astype(np.float32), np.array([[3, 4, 5], [6, 7, 8]])
    full = model.apply(variables, pixels, decoder_input_ids=ids).logits
    states = model.apply(variables, pixels, method="encode").last_hidden_state
    first = model.apply(
        variables, encoder_outputs=states, decoder_input_ids=ids[:, :2],
        cache=model.init_cache(2, 3, states.shape[1]),
    )  # fmt: skip
    last = model.apply(variables, decoder_input_ids=ids[:, 2:], cache=first.cache)
    np.testing.assert_allclose(first.logits, full[:, :2], atol=1e-4)
    np.testing.assert_allclose(last.logits, full[:, 2:], atol=1e-4)


def test_config_goes_there_and_back():
    for config in vision_encoder_decoder.VARIANTS.values():
        data = config_to_json(config, {"model_type": "vision-encoder-decoder"})
        data["decoder"]["is_decoder"] = True
        read = parse_config(vision_encoder_decoder.Config, data, vision_encoder_decoder.FIXED)
        assert read == config


def test_bad_configs_and_inputs_are_refused():
    with pytest.raises(ValueError, match="bert reads no pixel_values") as error:
        vision_encoder_decoder.Config(bert.Config(), bert.Config())
    assert "must have add_cross_attention=True" in str(error.value)
    wrong = dataclasses.replace(TROCR, cross_attention_hidden_size=17)
    with pytest.raises(ValueError, match="hidden_size=17 must be the encoder's width, 16"):
        vision_encoder_decoder.Config(VIT, wrong)
    with pytest.raises(ValueError, match="vit reads no input_ids"):
        encoder_decoder.Config(VIT, GPT2)
    model = vision_encoder_decoder.Model(TINY, head="seq2seq_lm")
    with pytest.raises(ValueError, match="exactly one of pixel_values and encoder_outputs"):
        model.apply({}, decoder_input_ids=np.ones((1, 2), np.int32))
