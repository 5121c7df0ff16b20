"""Mistral against transformers' PyTorch Mistral, from the same configs and weights."""

import dataclasses

import jax
import pytest
from parity import (
    check_decoding,
    check_defaults,
    check_head,
    check_sizes,
    shuffled,
    text_inputs,
)

import fmjax
from fmjax.models import mistral

CONFIG = mistral.Config(
    vocab_size=51, hidden_size=30, intermediate_size=44, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, head_dim=4, max_position_embeddings=32,
    sliding_window=4, pad_token_id=2, id2label=("a", "b", "c"),
)  # fmt: skip
# Null is no window: the old Flax classes masked everything there.
FULL = dataclasses.replace(CONFIG, sliding_window=None, num_key_value_heads=3, head_dim=6)
SHORT = dataclasses.replace(CONFIG, num_hidden_layers=1)  # heads are the same after one layer
TWO_LABELS = dataclasses.replace(SHORT, id2label=("LABEL_0", "LABEL_1"))
CASES = [
    ("model", CONFIG),
    ("causal_lm", FULL),
    ("sequence_classification", SHORT),
    ("token_classification", SHORT),
    ("question_answering", TWO_LABELS),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    check_head(mistral, config, head, tmp_path, text_inputs(config, head, pad_id=2))


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding(scan):
    model, variables = fmjax.create(
        "mistral", "tiny", head="causal_lm", rng=jax.random.key(0), scan=scan
    )
    check_decoding(model, shuffled(variables))


def test_published_sizes():
    check_sizes(mistral, dict.fromkeys(mistral.VARIANTS, "MistralModel"))


def test_config_defaults_are_transformers_defaults():
    check_defaults(mistral, head_dim=128)


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="sliding_window=0 must be at least 1"):
        mistral.Config(sliding_window=0)
