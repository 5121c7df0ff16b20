"""OPT against transformers' PyTorch OPT, from the same configs and weights."""

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
from fmjax.models import opt

CONFIG = opt.Config(
    vocab_size=51, hidden_size=30, num_hidden_layers=2, ffn_dim=44, num_attention_heads=3,
    max_position_embeddings=20, word_embed_proj_dim=30, pad_token_id=2, id2label=("a", "b", "c"),
)  # fmt: skip
# As 350m, and untied.
AFTER = dataclasses.replace(
    CONFIG, do_layer_norm_before=False, word_embed_proj_dim=22, tie_word_embeddings=False
)
BARE = dataclasses.replace(
    CONFIG, _remove_final_layer_norm=True, enable_bias=False, activation_function="gelu",
    layer_norm_elementwise_affine=False,
)  # fmt: skip
NARROW = dataclasses.replace(CONFIG, word_embed_proj_dim=22)
CASES = [
    ("model", NARROW),
    ("causal_lm", CONFIG),
    ("causal_lm", AFTER),
    ("sequence_classification", BARE),
    ("question_answering", dataclasses.replace(AFTER, id2label=("a", "b"))),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    inputs = text_inputs(config, head, pad_id=2)
    if head == "model":  # positions follow the mask
        inputs["attention_mask"] = np.array([[1] * 9, [1, 1, 0, 1, 1, 0, 0, 1, 1]])
    check_head(opt, config, head, tmp_path, inputs)


def test_positions_follow_the_mask_in_a_cache():
    model = opt.Model(CONFIG)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(
        model.default_positions(jax.numpy.asarray(mask), jax.numpy.array(2), 3),
        [[0, 1, 2], [2, 3, 4]],
    )


def test_dropped_layers_do_nothing():
    config = dataclasses.replace(opt.VARIANTS["tiny"], layerdrop=0.999999, word_embed_proj_dim=24)
    model, variables = fmjax.create("opt", config, rng=jax.random.key(0))
    run = jax.jit(
        lambda key: model.apply(
            variables, input_ids=np.array([[5, 6, 7]]), train=True, rngs={"dropout": key},
            output_hidden_states=True,
        ).hidden_states
    )  # fmt: skip
    states = run(jax.random.key(1))
    np.testing.assert_array_equal(states[1], states[0])


def test_cached_decoding():
    model, variables = fmjax.create(
        "opt", opt.VARIANTS["tiny"], head="causal_lm", rng=jax.random.key(0), scan=True
    )
    check_decoding(model, shuffled(variables))


def test_files_of_the_hub_load(tmp_path):
    """A counter of versions, a tied copy; no prefix."""
    check_old_file(
        opt, opt.VARIANTS["tiny"], "causal_lm", tmp_path,
        extra=("decoder.version", "lm_head.weight"),
        rename=lambda name: name.removeprefix("model."),
    )  # fmt: skip


def test_a_config_of_the_hub_is_read():
    """The keys of facebook/opt-350m's."""
    data = {
        "_name_or_path": "opt-350m", "_remove_final_layer_norm": False, "activation_dropout": 0.0,
        "activation_function": "relu", "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": False, "dropout": 0.1,
        "eos_token_id": 2, "ffn_dim": 4096, "hidden_size": 1024, "init_std": 0.02,
        "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt",
        "num_attention_heads": 16, "num_hidden_layers": 24, "pad_token_id": 1, "prefix": "</s>",
        "torch_dtype": "float16", "transformers_version": "4.20.0.dev0", "use_cache": True,
        "vocab_size": 50272, "word_embed_proj_dim": 512,
    }  # fmt: skip
    assert parse_config(opt.Config, data, opt.FIXED) == opt.VARIANTS["350m"]


def test_published_sizes():
    check_sizes(opt, dict.fromkeys(opt.VARIANTS, "OPTModel"))


def test_config_defaults_are_transformers_defaults():
    theirs = transformers.OPTConfig().to_dict()
    ours = config_to_json(opt.Config(word_embed_proj_dim=768), {})
    for key in ours.keys() - {"problem_type", "label2id", "id2label"}:
        assert ours[key] == theirs[key], key
    assert parse_config(opt.Config, theirs, opt.FIXED) == opt.Config(word_embed_proj_dim=768)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "hidden_size=768 is not a multiple of num_attention_heads=7"),
        ({"layerdrop": 1.0, "ffn_dim": 0}, r"ffn_dim=0 must be at least 1; layerdrop=1\.0"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        opt.Config(**change)
