"""StableLM against transformers' PyTorch StableLM, from the same configs and weights."""

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
from fmjax.models import stablelm
from fmjax.nn.position import RopeScaling

CONFIG = stablelm.Config(
    vocab_size=51, hidden_size=30, intermediate_size=44, num_hidden_layers=2,
    num_attention_heads=3, num_key_value_heads=3, partial_rotary_factor=0.4,
    max_position_embeddings=20, pad_token_id=2, id2label=("a", "b", "c"),
)  # fmt: skip
GROUPED = dataclasses.replace(
    CONFIG, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, qk_layernorm=True,
    use_qkv_bias=True, use_parallel_residual=True, partial_rotary_factor=0.5, rope_theta=500.0,
    tie_word_embeddings=True, hidden_act="relu",
    rope_scaling=RopeScaling(rope_type="linear", factor=2.0),
)  # fmt: skip
CASES = [
    ("model", GROUPED),
    ("causal_lm", CONFIG),
    ("causal_lm", GROUPED),
    ("sequence_classification", CONFIG),
    ("token_classification", dataclasses.replace(GROUPED, use_parallel_residual=False)),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    check_head(stablelm, config, head, tmp_path, text_inputs(config, head, pad_id=2))


def test_cached_decoding():
    model, variables = fmjax.create(
        "stablelm", stablelm.VARIANTS["tiny"], head="causal_lm", rng=jax.random.key(0), scan=True
    )
    check_decoding(model, shuffled(variables))


def test_files_of_the_hub_load(tmp_path):
    """Buffers of rotary positions; no prefix."""
    check_old_file(
        stablelm, stablelm.VARIANTS["tiny"], "causal_lm", tmp_path,
        extra=("layers.0.self_attn.rotary_emb.inv_freq",),
        rename=lambda name: name.removeprefix("model."),
    )  # fmt: skip


def test_published_sizes():
    check_sizes(stablelm, dict.fromkeys(stablelm.VARIANTS, "StableLmModel"))


def test_config_defaults_are_transformers_defaults():
    theirs = transformers.StableLmConfig().to_dict()
    explicit = stablelm.Config()
    ours = config_to_json(explicit, {})
    for key in ours.keys() & theirs.keys() - {"problem_type", "label2id", "id2label"}:
        assert ours[key] == theirs[key], key
    assert parse_config(stablelm.Config, theirs, stablelm.FIXED) == explicit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "hidden_size=2560 is not a multiple of num_attention_heads=7"),
        (
            {"num_key_value_heads": 3, "partial_rotary_factor": 1.5},
            "120 rotary features of a head of 80.*is not a multiple of num_key_value_heads=3",
        ),
        ({"partial_rotary_factor": 0.0626}, "5 rotary features of a head of 80: they must be even"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        stablelm.Config(**change)
