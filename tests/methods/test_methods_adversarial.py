"""Attacks stay in their ball and raise the loss; training on them; moved embeddings."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import check_trains
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from made_up import made

import fmjax
from fmjax.methods.adversarial import Ball, attacked, fgsm, free_lb, pgd, trades
from fmjax.methods.sharpness_aware import sharpness_aware
from fmjax.nn.embed import Embed
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.pixels import normalised
from fmjax.train import gradient
from fmjax.types import Aux, Mean


def linear(variables, batch, rng):
    """A loss whose steepest direction is known: ``w x`` of each example."""
    values = batch["pixel_values"] @ variables["params"]["w"]
    mean = Mean.of(values, batch["weight"])
    return mean.value, Aux(mean.weight, {}, {})


W = np.array([2.0, -1.0, 0.5], np.float32)
LINEAR = {"params": {"w": jnp.asarray(W)}}
INPUTS = {
    "pixel_values": np.array([[0.5, 0.5, 0.5], [0.99, 0.0, 0.2]], np.float32),
    "weight": np.array([1.0, 3.0], np.float32),
}


def test_the_sign_of_the_gradient():
    attack = fgsm(linear, epsilon=0.1, low=0.0, high=1.0)
    changed = attack(LINEAR, INPUTS, None)["pixel_values"]
    np.testing.assert_allclose(
        changed, np.clip(INPUTS["pixel_values"] + 0.1 * np.sign(W), 0, 1), rtol=1e-6
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_reach_the_worst_of_the_ball(norm):
    attack = jax.jit(pgd(linear, epsilon=0.2, step_size=0.1, steps=30, norm=norm))
    changed = attack(LINEAR, INPUTS, jax.random.key(0))["pixel_values"]
    worst = np.sign(W) if norm == "linf" else W / np.linalg.norm(W)
    np.testing.assert_allclose(changed, INPUTS["pixel_values"] + 0.2 * worst, atol=1e-5)


@given(st.sampled_from(["linf", "l2"]), st.floats(0.01, 2.0), st.integers(0, 2**31 - 1))
def test_what_is_drawn_and_projected_is_inside(norm, epsilon, seed):
    ball = Ball(norm, epsilon, 0.0, 1.0)
    rng = np.random.default_rng(seed)
    clean = rng.uniform(0, 1, (4, 3, 2)).astype(np.float32)
    far = clean + rng.normal(size=clean.shape).astype(np.float32) * 3
    for x in (ball.drawn(jax.random.key(seed), clean), ball.projected(far, clean)):
        change = np.abs(np.asarray(x) - clean).reshape(4, -1)
        size = change.max(1) if norm == "linf" else np.linalg.norm(change, axis=1)
        assert (size <= epsilon * 1.00001).all()
        assert x.min() >= 0
        assert x.max() <= 1


def pictures():
    """A tiny CNN and a batch of noise that it can learn by heart, the last row padding."""
    model, variables = fmjax.create(
        "cnn", "tiny", head="image_classification", rng=jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    batch = {
        "pixel_values": rng.uniform(size=(8, 8, 8, 1)).astype(np.float32),
        "labels": np.arange(8) % 3,
        "weight": np.array([1.0] * 7 + [0.0], np.float32),
    }
    return model, variables, batch


def test_attacks_raise_a_nets_loss_and_nothing_else_changes():
    model, variables, batch = pictures()
    loss = jax.jit(normalised(task.loss(model, train=False), [0.5], [0.3]))
    clean = loss(variables, batch, None)[0]
    sizes = {"epsilon": 0.1, "low": 0.0, "high": 1.0}
    one = fgsm(loss, **sizes)(variables, batch, None)
    many = jax.jit(pgd(loss, step_size=0.02, steps=10, **sizes))(
        variables, batch, jax.random.key(0)
    )
    once, often = (loss(variables, changed, None)[0] for changed in (one, many))
    assert clean < once <= often * 1.001
    np.testing.assert_array_equal(many["labels"], batch["labels"])
    same = pgd(loss, epsilon=0.0, step_size=0.1, steps=2)(variables, batch, jax.random.key(0))
    np.testing.assert_array_equal(same["pixel_values"], batch["pixel_values"])
    # An attack is no path for the gradient of training.
    robust = attacked(loss, fgsm(loss, **sizes))
    fixed = jax.grad(lambda v: loss(v, one, None)[0])(variables)
    through = jax.grad(lambda v: robust(v, batch, None)[0])(variables)
    chex.assert_trees_all_close(fixed, through, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_training_on_attacks(tmp_path):
    model, variables, batch = pictures()
    attack = pgd(task.loss(model, train=False), epsilon=0.05, step_size=0.03, steps=2)
    check_trains(
        variables,
        attacked(task.loss(model), attack),
        optax.adam(1e-2),
        batch,
        is_trainable=lambda path: "head" in path or "dense" in path,
        differentiate=lambda loss: sharpness_aware(gradient(loss)),
        folder=tmp_path / "checkpoints",
        steps=12,
    )


def test_trades():
    model, variables, batch = pictures()
    variables = jax.tree.map(lambda x: 3 * x, variables)  # new weights say the same of everything
    sizes = {"epsilon": 0.1, "step_size": 0.05, "steps": 3, "low": 0.0, "high": 1.0}
    loss = task.loss(model)
    rng = jax.random.key(3)
    whole, aux = trades(model, loss, beta=6.0, **sizes)(variables, batch, rng)
    plain, _ = trades(model, loss, beta=0.0, **sizes)(variables, batch, rng)
    np.testing.assert_allclose(whole, plain + 6 * aux.metrics["divergence"].value, rtol=1e-5)
    np.testing.assert_allclose(
        plain, loss(variables, batch, jax.random.split(rng)[1])[0], rtol=1e-6
    )
    assert aux.metrics["divergence"].value > 0
    assert aux.metrics["divergence"].weight == 7
    assert model.config.dropout
    del batch["weight"]  # all rows count
    still = trades(model, loss, **(sizes | {"epsilon": 0.0}))(variables, batch, rng)[1]
    divergence = still.metrics["divergence"]
    assert divergence.total == 0, "both passes drop the same units"
    assert divergence.weight == 8


def sentences(family="bert"):
    model, variables = made(family, "sequence_classification")
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": rng.integers(0, 10, (6, 5)) + 9 * (np.arange(6) % 2)[:, None],
        "attention_mask": np.array([[1, 1, 1, 1, 1]] * 5 + [[1, 1, 1, 0, 0]]),
        "labels": np.arange(6) % 2,
        "weight": np.ones(6, np.float32),
    }
    return model, variables, batch


TABLE = "params/embed/word/embedding"


class Words(nn.Module):
    """Word vectors, scaled as some families do it, and three numbers made of them."""

    @nn.compact
    def __call__(self, ids):
        return jnp.sin(3.0 * Embed(19, 3, name="word")(ids)).sum(axis=1)


def test_moves_are_of_scaled_vectors_too():
    model, batch = Words(), {"input_ids": np.arange(6).reshape(2, 3), "weight": np.ones(2)}
    variables = model.init(jax.random.key(0), batch["input_ids"])

    def loss(variables, batch, rng):
        pixels = model.apply(variables, batch["input_ids"])
        return linear(LINEAR, {**batch, "pixel_values": pixels}, rng)

    def passes(**options):
        moving = free_lb(loss, table="params/word/embedding", steps=1, **options)
        return jax.jit(moving)(variables, {}, batch, jax.random.key(0))

    plain, still = gradient(loss)(variables, {}, batch, None), passes(step_size=0.0, initial=0.0)
    chex.assert_trees_all_close(plain[:2], still[:2], rtol=1e-5)
    assert abs(passes(initial=0.1)[1] - plain[1]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma", "bert"])
def test_unmoved_embeddings_have_the_plain_gradient(family):
    """Where word vectors are scaled, as Gemma's, and where they are not."""
    model, variables, batch = sentences(family)
    loss = task.loss(model, train=False)
    rng = jax.random.key(0)
    plain = gradient(loss)(variables, {}, batch, rng)
    still = free_lb(loss, table=TABLE, step_size=0.0, initial=0.0, steps=2)
    same = jax.jit(still)(variables, {}, batch, rng)
    chex.assert_trees_all_close(plain[0], same[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(plain[1], same[1], rtol=1e-6)
    chex.assert_trees_all_close(plain[2].metrics, same[2].metrics)


@pytest.mark.slow
def test_moved_embeddings_have_a_higher_loss():
    model, variables, batch = sentences()
    loss = task.loss(model, train=False)
    rng = jax.random.key(0)
    losses = [
        float(jax.jit(free_lb(loss, table=TABLE, step_size=size, initial=0.0, epsilon=limit))(
            variables, {}, batch, rng)[1])
        for size, limit in ((0.0, 0.0), (0.5, 0.1), (0.5, 0.0))
    ]  # fmt: skip
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.slow
def test_moved_embeddings_train(tmp_path):
    model, variables, batch = sentences()
    check_trains(
        variables,
        task.loss(model, train=False),
        optax.adam(1e-2),
        batch,
        is_trainable=lambda path: path.startswith("params/") and "layers_0" not in path,
        differentiate=lambda loss: free_lb(loss, table=TABLE),
        folder=tmp_path / "checkpoints",
        steps=16,
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pgd(linear, epsilon=-1, step_size=1, steps=0, norm="l1"), "l1.*epsilon.*steps=0"),
        (lambda: fgsm(linear, epsilon=0.1, low=1.0, high=0.0), "low=1.0"),
        (lambda: trades(None, linear, beta=-1, epsilon=1, step_size=1, steps=1), "beta=-1"),
        (lambda: free_lb(linear, table="x", steps=0), "steps=0"),
        (lambda: pgd(linear, epsilon=1, step_size=1, steps=1)(LINEAR, INPUTS, None), "key"),
        (lambda: fgsm(linear, epsilon=1, name="x")(LINEAR, INPUTS, None), "no 'x'"),
        (
            lambda: fgsm(linear, epsilon=1)(
                LINEAR, {"pixel_values": np.zeros((1, 3), np.uint8)}, None
            ),
            "uint8",
        ),
        (
            lambda: free_lb(linear, table="params/none")(
                LINEAR, {}, {"input_ids": np.zeros((1, 2), int)}, jax.random.key(0)
            ),
            "params/none",
        ),
        (
            lambda: free_lb(linear, table="params/w")(
                LINEAR, {}, INPUTS | {"input_ids": np.zeros((2, 3), int)}, jax.random.key(0)
            ),
            "nothing moves",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said):
        call()
