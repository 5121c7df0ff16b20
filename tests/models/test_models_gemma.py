"""Gemma, Gemma 2 and Gemma 3 against transformers' PyTorch classes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from parity import (
    assert_near,
    check_decoding,
    check_defaults,
    check_head,
    check_sizes,
    shuffled,
    text_inputs,
)

import fmjax
from fmjax.config import parse_config
from fmjax.models import gemma, gemma2, gemma3_text
from fmjax.nn.position import RopeScaling

SIZES = {
    "vocab_size": 51, "hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4,
    "max_position_embeddings": 32, "id2label": ("a", "b", "c"),
}  # fmt: skip
ONE = gemma.Config(**SIZES)
LAYERED = SIZES | {
    "sliding_window": 4,
    "query_pre_attn_scalar": 7,
    "layer_types": ("sliding_attention", "full_attention"),
}
# Caps that bend: scores and logits of random weights reach several times these.
TWO = gemma2.Config(**LAYERED, attn_logit_softcapping=1.5, final_logit_softcapping=2.0)
PLAIN = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
THREE = gemma3_text.Config(
    **LAYERED, rope_theta=5000.0, rope_local_base_freq=100.0, final_logit_softcapping=2.0
)
BIASED = {"attention_bias": True, "tie_word_embeddings": False, "pad_token_id": 2}
SCALED = {"rope_scaling": RopeScaling("linear", factor=8.0)}
# Heads are the same after one layer.
SHORT = {"num_hidden_layers": 1}
SHORT_LAYERED = SHORT | {"layer_types": ("sliding_attention",)}
BIDIRECTIONAL = {"use_bidirectional_attention": True, "sliding_window": 8}
CASES = [
    (gemma, "model", ONE, {"hidden_activation": "relu"}),
    (gemma, "causal_lm", ONE, {}),
    (gemma, "sequence_classification", ONE, BIASED | SHORT),
    (gemma, "token_classification", ONE, {"head_dim": 8} | SHORT),
    (gemma2, "model", TWO, PLAIN),
    (gemma2, "causal_lm", TWO, {}),
    (gemma2, "sequence_classification", TWO, BIASED | SHORT_LAYERED),
    (gemma2, "token_classification", TWO, {"head_dim": 8} | SHORT_LAYERED),
    (gemma3_text, "model", THREE, BIDIRECTIONAL),
    (gemma3_text, "causal_lm", THREE, SCALED),
    (gemma3_text, "sequence_classification", THREE, BIASED | SHORT_LAYERED),
]


@pytest.mark.parametrize(
    ("family", "head", "config", "change"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_equals_pytorch(family, head, config, change, tmp_path):
    config = dataclasses.replace(config, **change)
    inputs = text_inputs(config, head, pad_id=config.pad_token_id)
    check_head(family, config, head, tmp_path, inputs)


def test_word_vectors_are_scaled_as_pytorch_rounds():
    """In bfloat16 the square root of 12 is 3.46875, not 3.46410."""
    config = dataclasses.replace(ONE, hidden_size=12, num_hidden_layers=1)
    scale = np.float32(12**0.5)
    for dtype, rounded in ((jnp.bfloat16, 3.46875), (jnp.float32, scale)):
        model, variables = fmjax.create("gemma", config, rng=jax.random.key(0), dtype=dtype)
        ids = np.array([[3, 4, 5]])
        run = jax.jit(partial(model.apply, input_ids=ids, output_hidden_states=True))
        out = run(variables)
        table = variables["params"]["embed"]["word"]["embedding"]
        words = torch.tensor(np.asarray(table[ids], np.float32)).to(
            torch.bfloat16 if dtype == jnp.bfloat16 else torch.float32
        )
        theirs = (words * torch.tensor(scale).to(words.dtype)).float().numpy()
        np.testing.assert_array_equal(np.asarray(out.hidden_states[0], np.float32), theirs)
        assert float(torch.tensor(scale).to(words.dtype)) == rounded


@pytest.mark.parametrize(
    ("name", "scan"), [("gemma", False), ("gemma2", True), ("gemma3_text", True)]
)
def test_cached_decoding(name, scan):
    model, variables = fmjax.create(
        name, "tiny", head="causal_lm", rng=jax.random.key(0), scan=scan
    )
    check_decoding(model, shuffled(variables))


def test_published_sizes():
    check_sizes(gemma, dict.fromkeys(gemma.VARIANTS, "GemmaModel"))
    check_sizes(gemma2, dict.fromkeys(gemma2.VARIANTS, "Gemma2Model"))
    check_sizes(gemma3_text, dict.fromkeys(gemma3_text.VARIANTS, "Gemma3TextModel"))


def test_config_defaults_are_transformers_defaults():
    kinds = {k: ("sliding_attention",) * k + ("full_attention",) for k in (1, 5)}
    check_defaults(gemma)
    check_defaults(gemma2, layer_types=kinds[1] * 13)
    check_defaults(gemma3_text, layer_types=kinds[5] * 4 + ("sliding_attention",) * 2)


def test_hub_files_are_read_as_transformers_reads_them():
    """Two names of the activation, of which "gelu" is the tanh; a pattern for layer types."""
    for data, act in [
        ({"hidden_act": "gelu", "hidden_activation": None}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "relu"}, "relu"),
        ({"hidden_act": "relu"}, "relu"),
    ]:
        assert parse_config(gemma.Config, data, gemma.FIXED).act == act
        if data.get("hidden_activation") is None:
            assert transformers.GemmaConfig(**data).hidden_act == act
    data = {"num_hidden_layers": 7, "sliding_window_pattern": 3, "rope_local_base_freq": 1e4}
    ours = parse_config(gemma3_text.Config, data, gemma3_text.FIXED)
    theirs = transformers.Gemma3TextConfig(**data)
    assert ours.sliding == tuple(kind == "sliding_attention" for kind in theirs.layer_types)
    again = parse_config(gemma3_text.Config, theirs.to_dict(), gemma3_text.FIXED)
    assert again == dataclasses.replace(ours, layer_types=tuple(theirs.layer_types))


def test_bidirectional_models_see_the_future_and_do_not_decode():
    config = dataclasses.replace(THREE, **BIDIRECTIONAL)
    model, variables = fmjax.create("gemma3_text", config, rng=jax.random.key(0))
    run = jax.jit(lambda v, **kw: model.apply(v, **kw).last_hidden_state)
    ids = np.array([[3, 4, 5, 6]])
    bare = run(variables, input_ids=ids)
    assert_near(run(variables, input_ids=ids, attention_mask=np.ones((1, 4))), bare, "mask")
    changed = run(variables, input_ids=np.array([[3, 4, 5, 7]]))
    assert np.abs(changed[0, 0] - bare[0, 0]).max() > 1e-4
    with pytest.raises(ValueError, match="drop the cache"):
        model.apply(variables, input_ids=ids, cache=model.init_cache(1, 8))


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        (gemma, {"hidden_activation": "sin"}, "'sin' is not one of"),
        (gemma2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 must be positive"),
        (gemma2, {"sliding_window": None}, "layers slide, but there is no sliding_window"),
        (
            gemma3_text,
            {"rope_local_base_freq": 0.5, "sliding_window_pattern": 0},
            "rope_local_base_freq=0.5.*sliding_window_pattern=0",
        ),
    ],
)
def test_bad_configs_are_refused(family, change, words):
    with pytest.raises(ValueError, match=words):
        family.Config(**change)
