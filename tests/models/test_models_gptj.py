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


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding(scan):
    model, variables = fmjax.create(
        "gptj", gptj.VARIANTS["tiny"], head="causal_lm", rng=jax.random.key(0), scan=scan
    )
    check_decoding(model, shuffled(variables))


def test_files_of_the_hub_load(tmp_path):
    """Buffers of masks; no prefix."""
    check_old_file(
        gptj, gptj.VARIANTS["tiny"], "causal_lm", tmp_path,
        extra=("h.0.attn.bias", "h.1.attn.masked_bias"),
        rename=lambda name: name.removeprefix("transformer."),
    )  # fmt: skip


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
