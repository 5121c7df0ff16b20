"""Frozen batch normalisation: constants, and statistics that move where that is asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.nn.norm import BatchNorm, FrozenBatchNorm

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
