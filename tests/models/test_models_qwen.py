"""Qwen2 and Qwen3 against transformers' PyTorch classes, from the same configs and weights."""

import dataclasses

import jax
import pytest
from parity import (
    check_decoding,
    check_defaults,
    check_head,
    check_sizes,
    shuffled,
    text_inputs,
)

import fmjax
from fmjax.models import qwen2, qwen3
from fmjax.nn.position import RopeScaling

FULL = ("full_attention",) * 2
MIXED = ("full_attention", "sliding_attention")
CONFIG2 = qwen2.Config(
    vocab_size=51, hidden_size=36, intermediate_size=44, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=32,
    sliding_window=None, layer_types=FULL, pad_token_id=2, id2label=("a", "b", "c"),
)  # fmt: skip
CONFIG3 = qwen3.Config(
    **dataclasses.asdict(dataclasses.replace(CONFIG2, hidden_size=30, head_dim=4))
)
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED}
# Heads are the same after one layer.
SHORT = {"num_hidden_layers": 1, "layer_types": FULL[:1]}
TWO_LABELS = SHORT | {"id2label": ("LABEL_0", "LABEL_1")}
SCALED = {"rope_scaling": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=8)}
CASES = [
    (qwen2, "model", CONFIG2, SLIDING),
    (qwen2, "causal_lm", CONFIG2, {"tie_word_embeddings": True} | SCALED),
    (qwen2, "sequence_classification", CONFIG2, SHORT),
    (qwen2, "token_classification", CONFIG2, SHORT | {"head_dim": 8}),
    (qwen2, "question_answering", CONFIG2, TWO_LABELS),
    (qwen3, "model", CONFIG3, SLIDING),
    (qwen3, "causal_lm", CONFIG3, {"tie_word_embeddings": True}),
    (qwen3, "sequence_classification", CONFIG3, SHORT | {"attention_bias": True}),
    (qwen3, "token_classification", CONFIG3, SHORT | {"head_dim": 8}),
    (qwen3, "question_answering", CONFIG3, TWO_LABELS),
]


@pytest.mark.parametrize(
    ("family", "head", "config", "change"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_equals_pytorch(family, head, config, change, tmp_path):
    config = dataclasses.replace(config, **change)
    check_head(family, config, head, tmp_path, text_inputs(config, head, pad_id=2))


@pytest.mark.parametrize(("name", "scan"), [("qwen2", True), ("qwen3", False)])
def test_cached_decoding(name, scan):
    model, variables = fmjax.create(
        name, "tiny", head="causal_lm", rng=jax.random.key(0), scan=scan
    )
    check_decoding(model, shuffled(variables))


def test_published_sizes():
    check_sizes(qwen2, dict.fromkeys(qwen2.VARIANTS, "Qwen2Model"))
    check_sizes(qwen3, dict.fromkeys(qwen3.VARIANTS, "Qwen3Model"))


@pytest.mark.parametrize("family", [qwen2, qwen3])
def test_config_defaults_are_transformers_defaults(family):
    check_defaults(family, sliding_window=None, layer_types=("full_attention",) * 32)


@pytest.mark.parametrize("family", [qwen2, qwen3])
def test_windows_begin_at_max_window_layers(family):
    config = family.Config(num_hidden_layers=3, max_window_layers=2, use_sliding_window=True)
    assert config.sliding == (False, False, True)
    assert family.Config(num_hidden_layers=3, max_window_layers=0).sliding == (False,) * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": FULL}, "layer_types has 2 entries for num_hidden_layers=32"),
        ({"layer_types": ("chunked",) * 32}, "layer_types has .'chunked'.; known are"),
        ({"layer_types": ("sliding_attention",) * 32}, "there is no sliding_window"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        qwen2.Config(**change)
