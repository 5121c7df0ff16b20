"""Dropout with cheap random bits."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array


def dropout(rng: Array, x: Array, rate: float | Array) -> Array:
    """Zeroes a share `rate` of x and scales the rest by 1 / (1 - rate) (Srivastava et al. 2014).

    Args:
        rng: a typed key.
        x: any shape and floating dtype.
        rate: in [0, 1), float32 if it is an array.
    """
    keep = is_kept(seeds_of(rng), _index(x.shape), rate)
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))


def is_kept(seeds: Array, index: Array, rate: float | Array) -> Array:
    """What `dropout` keeps, for a part of an array too that is never whole.

    Args:
        seeds: from `seeds_of`.
        index: uint32, of each element among all of the array, row by row (modulo 2 ** 32).
        rate: as there.

    Returns:
        bool, of the index's shape.
    """
    if isinstance(rate, Array):
        threshold = (rate * 2.0**32).astype(jnp.uint32)
    else:
        threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return _bits(seeds, index) >= threshold


def seeds_of(rng: Array) -> Array:
    """uint32 [2] of a typed key, for `is_kept`."""
    return jax.random.bits(rng, (2,), jnp.uint32)


def random_bits(rng: Array, shape: tuple[int, ...]) -> Array:
    """Uniform uint32 bits from a counter hash keyed by `rng`.

    Threefry, JAX's default generator, is made to withstand adversaries and costs more than the
    layer it would be applied to. Dropout needs bits that are uniform and uncorrelated between
    elements, layers and steps: the key is drawn by threefry and spreads through two rounds of the
    32-bit finaliser "lowbias32" (Wellons 2018, "Prospecting for Hash Functions", bias 0.17) over
    the element's index, which is two multiplications a round and fuses into the layer around it.
    """
    return _bits(seeds_of(rng), _index(shape))


def _index(shape: tuple[int, ...]) -> Array:
    return jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)


def _bits(seeds: Array, index: Array) -> Array:
    return _lowbias32(_lowbias32(index ^ seeds[0]) + seeds[1])


def _lowbias32(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


class Dropout(nn.Module):
    """`dropout` by the "dropout" key of the call, when training.

    Args:
        rate: share of elements zeroed; a rate of 0 draws nothing.
    """

    rate: float

    def __call__(self, x: Array, train: bool) -> Array:
        if not train or self.rate == 0.0:
            return x
        return dropout(self.make_rng("dropout"), x, self.rate)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): a residual branch is left out for
    whole examples, and scaled by 1 / (1 - rate) for the others.

    Args:
        rate: share of examples, in [0, 1); a rate of 0 that is no array draws nothing.
    """

    rate: float | Array

    def __call__(self, x: Array, train: bool) -> Array:  # [B, ...] -> [B, ...]
        if not train or (not isinstance(self.rate, Array) and self.rate == 0.0):
            return x
        ones = jnp.ones((x.shape[0], *(1 for _ in x.shape[1:])), x.dtype)
        return x * dropout(self.make_rng("dropout"), ones, self.rate)


def layer_rate(rate: float, index: Array | int, count: int) -> float | Array:
    """`DropPath`'s rate of layer `index` of `count`, from 0 in the first to `rate` in the last
    (Huang et al. 2016, section 4); an array where the index is traced.
    """
    return 0.0 if rate == 0.0 else rate * index / max(count - 1, 1)
