"""Episodes, prototypes, and weights from which a few steps suffice."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import check_trains

import fmjax
from fmjax.data.columns import Columns, Ragged
from fmjax.data.episodes import episodes
from fmjax.methods.few_shot import adapt, maml, prototypical, reptile
from fmjax.methods.sharpness_aware import sharpness_aware
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.feature_extraction import encoder
from fmjax.train import accumulate, gradient
from fmjax.types import Aux


def pictures(count=36, classes=4):
    """Gray squares of noise around a picture of each class."""
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(classes, 8, 8, 1))
    labels = np.arange(count) % classes
    pixels = kinds[labels] + 0.3 * rng.normal(size=(count, 8, 8, 1))
    return Columns((), {"pixel_values": pixels.astype(np.float32), "labels": labels})


def test_episodes():
    data = pictures()
    make = lambda: episodes(data, ways=3, shots=2, queries=4, tasks=5, seed=1)  # noqa: E731
    stream = make()
    first, second = next(stream), next(stream)
    assert first["support/pixel_values"].shape == (5, 6, 8, 8, 1)
    assert first["query/labels"].shape == (5, 12)
    for batch in (first, second):
        for one in range(5):
            kinds = {}
            rows = np.concatenate([batch[f"{p}/index"][one] for p in ("support", "query")])
            assert len(set(rows.tolist())) == 18
            for part, each in (("support", 2), ("query", 4)):
                labels = batch[f"{part}/labels"][one]
                np.testing.assert_array_equal(np.bincount(labels), [each] * 3)
                for row, label in zip(batch[f"{part}/index"][one], labels, strict=True):
                    assert (
                        kinds.setdefault(label, data.fixed["labels"][row])
                        == (data.fixed["labels"][row])
                    )
            assert len(set(kinds.values())) == 3
    again = make()
    next(again)
    state = again.get_state()
    other = make()
    other.set_state(state)
    chex.assert_trees_all_equal(next(other), second)
    held_out = next(episodes(data, ways=2, shots=1, queries=1, classes=[1, 3]))
    assert set(data.fixed["labels"][held_out["query/index"]].ravel()) == {1, 3}


def test_prototypes_are_means():
    """Two-dimensional vectors, by hand."""

    def encode(variables, batch, rng, *, train):
        return batch["x"] * variables["params"]["w"], {}

    x = np.array([[[0, 0], [0, 2], [4, 0], [4, 2]]], np.float32)
    batch = {
        "support/x": x,
        "support/labels": np.array([[0, 0, 1, 1]]),
        "query/x": np.array([[[1.0, 1.0], [3.5, 1.0]]], np.float32),
        "query/labels": np.array([[0, 0]]),
        "query/weight": np.array([[1.0, 3.0]], np.float32),
    }
    loss, aux = prototypical(encode, 2)({"params": {"w": jnp.ones(2)}}, batch, None)
    distances = np.array([[1.0, 9.0], [3.5**2, 0.25]])
    losses = distances[:, 0] + np.log(np.exp(-distances).sum(1))
    np.testing.assert_allclose(loss, losses @ [0.25, 0.75], rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["accuracy"].value, 0.25)
    assert aux.weight == 4


def quadratic(variables, batch, rng):
    """``a / 2 (w - b)^2``, a and b the batch's first numbers."""
    w = variables["params"]["w"]
    a, b = batch["x"][0]
    return 0.5 * a * jnp.square(w - b), Aux(jnp.ones(()), {}, {})


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_differentiates_through_its_steps(first_order):
    """Of a quadratic, w' = w - rate * a (w - b) in each step, and dw'/dw = 1 - rate * a."""
    support, query = np.array([[2.0, 1.0]]), np.array([[3.0, -1.0]])
    batch = {
        "support/x": support[None], "support/labels": np.zeros((1, 1)),
        "query/x": query[None], "query/labels": np.zeros((1, 1)),
    }  # fmt: skip
    loss = maml(quadratic, inner_rate=0.1, inner_steps=2, first_order=first_order)
    grads = jax.grad(lambda w: loss({"params": {"w": w}}, batch, None)[0])(jnp.float32(0.5))
    w = 0.5
    for _ in range(2):
        w = w - 0.1 * 2.0 * (w - 1.0)
    slope = 1.0 if first_order else (1 - 0.1 * 2.0) ** 2
    np.testing.assert_allclose(grads, 3.0 * (w + 1.0) * slope, rtol=1e-5)


