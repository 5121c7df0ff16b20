"""Norms: what moves and what is trained, and gradients below float32; of activations too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.nn.activation import activation
from fmjax.nn.norm import BatchNorm, FrozenBatchNorm, RMSNorm, layer_norm

X = np.random.default_rng(0).normal(1.0, 2.0, size=(4, 5, 3)).astype(np.float32)


def test_nothing_of_it_is_trained():
    variables = FrozenBatchNorm(train=True).init(jax.random.key(0), X)
    assert variables.keys() == {"batch_stats"}
    assert variables["batch_stats"].keys() == {"scale", "bias", "mean", "variance"}


@pytest.mark.parametrize("moving", [False, True])
def test_statistics_move_only_where_that_is_asked(moving):
    layer = FrozenBatchNorm(train=True, moving=moving)
    before = {
        "scale": jnp.array([1.0, 2.0, 3.0]), "bias": jnp.array([0.0, 1.0, -1.0]),
        "mean": jnp.array([0.5, 0.0, -0.5]), "variance": jnp.array([1.0, 2.0, 0.5]),
    }  # fmt: skip
    out, after = layer.apply({"batch_stats": before}, X, mutable=["batch_stats"])
    affine = {name: before[name] for name in ("scale", "bias")}
    rest = {name: before[name] for name in ("mean", "variance")}
    like = BatchNorm(train=moving)
    statistics = {"params": affine, "batch_stats": rest | {"count": jnp.array(0)}}
    expected, moved = like.apply(statistics, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(out, expected)
    for name in rest:
        np.testing.assert_array_equal(after["batch_stats"][name], moved["batch_stats"][name])
        assert (after["batch_stats"][name] != before[name]).any() == moving
    for name in affine:
        np.testing.assert_array_equal(after["batch_stats"][name], before[name])


def _gradients(fn, arguments, cotangent):
    value, pull_back = jax.vjp(fn, *arguments)
    return value, pull_back(cotangent.astype(value.dtype))


def _close_to_float32(fn, arguments, tolerance):
    """`fn` and its gradients at bfloat16 arguments, beside those of the same values in float32."""
    cotangent = jax.random.normal(jax.random.key(9), arguments[0].shape).astype(jnp.bfloat16)
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), arguments)
    low, exact = _gradients(fn, arguments, cotangent), _gradients(fn, wide, cotangent)
    assert jax.tree.structure(low) == jax.tree.structure(exact)
    for one, other in zip(jax.tree.leaves(low), jax.tree.leaves(exact), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(one, np.float32), other, rtol=0, atol=tolerance * float(jnp.abs(other).max())
        )


@pytest.mark.parametrize("form", ["layer", "no bias", "plain", "root mean square"])
def test_norms_below_float32_have_float32s_gradients_but_for_rounding(form):
    x, scale, bias = (
        (shift + jax.random.normal(jax.random.key(seed), shape)).astype(jnp.bfloat16)
        for seed, shift, shape in ((0, 2.0, (3, 5, 32)), (1, 1.0, (32,)), (2, 0.0, (32,)))
    )
    if form == "layer":
        _close_to_float32(lambda *args: layer_norm(*args, 1e-5), (x, scale, bias), 2**-8)
    elif form == "no bias":
        _close_to_float32(lambda x, scale: layer_norm(x, scale, None, 1e-5), (x, scale), 2**-8)
    elif form == "plain":
        _close_to_float32(lambda x: layer_norm(x, None, None, 1e-5), (x,), 2**-8)
    else:
        norm = RMSNorm(1e-6)
        _close_to_float32(
            lambda x, scale: norm.apply({"params": {"scale": scale}}, x), (x, scale), 2**-8
        )


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "quick_gelu", "silu", "mish"])
def test_activations_below_float32_are_float32s_but_for_rounding(name):
    x = (3 * jax.random.normal(jax.random.key(0), (4, 64))).astype(jnp.bfloat16)
    _close_to_float32(activation(name), (x,), 2**-8)


def test_a_smooth_activation_keeps_its_input_alone():
    x = jnp.ones((4, 64), jnp.bfloat16)
    (kept,) = jax.tree.leaves(jax.vjp(activation("gelu_new"), x)[1])
    assert (kept.shape, kept.dtype) == (x.shape, x.dtype)


def test_batch_norm_below_float32_has_float32s_gradients_but_for_rounding():
    x = (30.0 + jax.random.normal(jax.random.key(0), (6, 5, 4, 8))).astype(jnp.bfloat16)
    scale, bias = (
        jax.random.normal(jax.random.key(seed), (8,)).astype(jnp.bfloat16) for seed in (1, 2)
    )
    norm = BatchNorm(train=True)
    moving = {"batch_stats": norm.init(jax.random.key(0), x)["batch_stats"]}

    def fn(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, **moving}
        return norm.apply(variables, x, mutable=["batch_stats"])[0]

    _close_to_float32(fn, (x, scale, bias), 2**-7)
    moved = norm.apply(
        {"params": {"scale": scale, "bias": bias}, **moving}, x, mutable=["batch_stats"]
    )[1]["batch_stats"]
    wide = np.asarray(x, np.float64).reshape(-1, 8)
    np.testing.assert_allclose(moved["mean"], 0.1 * wide.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moved["variance"], 0.9 + 0.1 * wide.var(0, ddof=1), rtol=1e-5)


def test_batch_norm_of_one_value_a_channel_that_a_mask_leaves():
    x, norm = jnp.array([[4.0], [100.0]]), BatchNorm(train=True)
    variables = norm.init(jax.random.key(0), x)
    y, moved = norm.apply(variables, x, jnp.array([1, 0]), mutable=["batch_stats"])
    assert float(y[0, 0]) == 0.0
    np.testing.assert_allclose(moved["batch_stats"]["mean"], 0.4, rtol=1e-6)
    np.testing.assert_allclose(moved["batch_stats"]["variance"], 0.9, rtol=1e-6)
