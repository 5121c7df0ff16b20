"""Processors for drawing: they shape the distribution or cut its tail.

Cuts are thresholds found by bisection over the bits of float32, which is exact, takes any (traced)
k or p, and is many times faster than sorting a vocabulary. Equal logits stay or go together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.generate.processors import Numbers, static
from fmjax.generate.state import Processor, State


def largest_threshold(values: Array, holds: Callable[[Array], Array]) -> Array:
    """The largest t for which a condition on the values at or above it holds: float32 [B, 1].

    Args:
        values: float32 [B, V], no nan.
        holds: bool [B, 1] of a kept set, bool [B, V], that shrinks as t grows; true for small t.
    """
    keys = _ordered(values)

    def bit(i: Array, threshold: Array) -> Array:
        raised = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(keys >= raised), raised, threshold)

    start = jnp.zeros((values.shape[0], 1), jnp.uint32)
    return _value(jax.lax.fori_loop(0, 32, bit, start))


def _ordered(values: Array) -> Array:
    """uint32 that is ordered as the floats are."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _value(keys: Array) -> Array:
    """The inverse of `_ordered`."""
    bits = jnp.where(keys >> 31 == 1, keys & jnp.uint32(0x7FFFFFFF), ~keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def kth_largest(logits: Array, k: Numbers) -> Array:
    """float32 [B, 1] of [B, V]; k may be traced, and more than V is V."""
    if isinstance(k, int) and k == 1:
        return jnp.max(logits, axis=-1, keepdims=True)
    k = jnp.minimum(k, logits.shape[-1])
    return largest_threshold(logits, lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= k)


def _keep(logits: Array, kept: Array, at_least: int) -> Array:
    """-inf outside `kept`, but for the `at_least` most likely tokens."""
    return jnp.where(kept | (logits >= kth_largest(logits, at_least)), logits, -jnp.inf)


def _mass(probabilities: Array, kept: Array) -> Array:
    """[B, 1]: what is kept of [B, V]. As a product: XLA's CPU sum adds one number at a time."""
    ones = jnp.ones((probabilities.shape[-1], 1), probabilities.dtype)
    return jnp.where(kept, probabilities, 0.0) @ ones


def _entropy(log_p: Array) -> Array:
    """[B, 1] in nats, of log-probabilities [B, V]."""
    p = jnp.exp(log_p)
    return -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1, keepdims=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Temperature:
    """Logits over the temperature."""

    temperature: Numbers

    def __call__(self, logits: Array, state: State) -> Array:
        return logits / self.temperature


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """The k most likely tokens (Fan et al. 2018, arXiv:1805.04833)."""

    k: Numbers

    def __call__(self, logits: Array, state: State) -> Array:
        return jnp.where(logits >= kth_largest(logits, self.k), logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopP:
    """The most likely tokens whose probabilities reach p (Holtzman et al. 2020, arXiv:1904.09751).

    Args:
        p: the mass.
        at_least: tokens that stay in any case.
    """

    p: Numbers
    at_least: int = static()

    def __call__(self, logits: Array, state: State) -> Array:
        probabilities = jax.nn.softmax(logits, axis=-1)
        threshold = largest_threshold(
            logits, lambda kept: _mass(probabilities, ~kept) <= 1.0 - self.p
        )
        return _keep(logits, logits >= threshold, self.at_least)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinP:
    """Tokens at least `min_p` times as likely as the most likely one (arXiv:2407.01082).

    Args:
        min_p: the ratio.
        at_least: tokens that stay in any case.
    """

    min_p: Numbers
    at_least: int = static()

    def __call__(self, logits: Array, state: State) -> Array:
        top = jnp.max(logits, axis=-1, keepdims=True)
        return _keep(logits, jnp.exp(logits - top) >= self.min_p, self.at_least)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Typical:
    """Tokens whose surprise is nearest to the entropy and whose probabilities reach the mass
    (Meister et al. 2022, arXiv:2202.00666).

    Args:
        mass: the mass.
        at_least: tokens that stay in any case.
    """

    mass: Numbers
    at_least: int = static()

    def __call__(self, logits: Array, state: State) -> Array:
        log_p = jax.nn.log_softmax(logits, axis=-1)
        p = jnp.exp(log_p)
        typical = -jnp.abs(log_p + _entropy(log_p))  # [B, V], 0 is the most typical
        threshold = largest_threshold(typical, lambda kept: _mass(p, kept) >= self.mass)
        kept = typical >= threshold
        if self.at_least > 1:
            kept |= typical >= kth_largest(typical, self.at_least)
        return jnp.where(kept, logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EpsilonCutoff:
    """Tokens of at least this probability (Hewitt et al. 2022, arXiv:2210.15191, sec. 3).

    Args:
        epsilon: the probability.
        at_least: tokens that stay in any case.
    """

    epsilon: Numbers
    at_least: int = static()

    def __call__(self, logits: Array, state: State) -> Array:
        return _keep(logits, jax.nn.softmax(logits, axis=-1) >= self.epsilon, self.at_least)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EtaCutoff:
    """Tokens above min(epsilon, sqrt(epsilon) exp(-entropy)) (the same paper, eq. 6).

    Args:
        epsilon: the probability.
        at_least: tokens that stay in any case.
    """

    epsilon: Numbers
    at_least: int = static()

    def __call__(self, logits: Array, state: State) -> Array:
        log_p = jax.nn.log_softmax(logits, axis=-1)
        entropy = _entropy(log_p)
        eta = jnp.minimum(self.epsilon, jnp.sqrt(self.epsilon) * jnp.exp(-entropy))
        return _keep(logits, jnp.exp(log_p) >= eta, self.at_least)


def untempered(scores: Array, processors: Iterable[Processor]) -> Array:
    """Scores [B, V] that processors gave as if no `Temperature` had been among them."""
    for processor in processors:
        if isinstance(processor, Temperature):
            scores = scores * processor.temperature
    return scores


def draw(logits: Array, rng: Array) -> Array:
    """int32 [...]: tokens drawn from the distributions of logits [..., V].

    By one uniform number a row and the cumulative sums of blocks, then of one block's tokens: a
    number for every token of the vocabulary, as `jax.random.categorical` draws them, takes ten
    times as long on CPU. A token of probability 0 is never drawn.
    """
    vocab_size = logits.shape[-1]
    size = math.isqrt(vocab_size - 1) + 1  # of a block, and blocks are no more
    blocks = -(-vocab_size // size)
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, blocks * size - vocab_size)]
    mass = jnp.pad(mass, padding).reshape(*logits.shape[:-1], blocks, size)
    sums = jnp.sum(mass, axis=-1)  # [..., blocks]
    total = jnp.sum(sums, axis=-1)
    # In float32 a uniform number can round up to the whole; `_reach` takes care of that.
    at = jax.random.uniform(rng, total.shape) * total
    block, at = _reach(sums, at)
    inside = jnp.take_along_axis(mass, block[..., None, None], axis=-2)[..., 0, :]
    token, _ = _reach(inside, at)
    return (block * size + token).astype(jnp.int32)


def _reach(mass: Array, at: Array) -> tuple[Array, Array]:
    """(the first part [...] of mass [..., n] with which the sum exceeds `at`, the rest in it)."""
    sums = jnp.cumsum(mass, axis=-1)
    over = sums > at[..., None]
    part = jnp.where(jnp.any(over, axis=-1), jnp.argmax(over, axis=-1), jnp.argmax(mass, axis=-1))
    before = jnp.take_along_axis(sums - mass, part[..., None], axis=-1)[..., 0]
    return part, jnp.maximum(at - before, 0.0)
