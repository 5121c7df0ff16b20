"""Pairs of models against transformers' EncoderDecoderModel, from the same configs and weights."""

import dataclasses

import jax
import numpy as np
import pytest
from parity import check_head, check_seq2seq_decoding, seq2seq_inputs, shuffled

import fmjax
from fmjax.config import config_to_json, parse_config
from fmjax.models import bart, bert, encoder_decoder, gpt2, roberta, t5, xglm

BERT = bert.Config(
    vocab_size=51, hidden_size=30, num_hidden_layers=1, num_attention_heads=3, intermediate_size=44,
    max_position_embeddings=20,
)  # fmt: skip
DECODER = dataclasses.replace(BERT, num_hidden_layers=2, is_decoder=True, add_cross_attention=True)
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
ROBERTA = roberta.Config(
    vocab_size=51, hidden_size=30, num_hidden_layers=1, num_attention_heads=3, intermediate_size=44,
    max_position_embeddings=20,
)  # fmt: skip


@pytest.mark.parametrize(
    ("encoder", "decoder"), [(BERT, DECODER), (ROBERTA, GPT2)], ids=["bert-bert", "roberta-gpt2"]
)
def test_pairs_equal_pytorch(encoder, decoder, tmp_path):
    """Of one width, and of two, with a projection between."""
    config = encoder_decoder.Config(encoder, decoder, pad_token_id=0, decoder_start_token_id=1)
    inputs = seq2seq_inputs(BERT)
    if encoder is ROBERTA:  # its positions count the tokens that are no padding
        inputs["input_ids"] = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], 1)
    check_head(encoder_decoder, config, "seq2seq_lm", tmp_path, inputs)


@pytest.mark.parametrize(
    "decoder",
    [GPT2, *(pytest.param(config, marks=pytest.mark.slow) for config in (DECODER, BART, XGLM))],
    ids=lambda d: type(d).__module__,
)
def test_cached_decoding(decoder):
    model, variables = fmjax.create(
        "encoder-decoder", encoder_decoder.Config(BERT, decoder), head="seq2seq_lm",
        rng=jax.random.key(0), scan=decoder is GPT2,
    )  # fmt: skip
    check_seq2seq_decoding(model, shuffled(variables))


def test_config_goes_there_and_back():
    for config in encoder_decoder.VARIANTS.values():
        data = config_to_json(config, {"model_type": "encoder-decoder"})
        data["decoder"]["is_decoder"] = True
        assert parse_config(encoder_decoder.Config, data, encoder_decoder.FIXED) == config


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="must have add_cross_attention=True") as error:
        encoder_decoder.Config(DECODER, BERT)
    assert "is_decoder=False" in str(error.value)
    with pytest.raises(ValueError, match="t5 has no head causal_lm") as error:
        encoder_decoder.Config(t5.Config(), t5.Config())
    assert "t5 has a decoder of its own" in str(error.value)
    with pytest.raises(ValueError, match="must be an object with model_type"):
        parse_config(encoder_decoder.Config, {"encoder": {}}, encoder_decoder.FIXED)
    with pytest.raises(ValueError, match="'nothing' is not among the families"):
        parse_config(
            encoder_decoder.Config, {"encoder": {"model_type": "nothing"}}, encoder_decoder.FIXED
        )
