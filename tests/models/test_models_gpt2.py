"""GPT-2 against transformers' PyTorch GPT-2, from the same configs and weights."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from parity import check_decoding, check_fixture, check_head, check_sizes, shuffled, text_inputs

import fmjax
from fmjax.config import config_to_json, parse_config
from fmjax.models import gpt2
from fmjax.nn.decoder import last_token

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CONFIG = gpt2.Config(
    vocab_size=51, n_positions=20, n_embd=30, n_layer=2, n_head=3, n_inner=44,
    activation_function="gelu_new", pad_token_id=2, id2label=("a", "b", "c"),
)  # fmt: skip
UNTIED = dataclasses.replace(
    CONFIG, tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True, n_inner=None,
    add_cross_attention=True, activation_function="relu",
)  # fmt: skip
# PyTorch's class sets one label.
CHOICES = dataclasses.replace(CONFIG, id2label=("LABEL_0",))
UNSCALED = dataclasses.replace(CHOICES, scale_attn_weights=False, summary_activation="tanh")
CASES = [
    ("model", CONFIG),
    ("causal_lm", CONFIG),
    ("causal_lm", UNTIED),
    ("double_heads", CHOICES),
    ("double_heads", UNSCALED),
    ("sequence_classification", CONFIG),
    ("token_classification", CONFIG),
    ("question_answering", dataclasses.replace(CONFIG, id2label=("a", "b"))),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    shape_of = "multiple_choice" if head == "double_heads" else head
    inputs = text_inputs(config, shape_of, pad_id=2)
    rng = np.random.default_rng(1)
    inputs["token_type_ids"] = rng.integers(3, 50, inputs["input_ids"].shape)
    if head == "double_heads":
        inputs["mc_token_ids"] = np.array([[8, 7, 6], [5, 4, 3]])
    if config.add_cross_attention:
        inputs["encoder_hidden_states"] = rng.normal(size=(2, 5, 30))
        inputs["encoder_attention_mask"] = np.array([[1] * 5, [1, 1, 1, 0, 0]])
    check_head(gpt2, config, head, tmp_path, inputs)


def test_the_flax_fixture_equals_pytorch():
    check_fixture(FIXTURES / "gpt2-lm")


def test_the_last_token_is_told_by_ids_and_by_the_mask():
    """Which may say more: rows may be padded with another token than the config's."""
    ids = jnp.array([[5, 6, 2, 2], [5, 6, 7, 8], [9, 9, 5, 6]])
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]])
    hidden = jnp.zeros((3, 4, 1))
    for pad, given, wanted in (
        (2, mask, [1, 2, 3]), (2, None, [1, 3, 3]), (8, mask, [1, 2, 3]), (None, mask, [1, 2, 3]),
        (None, None, [3, 3, 3]),
    ):  # fmt: skip
        np.testing.assert_array_equal(last_token(ids, given, pad, hidden), wanted)


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding(scan):
    model, variables = fmjax.create(
        "gpt2", gpt2.VARIANTS["tiny"], head="causal_lm", rng=jax.random.key(0), scan=scan
    )
    check_decoding(model, shuffled(variables))


def test_published_sizes():
    check_sizes(gpt2, dict.fromkeys(gpt2.VARIANTS, "GPT2Model"))


def test_config_defaults_are_transformers_defaults():
    theirs = transformers.GPT2Config().to_dict()
    ours = config_to_json(gpt2.Config(), {})
    for key in ours.keys() - {"problem_type", "label2id", "id2label", "classifier_dropout"}:
        assert ours[key] == theirs[key], key
    assert parse_config(gpt2.Config, theirs, gpt2.FIXED) == gpt2.Config()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_head": 7}, "n_embd=768 is not a multiple of n_head=7"),
        ({"summary_activation": "relu"}, "summary_activation='relu'"),
        ({"attn_pdrop": 1.0}, "attn_pdrop=1.0"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        gpt2.Config(**change)


def test_bad_inputs_are_refused():
    model, variables = fmjax.create("gpt2", CONFIG, rng=jax.random.key(0))
    for inputs, words in [
        ({}, "exactly one of input_ids"),
        ({"input_ids": np.zeros((1, 99), int)}, "99 positions are more than"),
        ({"input_ids": np.zeros(3, int)}, r"\[B, T\]"),
        (
            {"input_ids": np.zeros((1, 3), int), "encoder_hidden_states": np.ones((1, 4, 30))},
            "add_cross_attention",
        ),
        ({"input_ids": np.zeros((1, 3), int), "mc_token_ids": np.zeros((1, 2))}, "double_heads"),
        (
            {
                "input_ids": np.zeros((1, 3), int),
                "cache": model.init_cache(1, 4) | {"length": jnp.int32(3)},
            },
            r"3 more positions behind the 3 .* than the 4 .* length=6\)",
        ),
        (
            {"input_ids": np.zeros((2, 3), int), "attention_mask": np.ones((3, 3), int)},
            r"attention_mask has shape \(3, 3\); it must be \[2, 3\] or \[2, 3, 3\]",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            model.apply(variables, **inputs)
