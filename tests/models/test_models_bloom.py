"""BLOOM against transformers' PyTorch BLOOM, from the same configs and weights."""

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
from fmjax.models import bloom

CONFIG = bloom.Config(
    vocab_size=51, hidden_size=30, n_layer=2, n_head=3, pad_token_id=2, id2label=("a", "b", "c")
)
OTHER = dataclasses.replace(
    CONFIG, n_head=5, apply_residual_connection_post_layernorm=True, tie_word_embeddings=False
)
CASES = [
    ("model", CONFIG),
    ("causal_lm", CONFIG),
    ("causal_lm", OTHER),
    ("sequence_classification", CONFIG),
    ("token_classification", CONFIG),
    ("question_answering", dataclasses.replace(OTHER, id2label=("a", "b"))),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    inputs = text_inputs(config, head, pad_id=2)
    if head == "model":  # the biases follow the mask
        inputs["attention_mask"] = np.array([[1] * 9, [1, 1, 0, 1, 1, 0, 0, 1, 1]])
    if config is OTHER:
        del inputs["attention_mask"]
    check_head(bloom, config, head, tmp_path, inputs)


def test_cached_decoding():
    model, variables = fmjax.create(
        "bloom", bloom.VARIANTS["tiny"], head="causal_lm", rng=jax.random.key(0)
    )
    check_decoding(model, shuffled(variables))


def test_files_of_the_hub_load(tmp_path):
    """Names have no prefix."""
    check_old_file(
        bloom, bloom.VARIANTS["tiny"], "causal_lm", tmp_path,
        rename=lambda name: name.removeprefix("transformer."),
    )  # fmt: skip


def test_a_config_of_the_hub_is_read():
    """The keys of bigscience/bloom-560m's."""
    data = {
        "apply_residual_connection_post_layernorm": False, "architectures": ["BloomForCausalLM"],
        "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "unk_token_id": 0,
        "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "masked_softmax_fusion": True, "model_type": "bloom", "n_embed": 1024, "n_inner": None,
        "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100, "pretraining_tp": 1,
        "seq_length": 2048, "skip_bias_add": True, "skip_bias_add_qkv": False,
        "transformers_version": "4.20.0", "use_cache": True, "vocab_size": 250880,
    }  # fmt: skip
    assert parse_config(bloom.Config, data, bloom.FIXED) == bloom.VARIANTS["560m"]


def test_published_sizes():
    check_sizes(bloom, dict.fromkeys(bloom.VARIANTS, "BloomModel"))


def test_config_defaults_are_transformers_defaults():
    theirs = transformers.BloomConfig().to_dict()
    ours = config_to_json(bloom.Config(), {})
    for key in ours.keys() - {"problem_type", "label2id", "id2label", "classifier_dropout"}:
        assert ours[key] == theirs[key], key
    assert parse_config(bloom.Config, theirs, bloom.FIXED) == bloom.Config()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_head": 7}, "hidden_size=64 is not a multiple of n_head=7"),
        ({"n_layer": 0, "hidden_dropout": 1.0}, r"n_layer=0 must be at least 1; hidden_dropout=1"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        bloom.Config(**change)
