"""Phi against transformers' PyTorch Phi, from the same configs and weights."""

import dataclasses

import jax
import pytest
import transformers
from parity import (
    check_decoding,
    check_head,
    check_old_file,
    check_sizes,
    shuffled,
    text_inputs,
)

import fmjax
from fmjax.config import config_to_json, parse_config
from fmjax.models import phi
from fmjax.nn.position import RopeScaling

CONFIG = phi.Config(
    vocab_size=51, hidden_size=30, intermediate_size=44, num_hidden_layers=2,
    num_attention_heads=3, num_key_value_heads=3, partial_rotary_factor=0.4,
    max_position_embeddings=20, pad_token_id=2, id2label=("a", "b", "c"),
)  # fmt: skip
GROUPED = dataclasses.replace(
    CONFIG, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, qk_layernorm=True,
    partial_rotary_factor=0.5, rope_theta=500.0, tie_word_embeddings=True, hidden_act="relu",
    rope_scaling=RopeScaling(rope_type="linear", factor=2.0),
)  # fmt: skip
CASES = [
    ("model", GROUPED),
    ("causal_lm", CONFIG),
    ("causal_lm", GROUPED),
    ("sequence_classification", CONFIG),
    ("token_classification", CONFIG),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    check_head(phi, config, head, tmp_path, text_inputs(config, head, pad_id=2))


def test_cached_decoding():
    model, variables = fmjax.create(
        "phi", phi.VARIANTS["tiny"], head="causal_lm", rng=jax.random.key(0)
    )
    check_decoding(model, shuffled(variables))


def test_files_of_the_hub_load(tmp_path):
    """Buffers of rotary positions; no prefix."""
    check_old_file(
        phi, phi.VARIANTS["tiny"], "causal_lm", tmp_path,
        extra=("layers.0.self_attn.rotary_emb.inv_freq",),
        rename=lambda name: name.removeprefix("model."),
    )  # fmt: skip


def test_a_config_of_the_hub_is_read():
    """The keys of microsoft/phi-2's."""
    data = {
        "_name_or_path": "microsoft/phi-2", "architectures": ["PhiForCausalLM"],
        "attention_dropout": 0.0, "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256,
        "hidden_act": "gelu_new", "hidden_size": 2560, "initializer_range": 0.02,
        "intermediate_size": 10240, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
        "model_type": "phi", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": None, "partial_rotary_factor": 0.4, "qk_layernorm": False,
        "resid_pdrop": 0.1, "rope_scaling": None, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.37.0",
        "use_cache": True, "vocab_size": 51200,
    }  # fmt: skip
    assert parse_config(phi.Config, data, phi.FIXED) == phi.VARIANTS["2"]


def test_published_sizes():
    check_sizes(phi, dict.fromkeys(phi.VARIANTS, "PhiModel"))


def test_config_defaults_are_transformers_defaults():
    theirs = transformers.PhiConfig().to_dict()
    explicit = phi.Config(num_key_value_heads=32)
    ours = config_to_json(explicit, {})
    for key in ours.keys() & theirs.keys() - {"problem_type", "label2id", "id2label"}:
        assert ours[key] == theirs[key], key
    assert parse_config(phi.Config, theirs, phi.FIXED) == explicit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "hidden_size=2048 is not a multiple of num_attention_heads=7"),
        (
            {"num_key_value_heads": 3, "partial_rotary_factor": 1.5},
            "96 rotary features of a head of 64.*is not a multiple of num_key_value_heads=3",
        ),
        ({"partial_rotary_factor": 0.0782}, "5 rotary features of a head of 64: they must be even"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        phi.Config(**change)
