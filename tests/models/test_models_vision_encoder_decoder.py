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
    vision_encoder_decoder,
    vit,
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
    ],
    ids=["vit-gpt2", "vit-bert", "beit-roberta", "swin-bert"],
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
