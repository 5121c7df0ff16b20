"""Evaluating again compiles nothing."""

import jax
import numpy as np
import pytest

import fmjax
from fmjax.models import bert, gpt2
from fmjax.tasks import causal_lm, token_classification
from fmjax.tasks.apply import once


@pytest.fixture
def traces(monkeypatch):
    """How often each family's model is traced."""
    counts = {"bert": 0, "gpt2": 0}

    def counting(module, name):
        original = module.Model.__call__

        def call(self, *args, **kwargs):
            counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(module.Model, "__call__", call)

    counting(bert, "bert")
    counting(gpt2, "gpt2")
    return counts


def test_a_second_evaluation_traces_nothing(traces):
    config = bert.Config(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    model, variables = fmjax.create(
        "bert", config, head="token_classification", rng=jax.random.key(0), num_labels=3
    )
    batch = {
        "input_ids": np.arange(8).reshape(2, 4), "attention_mask": np.ones((2, 4), int),
        "labels": np.ones((2, 4), int), "weight": np.ones(2), "index": np.arange(2),
    }  # fmt: skip
    token_classification.evaluate(model, variables, [batch], size=2)
    before = traces["bert"]
    token_classification.evaluate(model, variables, [batch], size=2)
    assert traces["bert"] == before > 0

    tiny = gpt2.Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model, variables = fmjax.create("gpt2", tiny, head="causal_lm", rng=jax.random.key(0))
    del batch["labels"]
    causal_lm.evaluate(model, variables, [batch])
    before = traces["gpt2"]
    causal_lm.evaluate(model, variables, [batch])
    assert traces["gpt2"] == before > 0


def test_once_tells_options_apart():
    def make(model, *, option=0):
        return lambda: (model, option)

    assert once(make, "a") is once(make, "a")
    assert once(make, "a", option=1)() == ("a", 1)
    assert once(make, "b")() == ("b", 0)
