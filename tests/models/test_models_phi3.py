"""Phi-3 against transformers' PyTorch Phi-3, from the same configs and weights."""

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
from fmjax.config import parse_config
from fmjax.models import phi3
from fmjax.nn.position import RopeScaling

CONFIG = phi3.Config(
    vocab_size=51, hidden_size=48, intermediate_size=44, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=32,
    original_max_position_embeddings=8, sliding_window=4, pad_token_id=2,
    id2label=("a", "b", "c"),
)  # fmt: skip


def longrope(original, size):
    """Nine positions are beyond a context of 8 and within one of 16."""
    return {
        "original_max_position_embeddings": original,
        "rope_scaling": RopeScaling(
            "longrope", original_max_position_embeddings=original,
            short_factor=(1.0, 1.5, 1.7)[: size // 2], long_factor=(2.0, 4.0, 5.0)[: size // 2],
        ),
    }  # fmt: skip


CASES = [
    ("model", longrope(8, 6) | {"partial_rotary_factor": 0.75}),
    ("causal_lm", {"sliding_window": None, "tie_word_embeddings": True}),
    # Heads are the same after one layer.
    (
        "sequence_classification",
        longrope(16, 4) | {"partial_rotary_factor": 0.5, "num_hidden_layers": 1},
    ),
    ("token_classification", {"num_key_value_heads": 6, "num_hidden_layers": 1}),
]


@pytest.mark.parametrize(("head", "change"), CASES)
def test_equals_pytorch(head, change, tmp_path):
    config = dataclasses.replace(CONFIG, **change)
    check_head(phi3, config, head, tmp_path, text_inputs(config, head, pad_id=2))


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding(scan):
    model, variables = fmjax.create(
        "phi3", "tiny", head="causal_lm", rng=jax.random.key(0), scan=scan
    )
    check_decoding(model, shuffled(variables))


def test_published_sizes():
    check_sizes(phi3, dict.fromkeys(["mini", "medium", "4-14b"], "Phi3Model"))


def test_config_defaults_are_transformers_defaults():
    check_defaults(phi3, num_key_value_heads=32)


def test_the_first_files_say_su():
    scaling = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    data = {"rope_scaling": scaling, "max_position_embeddings": 131072, "embd_pdrop": 0.0}
    config = parse_config(phi3.Config, data, phi3.FIXED)
    assert config.scaling == RopeScaling(
        "longrope", short_factor=(1.0,) * 48, long_factor=(2.0,) * 48,
        original_max_position_embeddings=4096,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resid_pdrop": 1.0, "partial_rotary_factor": 0.0}, "resid_pdrop=1.0.*partial_rotary_f"),
        ({"rope_scaling": RopeScaling("linear", factor=2.0)}, "'linear'; Phi-3 has 'longrope'"),
        (
            {"rope_scaling": RopeScaling("longrope", short_factor=(1.0,), long_factor=(1.0,))},
            "short_factor has 1 numbers; 96 rotated features of a head need 48",
        ),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings=0"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        phi3.Config(**change)