def test_no_steps_are_plain_training_and_one_head_adapts_alone():
    model, variables = fmjax.create(
        "cnn", "tiny", head="image_classification", rng=jax.random.key(0)
    )
    loss = task.loss(model, train=False)
    batch = next(episodes(pictures(), ways=2, shots=2, queries=3, tasks=2))
    query = {name: batch[f"query/{name}"] for name in ("pixel_values", "labels", "weight")}
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in query.items()}
    plain, aux = loss(variables, flat, None)
    meta, meta_aux = maml(loss, inner_rate=0.1, inner_steps=0)(variables, batch, None)
    np.testing.assert_allclose(meta, plain, rtol=1e-5)
    np.testing.assert_allclose(meta_aux.metrics["accuracy"], aux.metrics["accuracy"])
    support = {name: batch[f"support/{name}"][0] for name in ("pixel_values", "labels")}
    adapted = adapt(
        loss, variables, support, None, rate=0.5, steps=3, adapts=lambda path: "head" in path
    )
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), adapted["params"], variables["params"])
    assert all(jax.tree.leaves(moved.pop("head")))
    assert not any(jax.tree.leaves(moved))
    with pytest.raises(ValueError, match="none of the"):
        adapt(loss, variables, support, None, rate=0.5, steps=1, adapts=lambda path: False)


def test_reptile_is_the_mean_way():
    """One step of SGD on each task: the mean of their gradients, times the inner rate."""
    trainable = {"params": {"w": jnp.float32(0.5)}}
    x = np.array([[2.0, 1.0], [3.0, -1.0]], np.float32)
    batch = {"x": x[:, None, None], "weight": np.ones((2, 1, 1), np.float32)}
    grads, _, _ = reptile(quadratic, optax.sgd(0.1), tasks_at_once=2)(
        trainable, {}, batch, jax.random.key(0)
    )
    expected = 0.1 * np.mean([2.0 * (0.5 - 1.0), 3.0 * (0.5 + 1.0)])
    np.testing.assert_allclose(grads["params"]["w"], expected, rtol=1e-5)


@pytest.mark.slow
def test_prototypes_train_with_other_methods(tmp_path):
    model, variables = fmjax.create("cnn", "tiny", head="model", rng=jax.random.key(0))
    batch = next(episodes(pictures(), ways=3, shots=2, queries=3, tasks=4))
    check_trains(
        variables,
        prototypical(encoder(model, pooling="mean"), 3),
        optax.adam(1e-2),
        batch,
        differentiate=lambda loss: sharpness_aware(accumulate(gradient(loss), 2)),
        folder=tmp_path / "checkpoints",
        steps=12,
    )


@pytest.mark.slow
def test_adapted_weights_train():
    config = fmjax.models.family_of("bert").Config(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8, id2label=("a", "b"),
    )  # fmt: skip
    model, variables = fmjax.create(
        "bert", config, head="sequence_classification", rng=jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    texts = [rng.integers(5 * label, 5 * label + 5, 4) for label in np.arange(24) % 3]
    data = Columns((Ragged.of({"input_ids": texts}, max_length=8),), {"labels": np.arange(24) % 3})
    batch = next(episodes(data, ways=2, shots=2, queries=2, tasks=4))
    loss = maml(task.loss(model, train=False), inner_rate=0.5, inner_steps=2, first_order=True)
    check_trains(variables, loss, optax.adam(1e-2), batch, steps=16)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: episodes(pictures(), ways=5, shots=9, queries=1), r"10 examples.*\{0: 9.*ways=5"),
        (lambda: episodes(pictures(), ways=1, shots=0, queries=1), "ways=1.*shots=0"),
        (
            lambda: episodes(Columns((), {"x": np.ones((2, 2))}), ways=2, shots=1, queries=1),
            r"int \[2\]",
        ),
        (lambda: prototypical(None, 1), "ways is 1"),
        (lambda: maml(quadratic, inner_rate=0.0, inner_steps=1), "inner_rate=0.0"),
        (lambda: maml(quadratic, inner_rate=1, inner_steps=1)({}, {"x": 1}, None), "support/"),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        call()
