"""Mixtral against transformers' PyTorch Mixtral, from the same configs and weights."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from parity import (
    assert_near,
    check_decoding,
    check_defaults,
    check_head,
    check_sizes,
    shuffled,
    text_inputs,
    torch_twin,
)

import fmjax
from fmjax.models import mixtral

CONFIG = mixtral.Config(
    vocab_size=51, hidden_size=30, intermediate_size=20, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, head_dim=4, max_position_embeddings=32,
    num_local_experts=5, pad_token_id=2, id2label=("a", "b", "c"),
)  # fmt: skip
CASES = [
    ("model", {"sliding_window": 4}),
    ("causal_lm", {"tie_word_embeddings": True, "num_experts_per_tok": 3}),
    # Heads are the same after one layer.
    ("sequence_classification", {"num_experts_per_tok": 1, "num_hidden_layers": 1}),
    ("token_classification", {"num_hidden_layers": 1, "head_dim": 8}),
    ("question_answering", {"id2label": ("LABEL_0", "LABEL_1"), "num_hidden_layers": 1}),
]


@pytest.mark.parametrize(("head", "change"), CASES)
def test_equals_pytorch(head, change, tmp_path):
    config = dataclasses.replace(CONFIG, **change)
    check_head(mixtral, config, head, tmp_path, text_inputs(config, head, pad_id=2))


def test_router_logits_equal_pytorch(tmp_path):
    twin = torch_twin(mixtral, CONFIG, "causal_lm")
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    inputs = text_inputs(CONFIG, "causal_lm", pad_id=2)
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    theirs = twin(**tensors, output_router_logits=True).router_logits
    run = jax.jit(lambda v: model.apply(v, **inputs, output_router_logits=True))
    for ours, reference in zip(run(variables).router_logits, theirs, strict=True):
        assert_near(ours, reference.detach(), "router logits")
    assert jax.eval_shape(lambda: model.apply(variables, **inputs)).router_logits is None
    asking = model.clone(config=dataclasses.replace(CONFIG, output_router_logits=True))
    assert len(jax.eval_shape(lambda: asking.apply(variables, **inputs)).router_logits) == 2


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding(scan):
    model, variables = fmjax.create(
        "mixtral", "tiny", head="causal_lm", rng=jax.random.key(0), scan=scan
    )
    check_decoding(model, shuffled(variables))


def test_the_router_jitters_in_training_alone():
    model, variables = fmjax.create(
        "mixtral",
        dataclasses.replace(CONFIG, router_jitter_noise=0.2),
        rng=jax.random.key(0),
    )
    ids = np.array([[3, 4, 5]])
    run = jax.jit(
        lambda key, train: (
            model.apply(
                variables, input_ids=ids, train=train, rngs={"dropout": key}
            ).last_hidden_state
        ),
        static_argnums=1,
    )
    one, two = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(run(one, True), run(one, True))
    assert not np.array_equal(run(one, True), run(two, True))
    np.testing.assert_array_equal(run(one, False), run(two, False))


def test_published_sizes():
    check_sizes(mixtral, dict.fromkeys(mixtral.VARIANTS, "MixtralModel"))


def test_config_defaults_are_transformers_defaults():
    check_defaults(mixtral)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be between 1 and num_local_exp"),
        ({"router_jitter_noise": -0.1}, "router_jitter_noise=-0.1 must be at least 0"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        mixtral.Config(**change)
