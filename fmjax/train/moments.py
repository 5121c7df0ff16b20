"""An optimizer's moments in bfloat16: half of its memory, at the same losses."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.nn.dropout import random_bits
from fmjax.types import PyTree

Moments = Literal["float32", "bfloat16"]
"""As what an optimizer keeps its moments from one step to the next."""
# Those of Muon's iteration are in its state and no moments.
COEFFICIENTS = (jax.tree_util.GetAttrKey("ns_coeffs"),)


class RoundedState(NamedTuple):
    """The state of an optimizer, with its moments rounded.

    Args:
        count: steps done, int32 []; what rounding draws from.
        inner: the optimizer's own state.
    """

    count: Array
    inner: optax.OptState


def keep_moments(
    tx: optax.GradientTransformation, moments: Moments
) -> optax.GradientTransformation:
    """The optimizer, whose moments are kept in this precision and computed in float32.

    A moment moves by a share of ``1 - b`` a step: 0.1 of a first moment with b1 = 0.9, but 0.001 of
    a second one with b2 = 0.999. bfloat16 has 8 bits, and a step of less than 2^-9 is lost when it
    is rounded to the nearest: second moments would stay where they are, however gradients grow or
    shrink. Here they are rounded up or down at random with the chances that make the mean exact
    (stochastic rounding; Gupta et al. 2015, arXiv:1502.02551, section 3.2), so that they follow
    with a noise that the average itself damps. What is drawn depends on the number of the step
    alone: a run that is resumed draws the same.

    Args:
        tx: an optimizer whose state is moments; what of it is no array of floats, or a single
            number, is kept as it is. One that has weights in its state (averages of them,
            schedule-free optimizers) would have these rounded, too, by more than a step moves
            them: leave it, or what averages, outside of this.
        moments: "float32" is `tx` itself.

    Raises:
        ValueError: another precision.
    """
    if moments not in get_args(Moments):
        raise ValueError(f"moments={moments!r}; choose 'float32' or 'bfloat16'")
    if moments == "float32":
        return tx

    def init(params: PyTree) -> RoundedState:
        count = jnp.zeros((), jnp.int32)
        return RoundedState(count, _rounded(tx.init(params), count))

    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        updates, inner = tx.update(updates, _widened(state.inner), params, **extra)
        count = state.count + 1
        return updates, RoundedState(count, _rounded(inner, count))

    return optax.GradientTransformationExtraArgs(init, update)


def _widened(state: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state)


def _rounded(state: PyTree, count: Array) -> PyTree:
    key = jax.random.fold_in(jax.random.key(0), count)
    leaves, structure = jax.tree.flatten_with_path(state)
    done: list[Any] = [
        rounded_at_random(x, jax.random.fold_in(key, place))
        if x.dtype == jnp.float32 and x.ndim > 0 and path[-1:] != COEFFICIENTS
        else x
        for place, (path, x) in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, done)


def rounded_at_random(x: Array, key: Array) -> Array:
    """x in bfloat16, up or down with the chances whose mean is x.

    Args:
        x: float32, any shape.
        key: a typed key.

    >>> x = jnp.full(1000, 1 + 2**-10)  # an eighth of the way from 1 to the next number
    >>> set(rounded_at_random(x, jax.random.key(0)).tolist()) == {1.0, 1 + 2**-7}
    True
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of float32. What is added carries into it as often as the lower
    # half is large; a number that bfloat16 has stays what it is.
    drawn = (bits + (random_bits(key, x.shape) >> 16)) >> 16
    up_or_down = jax.lax.bitcast_convert_type(drawn.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), up_or_down, x.astype(jnp.bfloat16))
