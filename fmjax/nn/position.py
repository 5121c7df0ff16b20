"""Positions: rotary tables, sinusoids, ALiBi slopes, relative-position buckets."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array


def inverse_frequencies(size: int, theta: float) -> Array:
    """theta^(-2i / size) for i = 0 .. size / 2 - 1: float32 [size / 2]."""
    return 1.0 / theta ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size)


def rotary_tables(position_ids: Array, frequencies: Array, scale: float = 1.0) -> Rotary:
    """Cosines and sines of every position's angles (Su et al. 2021, arXiv:2104.09864, eq. 15).

    Args:
        position_ids: int [B, T].
        frequencies: float32 [R / 2], or [B, R / 2].
        scale: factor of both tables (the attention factor of yarn and longrope).

    Returns:
        (cos, sin), each float32 [B, T, R / 2].
    """
    angles = position_ids[..., None].astype(jnp.float32) * frequencies[..., None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


Rotary = tuple[Array, Array]
"""(cos, sin), each float32 [B, T, R / 2]; R may be less than the head size K."""


def rotate(x: Array, rotary: Rotary, *, interleaved: bool = False) -> Array:
    """Turns the first R features of every head by their position's angles.

    Args:
        x: [B, T, H, K], R <= K; features behind the first R stay as they are.
        rotary: see `rotary_tables`.
        interleaved: whether a pair is (2i, 2i + 1), as in GPT-J; otherwise (i, i + R / 2), as in
            Llama.

    Returns:
        [B, T, H, K] in x's dtype; the rotation is computed in float32.
    """
    cos, sin = (table[:, :, None, :] for table in rotary)  # [B, T, 1, R / 2]
    half = cos.shape[-1]
    x32 = x.astype(jnp.float32)
    turned, rest = x32[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    first, second = first * cos - second * sin, second * cos + first * sin  # [B, T, H, R / 2]
    if interleaved:
        turned = jnp.stack([first, second], axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate([first, second], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def sinusoids(length: int, width: int, *, interleaved: bool) -> np.ndarray:
    """Fixed position vectors (Vaswani et al. 2017, section 3.5): float32 [length, width].

    Args:
        length: positions 0 .. length - 1.
        width: D.
        interleaved: sines at even and cosines at odd features, as published; otherwise all sines
            first, as in Marian.
    """
    angles = np.arange(length)[:, None] / np.power(
        10000.0, 2 * (np.arange(width)[None, :] // 2) / width
    )  # [length, D]
    table = np.zeros((length, width), np.float32)
    if interleaved:
        table[:, 0::2], table[:, 1::2] = np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])
    else:
        middle = (width + 1) // 2
        table[:, :middle], table[:, middle:] = np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])
    return table


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes of the linear biases (Press et al. 2022, arXiv:2108.12409, section 3): float32 [H].

    For a number of heads that is no power of two, those of the power below and then every other
    one of twice that power, as in the authors' code.
    """
    power = 2 ** math.floor(math.log2(num_heads))

    def geometric(count: int) -> list[float]:
        return [2 ** (-8.0 * (i + 1) / count) for i in range(count)]

    slopes = geometric(power) + geometric(2 * power)[0::2][: num_heads - power]
    return np.array(slopes, np.float32)


def relative_position_buckets(
    relative: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """T5's buckets of relative positions (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    Half of the buckets are exact distances, the rest grow logarithmically up to `max_distance`.

    Args:
        relative: int [...], key position minus query position.
        bidirectional: whether keys after the query have buckets of their own.
        num_buckets: in all.
        max_distance: distances from here on share the last bucket.

    Returns:
        int32 [...] in [0, num_buckets).
    """
    offset = jnp.zeros_like(relative)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(relative > 0, num_buckets, 0)
        distance = jnp.abs(relative)
    else:
        distance = jnp.maximum(-relative, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    ratio = ratio / math.log(max_distance / exact) * (num_buckets - exact)
    far = jnp.minimum(exact + ratio.astype(jnp.int32), num_buckets - 1)
    return (offset + jnp.where(distance < exact, distance, far)).astype(jnp.int32)
