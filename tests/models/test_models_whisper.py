"""Whisper against transformers' PyTorch Whisper, from the same configs and weights."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from parity import (
    check_decoding,
    check_head,
    check_old_file,
    check_sizes,
    shuffled,
)

import fmjax
from fmjax.config import config_to_json, parse_config
from fmjax.models import whisper

CONFIG = whisper.Config(
    vocab_size=51, num_mel_bins=7, d_model=30, encoder_layers=2, encoder_ffn_dim=44,
    encoder_attention_heads=3, decoder_layers=2, decoder_ffn_dim=26, decoder_attention_heads=5,
    max_source_positions=9, max_target_positions=12, classifier_proj_size=11, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
)  # fmt: skip
UNTIED = dataclasses.replace(
    CONFIG, tie_word_embeddings=False, activation_function="relu", use_weighted_layer_sum=True,
    id2label=("a", "b", "c"), encoder_layers=1, decoder_layers=1,
)  # fmt: skip


def frames(config, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, config.frames, config.num_mel_bins)).astype(np.float32)


def inputs_of(config, head):
    rng = np.random.default_rng(1)
    ids = rng.integers(4, config.vocab_size, (2, 6))
    if head == "causal_lm":
        states = rng.normal(size=(2, config.max_source_positions, config.d_model))
        return {"input_ids": ids, "encoder_hidden_states": states}
    if head == "audio_classification":
        return {"input_features": frames(config)}
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2])
    return {
        "input_features": frames(config), "decoder_input_ids": ids, "decoder_attention_mask": mask
    }  # fmt: skip


def our_arguments(twin):
    """PyTorch's model called by our arguments: frames before bins, and the encoder's states."""
    forward = twin.forward

    def called(**given):
        if "input_features" in given:
            given["input_features"] = given["input_features"].movedim(-1, 1)
        if "encoder_hidden_states" in given:
            given["encoder_outputs"] = given.pop("encoder_hidden_states")
        return forward(**given)

    twin.forward = called


@pytest.mark.parametrize(
    ("head", "config"),
    [
        ("seq2seq_lm", CONFIG),
        pytest.param("seq2seq_lm", UNTIED, marks=pytest.mark.slow),
        pytest.param("model", UNTIED, marks=pytest.mark.slow),
        pytest.param("causal_lm", CONFIG, marks=pytest.mark.slow),
        pytest.param("audio_classification", CONFIG, marks=pytest.mark.slow),
        ("audio_classification", UNTIED),
    ],
)
def test_equals_pytorch(head, config, tmp_path):
    check_head(
        whisper, config, head, tmp_path, inputs_of(config, head), prepare=our_arguments,
    )  # fmt: skip
