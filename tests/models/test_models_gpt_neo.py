"""GPT-Neo against transformers' PyTorch GPT-Neo, from the same configs and weights."""

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
from fmjax.models import gpt_neo

CONFIG = gpt_neo.Config(
    vocab_size=51, max_position_embeddings=20, hidden_size=30, num_layers=2, num_heads=3,
    attention_types=((("local",), 1), (("global",), 1)), window_size=4,
    intermediate_size=44, pad_token_id=2, id2label=("a", "b", "c"),
)  # fmt: skip
UNTIED = dataclasses.replace(
    CONFIG, tie_word_embeddings=False, intermediate_size=None, activation_function="relu"
)
CASES = [
    ("model", CONFIG),
    ("causal_lm", CONFIG),
    ("causal_lm", UNTIED),
    ("sequence_classification", CONFIG),
    ("token_classification", CONFIG),
    ("question_answering", dataclasses.replace(CONFIG, id2label=("a", "b"))),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    inputs = text_inputs(config, head, pad_id=2)
    inputs["token_type_ids"] = np.random.default_rng(1).integers(3, 50, inputs["input_ids"].shape)
    check_head(gpt_neo, config, head, tmp_path, inputs)


def test_cached_decoding():
    model, variables = fmjax.create(
        "gpt_neo", gpt_neo.VARIANTS["tiny"], head="causal_lm", rng=jax.random.key(0), scan=True
    )
    check_decoding(model, shuffled(variables))


def test_files_of_the_hub_load(tmp_path):
    """Buffers of masks, a tied copy, and no prefix."""
    check_old_file(
        gpt_neo, gpt_neo.VARIANTS["tiny"], "causal_lm", tmp_path,
        extra=("h.0.attn.attention.bias", "h.1.attn.attention.masked_bias", "lm_head.weight"),
        rename=lambda name: name.removeprefix("transformer."),
    )  # fmt: skip


def test_a_config_of_the_hub_is_read():
    """The keys of EleutherAI/gpt-neo-125m's."""
    data = {
        "activation_function": "gelu_new", "architectures": ["GPTNeoForCausalLM"],
        "attention_dropout": 0, "attention_layers": ["global", "local"] * 6,
        "attention_types": [[["global", "local"], 6]], "bos_token_id": 50256, "embed_dropout": 0,
        "eos_token_id": 50256, "gradient_checkpointing": False, "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": None, "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neo", "num_heads": 12,
        "num_layers": 12, "resid_dropout": 0, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True, "transformers_version": "4.9.0.dev0", "use_cache": True,
        "vocab_size": 50257, "window_size": 256,
    }  # fmt: skip
    assert parse_config(gpt_neo.Config, data, gpt_neo.FIXED) == gpt_neo.VARIANTS["125m"]


def test_published_sizes():
    check_sizes(gpt_neo, dict.fromkeys(gpt_neo.VARIANTS, "GPTNeoModel"))


def test_config_defaults_are_transformers_defaults():
    theirs = transformers.GPTNeoConfig().to_dict()
    ours = config_to_json(gpt_neo.Config(), {})
    for key in ours.keys() - {"problem_type", "label2id", "id2label"}:
        assert ours[key] == theirs[key], key
    assert parse_config(gpt_neo.Config, theirs, gpt_neo.FIXED) == gpt_neo.Config()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 7}, "hidden_size=2048 is not a multiple of num_heads=7"),
        ({"num_layers": 4}, "are 24 layers, not num_layers=4"),
        ({"attention_types": ((("far",), 24),)}, r"attention_types has \['far'\]"),
        ({"attention_types": (("global", 24),)}, "must be pairs"),
        ({"attention_layers": ("global",) * 24}, "contradicts attention_types"),
        ({"window_size": 0, "embed_dropout": 1.0}, "window_size=0.*embed_dropout=1.0"),
        ({"activation_function": "gelu?"}, "activation_function='gelu\\?' is not one of"),
        ({"pad_token_id": 60000}, "pad_token_id=60000 is outside"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        gpt_neo.Config(**change)


def test_too_long_inputs_are_refused():
    model = gpt_neo.Model(CONFIG)
    with pytest.raises(ValueError, match="21 positions are more than the model's 20"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 21), int)))
