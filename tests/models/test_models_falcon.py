"""Falcon against transformers' PyTorch Falcon, from the same configs and weights."""

import dataclasses

import jax
import numpy as np
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
from fmjax.models import falcon
from fmjax.nn.position import RopeScaling

# As 7B: one key-value head, one norm, in parallel.
CONFIG = falcon.Config(
    vocab_size=51, hidden_size=30, num_hidden_layers=2, num_attention_heads=3, num_kv_heads=3,
    ffn_hidden_size=44, max_position_embeddings=20, pad_token_id=2, id2label=("a", "b", "c"),
)  # fmt: skip
# As 40B: grouped heads, two norms.
GROUPED = dataclasses.replace(
    CONFIG, num_attention_heads=6, hidden_size=24, num_kv_heads=2, new_decoder_architecture=True,
    num_ln_in_parallel_attn=2, bias=True, tie_word_embeddings=False, rope_theta=500.0,
    rope_scaling=RopeScaling(rope_type="linear", factor=2.0),
)  # fmt: skip
# As 11B: one norm.
ONE_NORM = dataclasses.replace(
    GROUPED, num_ln_in_parallel_attn=1, num_kv_heads=6, activation="relu", rope_scaling=None
)
# As RefinedWeb's: linear biases, one after the other.
SERIAL = dataclasses.replace(CONFIG, alibi=True, multi_query=False, parallel_attn=False, bias=True)
PARALLEL_ALIBI = dataclasses.replace(CONFIG, alibi=True, num_attention_heads=5, num_kv_heads=5)
CASES = [
    ("model", PARALLEL_ALIBI),
    ("causal_lm", CONFIG),
    ("causal_lm", GROUPED),
    ("sequence_classification", ONE_NORM),
    ("token_classification", SERIAL),
    ("question_answering", dataclasses.replace(SERIAL, multi_query=True, id2label=("a", "b"))),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    inputs = text_inputs(config, head, pad_id=2)
    if head == "model":  # the biases follow the mask
        inputs["attention_mask"] = np.array([[1] * 9, [1, 1, 0, 1, 1, 0, 0, 1, 1]])
    # PyTorch's eager attention adds the linear biases twice; sdpa, the default, does not.
    implementation = "sdpa" if config.alibi else "eager"
    check_head(
        falcon, config, head, tmp_path, inputs, implementation=implementation,
        attentions=not config.alibi,
    )  # fmt: skip


@pytest.mark.parametrize(("config", "scan"), [(falcon.VARIANTS["tiny"], True), (SERIAL, False)])
def test_cached_decoding(config, scan):
    model, variables = fmjax.create(
        "falcon", config, head="causal_lm", rng=jax.random.key(0), scan=scan
    )
    check_decoding(model, shuffled(variables))


def test_files_of_the_hub_load(tmp_path):
    """Buffers of rotary positions, a tied copy; no prefix."""
    check_old_file(
        falcon, falcon.VARIANTS["tiny"], "causal_lm", tmp_path,
        extra=("h.0.self_attention.maybe_rotary.inv_freq", "lm_head.weight"),
        rename=lambda name: name.removeprefix("transformer."),
    )  # fmt: skip


def test_a_config_of_the_hub_is_read():
    """The keys of tiiuae/falcon-40b's."""
    data = {
        "alibi": False, "apply_residual_connection_post_layernorm": False,
        "architectures": ["FalconForCausalLM"], "attention_dropout": 0.0, "auto_map": {},
        "bias": False, "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0,
        "hidden_size": 8192, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "model_type": "falcon", "new_decoder_architecture": True, "num_attention_heads": 128,
        "num_hidden_layers": 60, "num_kv_heads": 8, "parallel_attn": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.27.4", "use_cache": True,
        "vocab_size": 65024,
    }  # fmt: skip
    assert parse_config(falcon.Config, data, falcon.FIXED) == falcon.VARIANTS["40b"]


def test_published_sizes():
    check_sizes(falcon, dict.fromkeys(falcon.VARIANTS, "FalconModel"))


def test_config_defaults_are_transformers_defaults():
    theirs = transformers.FalconConfig().to_dict()
    explicit = falcon.Config(num_kv_heads=71, ffn_hidden_size=4 * 4544)
    ours = config_to_json(explicit, {})
    for key in ours.keys() & theirs.keys() - {"problem_type", "label2id", "id2label"}:
        assert ours[key] == theirs[key], key
    assert parse_config(falcon.Config, theirs, falcon.FIXED) == explicit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "hidden_size=4544 is not a multiple of num_attention_heads=7"),
        (
            {"new_decoder_architecture": True, "num_kv_heads": 3, "parallel_attn": False},
            "num_attention_heads=71 is not a multiple of num_kv_heads=3.*needs parallel_attn=True",
        ),
        ({"num_ln_in_parallel_attn": 2}, "needs new_decoder_architecture=True"),
        ({"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn=3 must be 1 or 2"),
        ({"hidden_size": 71 * 9}, "9 rotary features of a head of 9"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        falcon.Config(**change)
