"""What dense layers read from "adapters", against the formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.nn.adapter import adapted, column_norms
from fmjax.nn.dropout import dropout
from fmjax.nn.linear import Dense

DRAW = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(DRAW.normal(size=shape), jnp.float32)


X, KERNEL, BIAS = draw(4, 3, 5), draw(5, 7), draw(7)
LOW_RANK = {"down": draw(5, 2), "up": draw(2, 7), "scale": jnp.float32(1.5)}
AFTER = {"down": draw(7, 2), "down_bias": draw(2), "up": draw(2, 7), "up_bias": draw(7)}


def update(leaves):
    return leaves["scale"] * leaves["down"] @ leaves["up"]


def near(ours, reference):
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


def test_each_group_of_leaves():
    near(adapted(LOW_RANK, X, KERNEL, BIAS, None), X @ (KERNEL + update(LOW_RANK)) + BIAS)
    factors = {"in_scale": draw(5), "out_scale": draw(7)}
    expected = ((X * factors["in_scale"]) @ KERNEL + BIAS) * factors["out_scale"]
    near(adapted(factors, X, KERNEL, BIAS, None), expected)
    y = X @ KERNEL + BIAS
    hidden = jax.nn.relu(y @ AFTER["down"] + AFTER["down_bias"])
    expected = y + hidden @ AFTER["up"] + AFTER["up_bias"]
    near(adapted({"after": {"relu": AFTER}}, X, KERNEL, BIAS, None), expected)


def test_column_norms():
    near(column_norms(KERNEL, **LOW_RANK), jnp.linalg.norm(KERNEL + update(LOW_RANK), axis=0))
    opposite = {"down": KERNEL, "up": -jnp.eye(7), "scale": jnp.float32(1)}  # all cancels
    assert (column_norms(KERNEL, **opposite) < 2e-3).all()


def test_magnitude_with_and_without_dropout():
    leaves = {**LOW_RANK, "magnitude": jnp.abs(draw(7)), "dropout": jnp.float32(0.4)}
    weight = KERNEL + update(leaves)
    factor = leaves["magnitude"] / jnp.linalg.norm(weight, axis=0)
    near(adapted(leaves, X, KERNEL, BIAS, None), X @ (weight * factor) + BIAS)
    # As PEFT has it: the kernel's own product is whole, the rest is of dropped inputs.
    key = jax.random.key(3)
    x = dropout(key, X, 0.4)
    assert (x == 0).any()
    expected = X @ KERNEL + BIAS + (factor - 1) * (x @ KERNEL) + factor * (x @ update(leaves))
    near(adapted(leaves, X, KERNEL, BIAS, key), expected)


def test_lengths_are_constants_to_gradients():
    leaves = {**LOW_RANK, "magnitude": jnp.abs(draw(7))}
    cotangent = draw(4, 3, 7)
    factor = leaves["magnitude"] / column_norms(KERNEL, **LOW_RANK)

    def ours(up):
        return jnp.vdot(adapted({**leaves, "up": up}, X, KERNEL, None, None), cotangent)

    def expected(up):
        return jnp.vdot(X @ (KERNEL + update({**leaves, "up": up})) * factor, cotangent)

    near(jax.grad(ours)(leaves["up"]), jax.grad(expected)(leaves["up"]))


@pytest.mark.parametrize("rows", [2, 4])  # an example each, and windows of examples
def test_choice(rows):
    one = {**LOW_RANK, "magnitude": jnp.abs(draw(7)), "after": {"relu": AFTER}, "in_scale": draw(5)}
    other = jax.tree.map(lambda leaf: 1.3 * leaf, one)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other)
    y = adapted({**both, "choice": jnp.array([1, 0])}, X[:rows], KERNEL, BIAS, None)
    half = rows // 2
    near(y[:half], adapted(other, X[:half], KERNEL, BIAS, None))
    near(y[half:], adapted(one, X[half:rows], KERNEL, BIAS, None))


def test_each_choice_drops_at_its_own_rate():
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), LOW_RANK)
    both |= {"dropout": jnp.array([0.0, 0.9]), "choice": jnp.array([1, 1, 0, 0])}
    y = adapted(both, X, KERNEL, None, jax.random.key(0))
    whole = adapted(LOW_RANK, X, KERNEL, None, None)
    near(y[2:], whole[2:])
    assert np.abs(y[:2] - whole[:2]).max() > 0.1


def test_bad_adapters_are_refused():
    layer = Dense(7)
    params = {"params": {"kernel": KERNEL, "bias": BIAS}}
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), LOW_RANK)
    for adapters, message in (
        ({"dwon": X}, "dwon"),
        (both, "several adapters need a choice"),
        ({**both, "choice": jnp.zeros(3, int)}, "4 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.apply({**params, "adapters": adapters}, X)


def test_a_layer_without_adapters_is_as_before():
    layer, params = Dense(7), {"params": {"kernel": KERNEL, "bias": BIAS}}
    elsewhere = {**params, "adapters": {"other": LOW_RANK}}
    plain, beside = (jax.make_jaxpr(lambda v: layer.apply(v, X))(v) for v in (params, elsewhere))
    assert [str(x.primitive) for x in plain.eqns] == [str(x.primitive) for x in beside.eqns]
    half = jnp.bfloat16
    y = layer.apply({**params, "adapters": LOW_RANK}, X.astype(half))
    assert y.dtype == half
    np.testing.assert_allclose(
        y.astype(jnp.float32), X @ (KERNEL + update(LOW_RANK)) + BIAS, rtol=0.05, atol=0.15
    )
