"""Random spans of time or features, for masks (SpecAugment, Park et al. 2019, arXiv:1904.08779)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def draw_spans(
    rng: Array, lengths: Array, size: int, *, probability: float, length: int, least: int = 0
) -> Array:
    """Spans of equal length that start anywhere and may overlap: bool [B, T].

    A row gets ``probability * its length / length`` spans, rounded up or down at random so that
    the mean is right, at least `least`, and no more than fit; they start at different places
    (Baevski et al. 2020, arXiv:2006.11477, section 4.1, as transformers draws them). Where not
    even one fits there is none.

    Args:
        rng: a typed key.
        lengths: int [B], the places of each row that count.
        size: T.
        probability: share of places that the spans would cover if none overlapped.
        length: places of a span.
        least: spans that a row has at least.
    """
    most = min(max(int(probability * size / length + 1), least), size // length)
    rows = lengths.shape[0]
    if most == 0:
        return jnp.zeros((rows, size), bool)
    rounding_key, place_key = jax.random.split(rng)
    rounding = jax.random.uniform(rounding_key, (rows,))
    count = jnp.floor(probability * lengths / length + rounding).astype(jnp.int32)
    starts = lengths - (length - 1)  # places where a span can start
    count = jnp.clip(jnp.maximum(count, least), 0, jnp.clip(starts, 0, most))
    order = jax.random.uniform(place_key, (rows, size))
    order = jnp.where(jnp.arange(size) < starts[:, None], order, -1.0)
    _, places = jax.lax.top_k(order, most)  # [B, most], all different
    used = jnp.arange(most) < count[:, None]
    begun = jnp.zeros((rows, size), bool)
    begun = begun.at[jnp.arange(rows)[:, None], places].max(used)
    total = jnp.cumsum(begun, axis=1)
    before = jnp.pad(total, ((0, 0), (length, 0)))[:, :size]
    return total > before
