"""Sharpness-aware minimisation: the gradient a step uphill."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import check_trains

import fmjax
from fmjax.methods.sharpness_aware import sharpness_aware
from fmjax.tasks import sequence_classification as task
from fmjax.train import accumulate, gradient
from fmjax.types import Aux


def quadratic(variables, batch, rng):
    """Half of ``w A w``, whose gradient is ``A w``."""
    w = variables["params"]["w"]
    return 0.5 * w @ batch["matrix"][0] @ w, Aux(jnp.ones(()), {}, {})


MATRIX = np.array([[3.0, 1.0], [1.0, 2.0]], np.float32)
W = np.array([1.0, -2.0], np.float32)


@pytest.mark.parametrize("adaptive", [False, True])
def test_it_is_the_gradient_uphill(adaptive):
    grad_fn = sharpness_aware(gradient(quadratic), rho=0.1, adaptive=adaptive)
    trainable = {"params": {"w": jnp.asarray(W)}}
    grads, loss, _ = grad_fn(trainable, {}, {"matrix": MATRIX[None]}, None)
    size = np.abs(W) if adaptive else np.ones(2)
    g = MATRIX @ W
    near = W + 0.1 * size**2 * g / np.linalg.norm(size * g)
    np.testing.assert_allclose(grads["params"]["w"], MATRIX @ near, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.5 * W @ MATRIX @ W)


def test_at_no_distance_and_where_it_is_flat():
    trainable = {"params": {"w": jnp.asarray(W)}}
    batch = {"matrix": MATRIX[None]}
    plain = gradient(quadratic)(trainable, {}, batch, None)[0]
    same = sharpness_aware(gradient(quadratic), rho=0.0)(trainable, {}, batch, None)[0]
    chex.assert_trees_all_equal(plain, same)
    flat = {"params": {"w": jnp.zeros(2)}}
    grads = sharpness_aware(gradient(quadratic))(flat, {}, batch, None)[0]
    np.testing.assert_array_equal(grads["params"]["w"], np.zeros(2))
    with pytest.raises(ValueError, match="rho is -1"):
        sharpness_aware(gradient(quadratic), rho=-1)


@pytest.mark.slow
def test_it_trains_in_pieces_with_frozen_layers(tmp_path):
    model, variables = fmjax.create(
        "vit", "tiny", head="image_classification", rng=jax.random.key(0)
    )
    size = model.config.image_size
    rows, columns = size if isinstance(size, tuple) else (size, size)
    rng = np.random.default_rng(0)
    labels = np.arange(8) % len(model.config.id2label)
    noise = rng.normal(size=(8, rows, columns, model.config.num_channels))
    batch = {
        "pixel_values": (noise + labels[:, None, None, None]).astype(np.float32),
        "labels": labels,
        "weight": np.ones(8, np.float32),
    }
    check_trains(
        variables,
        task.loss(model),
        optax.adam(1e-2),
        batch,
        steps=12,
        is_trainable=lambda path: "layers_0" in path or "head" in path,
        differentiate=lambda loss: sharpness_aware(accumulate(gradient(loss), 2)),
        folder=tmp_path / "checkpoints",
    )
