"""GPT-J against transformers' PyTorch GPT-J, from the same configs and weights."""

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
from fmjax.models import gptj

CONFIG = gptj.Config(
    vocab_size=51, n_positions=20, n_embd=30, n_layer=2, n_head=3, rotary_dim=6, n_inner=44,
    pad_token_id=2, id2label=("a", "b", "c"),
)  # fmt: skip
TIED = dataclasses.replace(
    CONFIG, tie_word_embeddings=True, n_inner=None, rotary_dim=10, activation_function="relu"
)
CASES = [
    ("model", CONFIG),
    ("causal_lm", CONFIG),
    ("causal_lm", TIED),
    ("sequence_classification", CONFIG),
    ("question_answering", dataclasses.replace(CONFIG, id2label=("a", "b"))),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    inputs = text_inputs(config, head, pad_id=2)
    if head != "question_answering":  # whose PyTorch class does not pass them on
        rng = np.random.default_rng(1)
        inputs["token_type_ids"] = rng.integers(3, 50, inputs["input_ids"].shape)
    check_head(gptj, config, head, tmp_path, inputs)


def test_cached_decoding():
    model, variables = fmjax.create(
        "gptj", gptj.VARIANTS["tiny"], head="causal_lm", rng=jax.random.key(0)
    )
    check_decoding(model, shuffled(variables))


def test_files_of_the_hub_load(tmp_path):
    """Buffers of masks; no prefix."""
    check_old_file(
        gptj, gptj.VARIANTS["tiny"], "causal_lm", tmp_path,
        extra=("h.0.attn.bias", "h.1.attn.masked_bias"),
        rename=lambda name: name.removeprefix("transformer."),
    )  # fmt: skip


def test_a_config_of_the_hub_is_read():
    """The keys of EleutherAI/gpt-j-6b's."""
    data = {
        "activation_function": "gelu_new", "architectures": ["GPTJForCausalLM"],
        "attn_pdrop": 0.0, "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256,
        "gradient_checkpointing": False, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_inner": None, "n_layer": 28,
        "n_positions": 2048, "resid_pdrop": 0.0, "rotary": True, "rotary_dim": 64,
        "scale_attn_weights": True, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True}},
        "tie_word_embeddings": False, "tokenizer_class": "GPT2Tokenizer",
        "transformers_version": "4.18.0.dev0", "use_cache": True, "vocab_size": 50400,
    }  # fmt: skip
    assert parse_config(gptj.Config, data, gptj.FIXED) == gptj.VARIANTS["6b"]


def test_published_sizes():
    check_sizes(gptj, dict.fromkeys(gptj.VARIANTS, "GPTJModel"))


def test_config_defaults_are_transformers_defaults():
    theirs = transformers.GPTJConfig().to_dict()
    ours = config_to_json(gptj.Config(), {})
    for key in ours.keys() - {"problem_type", "label2id", "id2label"}:
        assert ours[key] == theirs[key], key
    assert parse_config(gptj.Config, theirs, gptj.FIXED) == gptj.Config()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_head": 7}, "n_embd=4096 is not a multiple of n_head=7"),
        ({"rotary_dim": 5}, "rotary_dim=5 must be even"),
        ({"rotary_dim": 258}, "at most the size of a head, 256"),
        ({"n_layer": 0, "attn_pdrop": 1.0}, "n_layer=0 must be at least 1; attn_pdrop=1.0"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        gptj.Config(**change)
