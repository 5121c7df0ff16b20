"""OLMo 2 against transformers' PyTorch OLMo 2, from the same configs and weights."""

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
from fmjax.models import olmo2
from fmjax.nn.position import RopeScaling

CONFIG = olmo2.Config(
    vocab_size=51, hidden_size=36, intermediate_size=44, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=2,
    id2label=("a", "b", "c"),
)  # fmt: skip
CASES = [
    ("model", {"attention_bias": True, "num_key_value_heads": 6}),
    ("causal_lm", {"tie_word_embeddings": True, "rope_scaling": RopeScaling("linear", factor=2)}),
    ("sequence_classification", {"head_dim": 8, "num_hidden_layers": 1}),
]


@pytest.mark.parametrize(("head", "change"), CASES)
def test_equals_pytorch(head, change, tmp_path):
    config = dataclasses.replace(CONFIG, **change)
    check_head(olmo2, config, head, tmp_path, text_inputs(config, head, pad_id=2))


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding(scan):
    model, variables = fmjax.create(
        "olmo2", "tiny", head="causal_lm", rng=jax.random.key(0), scan=scan
    )
    check_decoding(model, shuffled(variables))


def test_published_sizes():
    check_sizes(olmo2, dict.fromkeys(olmo2.VARIANTS, "Olmo2Model"))


def test_config_defaults_are_transformers_defaults():
    check_defaults(olmo2, num_key_value_heads=32)


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="olmo2 config: pad_token_id=50304 is outside"):
        olmo2.Config(pad_token_id=50304)
