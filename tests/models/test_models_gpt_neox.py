"""GPT-NeoX against transformers' PyTorch GPT-NeoX, from the same configs and weights."""

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
from fmjax.models import gpt_neox
from fmjax.nn.position import RopeScaling

CONFIG = gpt_neox.Config(
    vocab_size=51, hidden_size=30, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=44, max_position_embeddings=20, rotary_pct=0.4, pad_token_id=2,
    id2label=("a", "b", "c"),
)  # fmt: skip
SERIAL = dataclasses.replace(
    CONFIG, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True,
    hidden_act="gelu_fast", rotary_pct=0.55, rotary_emb_base=1000.0,
)  # fmt: skip
SCALED = dataclasses.replace(
    CONFIG, rotary_pct=1.0, max_position_embeddings=8,
    rope_scaling=RopeScaling(rope_type="dynamic", factor=2.0),
)  # fmt: skip
CASES = [
    ("model", SCALED),
    ("causal_lm", CONFIG),
    ("causal_lm", SERIAL),
    ("sequence_classification", CONFIG),
    ("token_classification", CONFIG),
    ("question_answering", dataclasses.replace(CONFIG, id2label=("a", "b"))),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    check_head(gpt_neox, config, head, tmp_path, text_inputs(config, head, pad_id=2))


def test_cached_decoding():
    model, variables = fmjax.create(
        "gpt_neox", gpt_neox.VARIANTS["tiny"], head="causal_lm", rng=jax.random.key(0)
    )
    check_decoding(model, shuffled(variables))


def test_files_of_the_hub_load(tmp_path):
    """Version 4's name of the output matrix, buffers of masks and rotary positions; no prefix."""
    check_old_file(
        gpt_neox, gpt_neox.VARIANTS["tiny"], "causal_lm", tmp_path,
        extra=(
            "layers.0.attention.bias", "layers.1.attention.masked_bias",
            "layers.0.attention.rotary_emb.inv_freq",
        ),
        rename=lambda name: name.removeprefix("gpt_neox."),
    )  # fmt: skip


def test_the_output_matrix_has_two_names(tmp_path):
    check_old_file(
        gpt_neox, gpt_neox.VARIANTS["tiny"], "causal_lm", tmp_path,
        extra=("gpt_neox.layers.0.attention.bias", "gpt_neox.rotary_emb.inv_freq"),
        rename=lambda name: name.replace("embed_out.", "lm_head."),
    )  # fmt: skip


def test_a_config_of_the_hub_is_read():
    """The keys of EleutherAI/gpt-neox-20b's."""
    data = {
        "architectures": ["GPTNeoXForCausalLM"], "attention_probs_dropout_prob": 0,
        "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu_fast", "hidden_dropout_prob": 0,
        "hidden_size": 6144, "initializer_range": 0.02, "intermediate_size": 24576,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
        "num_attention_heads": 64, "num_hidden_layers": 44, "rotary_emb_base": 10000,
        "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.19.0.dev0", "use_cache": True, "vocab_size": 50432,
    }  # fmt: skip
    assert parse_config(gpt_neox.Config, data, gpt_neox.FIXED) == gpt_neox.VARIANTS["20b"]


def test_published_sizes():
    check_sizes(gpt_neox, dict.fromkeys(gpt_neox.VARIANTS, "GPTNeoXModel"))


def test_config_defaults_are_transformers_defaults():
    theirs = transformers.GPTNeoXConfig().to_dict()
    ours = config_to_json(gpt_neox.Config(), {})
    for key in ours.keys() & theirs.keys() - {"problem_type", "label2id", "id2label"}:
        assert ours[key] == theirs[key], key
    assert parse_config(gpt_neox.Config, theirs, gpt_neox.FIXED) == gpt_neox.Config()


def test_both_dialects_of_rotary_keys_are_read():
    """As saved by transformers 4.45 to 4.57, which wrote each number under two names."""
    data = {
        "rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rotary_emb_base": 500, "rope_theta": 500,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }  # fmt: skip
    config = parse_config(gpt_neox.Config, data, gpt_neox.FIXED)
    assert (config.rotary_pct, config.rotary_emb_base) == (0.5, 500)
    assert config.rope_scaling == RopeScaling(rope_type="linear", factor=4.0)
    with pytest.raises(ValueError, match=r"partial_rotary_factor=.* is another name"):
        parse_config(gpt_neox.Config, data | {"rotary_pct": 0.25}, gpt_neox.FIXED)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "hidden_size=6144 is not a multiple of num_attention_heads=7"),
        ({"rotary_pct": 1.5}, "144 rotary features of a head of 96"),
        ({"rotary_pct": 0.0}, "0 rotary features of a head of 96"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        gpt_neox.Config(**change)
