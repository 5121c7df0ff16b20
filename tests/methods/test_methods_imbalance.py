"""Losses for unequal classes against PyTorch's and the papers' formulas."""

import jax
import numpy as np
import optax
import pytest
import torch
from composition import check_trains

import fmjax
from fmjax.methods.imbalance import class_weighted, effective_number_weights, focal
from fmjax.tasks import sequence_classification as task
from fmjax.tasks import token_classification


def pictures():
    model, variables = fmjax.create(
        "cnn", "tiny", head="image_classification", rng=jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    batch = {
        "pixel_values": rng.normal(size=(8, 8, 8, 1)).astype(np.float32),
        "labels": np.array([0, 0, 0, 0, 0, 1, 2, 2]),
        "weight": np.array([1.0] * 7 + [0.0], np.float32),
    }
    return model, variables, batch


def test_weighted_classes_are_pytorchs():
    model, variables, batch = pictures()
    weights = effective_number_weights([5, 1, 2, *[9] * 7], beta=0.9)
    loss, aux = class_weighted(task.loss(model, train=False), weights)(variables, batch, None)
    logits = np.array(model.apply(variables, batch["pixel_values"], train=False).logits)
    wanted = torch.nn.functional.cross_entropy(
        torch.tensor(logits[:7]), torch.tensor(batch["labels"][:7]), torch.tensor(weights)
    )
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(aux.weight, weights[batch["labels"][:7]].sum(), rtol=1e-6)


def test_what_is_no_class_has_no_weight():
    labels = np.array([0, 1, 2, 7, -1, -100, 7])
    seen = class_weighted(lambda variables, batch, rng: batch["weight"], [1.0, 5.0])(
        {}, {"labels": labels, "weight": np.array([1.0] * 6 + [0.0])}, None
    )
    np.testing.assert_array_equal(seen, [1, 5, np.nan, np.nan, np.nan, 0, 0])


def test_effective_numbers():
    counts = [1, 10, 1000]
    np.testing.assert_allclose(effective_number_weights(counts, 0.0), 1)
    raw = np.array([(1 - 0.99) / (1 - 0.99**n) for n in counts])
    np.testing.assert_allclose(effective_number_weights(counts, 0.99), raw / raw.mean(), rtol=1e-6)
    inverse = 1 / np.array(counts)
    almost = effective_number_weights(counts, 1 - 1e-12)
    np.testing.assert_allclose(almost, inverse / inverse.mean(), rtol=1e-5)


def test_focal_is_its_formula_and_cross_entropy_at_0():
    model, variables, batch = pictures()
    plain = task.loss(model, train=False)(variables, batch, None)
    same = focal(model, gamma=0.0, train=False)(variables, batch, None)
    np.testing.assert_allclose(same[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(same[1].metrics["accuracy"], plain[1].metrics["accuracy"])
    logits = model.apply(variables, batch["pixel_values"], train=False).logits
    p = np.array(jax.nn.softmax(logits))[np.arange(7), batch["labels"][:7]]
    rows = {name: leaf[:7] for name, leaf in batch.items() if name != "weight"}  # all count
    value = focal(model, gamma=2.0, train=False)(variables, rows, None)[0]
    np.testing.assert_allclose(value, np.mean(-((1 - p) ** 2) * np.log(p)), rtol=1e-5)


@pytest.mark.slow
def test_focal_of_tokens():
    model, variables = fmjax.create(
        "bert", "tiny", head="token_classification", rng=jax.random.key(0)
    )
    batch = {
        "input_ids": np.random.default_rng(0).integers(0, 20, (2, 4)),
        "labels": np.array([[0, 1, -100, -100], [1, 1, 0, -100]]),
        "weight": np.ones(2, np.float32),
    }
    plain = token_classification.loss(model, train=False)(variables, batch, None)
    same = focal(model, gamma=0.0, train=False)(variables, batch, None)
    np.testing.assert_allclose(same[0], plain[0], rtol=1e-6)
    assert same[1].weight == plain[1].weight == 5


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_certain_examples_have_finite_gradients(gamma):
    model, variables, batch = pictures()
    variables["params"]["head"]["bias"] = variables["params"]["head"]["bias"].at[0].set(200.0)
    loss = focal(model, gamma=gamma, train=False)
    grads = jax.grad(lambda v: loss(v, batch, None)[0])(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_it_trains():
    model, variables, batch = pictures()
    weights = effective_number_weights([5, 1, 2, *[9] * 7], beta=0.9)
    loss = class_weighted(focal(model), weights)
    check_trains(variables, loss, optax.adam(1e-2), batch, steps=12)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: effective_number_weights([1, 0], 0.9), "each class"),
        (lambda: effective_number_weights([1, 2], 1.0), r"beta is 1\.0"),
        (lambda: class_weighted(lambda *_: None, [1.0, -1.0]), "at least 0"),
        (lambda: focal(None, gamma=-1), "gamma is -1"),
        (
            lambda: class_weighted(lambda *_: None, [1.0])(
                {}, {"labels": np.ones((2, 3)), "weight": np.ones(2)}, None
            ),
            "classes int",
        ),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said):
        call()
