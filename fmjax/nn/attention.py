"""Attention: masks, the key-value cache, the one function that every family calls, the layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.dropout import dropout
from fmjax.nn.linear import Dense


class Cache(NamedTuple):
    """Keys and values of one layer so far.

    Args:
        key, value: [B, S, G, K]; positions not yet written are zero and masked.
    """

    key: Array
    value: Array


def empty_cache(
    num_layers: int, shape: tuple[int, int, int, int], *, dtype: Any, scan: bool
) -> dict[str, Any]:
    """A cache of `num_layers` layers, named as the parameters are, that holds 0 positions.

    Args:
        num_layers: L.
        shape: [B, S, G, K].
        dtype: of keys and values.
        scan: whether layers are stacked along a leading axis.
    """
    length = jnp.zeros((), jnp.int32)
    if scan:
        stacked = (num_layers, *shape)
        return {
            "length": length,
            "layers": Cache(jnp.zeros(stacked, dtype), jnp.zeros(stacked, dtype)),
        }
    layers = {
        f"layers_{i}": Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for i in range(num_layers)
    }
    return {"length": length, **layers}


def cache_capacity(cache: dict[str, Any]) -> int:
    """How many positions a cache has room for."""
    layer = next(value for name, value in cache.items() if name.startswith("layers"))
    return layer.key.shape[-3]


def make_attention_mask(
    mask: Array | None, *, query_length: int, key_length: int, causal: bool, start: Array | int = 0
) -> Array | None:
    """Which key positions each query position may see; None where all may see all.

    Args:
        mask: None, [B, S] (keys that are not padding) or [B, T, S]; nonzero = keep.
        query_length: T.
        key_length: S.
        causal: whether position t sees only keys up to t.
        start: key position of the first query, for cached decoding.

    Returns:
        bool [B or 1, 1, T, S], or None.

    Raises:
        ValueError: the mask does not fit T and S.
    """
    keep = None
    if mask is not None:
        if mask.shape[-1] != key_length or mask.ndim not in (2, 3):
            raise ValueError(
                f"attention_mask has shape {mask.shape}; it must be [B, {key_length}] or "
                f"[B, {query_length}, {key_length}] (with a cache, its whole length)"
            )
        keep = mask.astype(bool)
        keep = keep[:, None, None, :] if mask.ndim == 2 else keep[:, None]  # [B, 1, 1 | T, S]
    if causal:
        query = start + jnp.arange(query_length)[:, None]
        past = (jnp.arange(key_length)[None, :] <= query)[None, None]  # [1, 1, T, S]
        keep = past if keep is None else keep & past
    return keep


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    rng: Array | None = None,
    dropout_rate: float = 0.0,
    with_probabilities: bool = False,
) -> tuple[Array, Array | None]:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    Args:
        query: [B, T, H, K].
        key, value: [B, S, G, K]; G divides H, and G < H is grouped-query attention.
        mask: bool, broadcastable to [B, H, T, S]; True = keep. A row that keeps nothing attends
            everywhere alike, as in PyTorch.
        rng: key for dropout of the probabilities; None drops nothing.
        dropout_rate: share of probabilities dropped.
        with_probabilities: whether the probabilities (before dropout) are returned too.

    Returns:
        ([B, T, H, K], [B, H, T, S] or None).
    """
    batch, length, heads, size = query.shape
    groups, keys = key.shape[2], key.shape[1]
    # Heads are brought forward once and the mask is added, not selected: measured on CPU, the
    # products then need no transposes of their own and the softmax fuses.
    query = jnp.swapaxes(query * (1.0 / math.sqrt(size)), 1, 2)  # [B, H, T, K]
    query = query.reshape(batch, groups, heads // groups * length, size)
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)  # [B, G, S, K]
    scores = jnp.einsum("BGTK,BGSK->BGTS", query, key)
    scores = scores.reshape(batch, heads, length, keys).astype(jnp.float32)
    if mask is not None:
        scores = scores + jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(query.dtype)  # [B, H, T, S]
    dropped = probabilities
    if rng is not None and dropout_rate > 0.0:
        dropped = dropout(rng, probabilities, dropout_rate)
    dropped = dropped.reshape(batch, groups, heads // groups * length, keys)
    out = jnp.einsum("BGTS,BGSK->BGTK", dropped, value).reshape(batch, heads, length, size)
    return jnp.swapaxes(out, 1, 2), probabilities if with_probabilities else None


class Attention(nn.Module):
    """Multi-head attention with its four projections, over itself or over other states.

    Args:
        num_heads: H.
        dropout_rate: of the probabilities.
        train: whether to drop.
        with_probabilities: whether the probabilities are returned.
        kernel_init: initializer of the four kernels.
    """

    num_heads: int
    dropout_rate: float
    train: bool
    with_probabilities: bool = False
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        mask: Array | None,
        others: Array | None = None,
        cache: Cache | None = None,
        start: Array | int = 0,
    ) -> tuple[Array, Array | None, Cache | None]:
        """Attends from x [B, T, D] to itself, or to `others` [B, S, D].

        Args:
            x: [B, T, D].
            mask: bool, broadcastable to [B, H, T, S].
            others: what the keys and values are made of; None is x.
            cache: keys and values of earlier positions; x's are written at `start`.
            start: how many positions the cache holds.

        Returns:
            ([B, T, D], probabilities or None, the cache with x's positions or None).
        """
        width = x.shape[-1]
        size = width // self.num_heads

        def project(states: Array, name: str) -> Array:
            y = Dense(width, kernel_init=self.kernel_init, name=name)(states)
            return y.reshape(*y.shape[:-1], self.num_heads, size)  # [B, T, H, K]

        source = x if others is None else others
        query, key, value = project(x, "query"), project(source, "key"), project(source, "value")
        if cache is not None:
            at = (0, start, 0, 0)
            key = jax.lax.dynamic_update_slice(cache.key, key.astype(cache.key.dtype), at)
            value = jax.lax.dynamic_update_slice(cache.value, value.astype(cache.value.dtype), at)
            cache = Cache(key, value)
        out, probabilities = attend(
            query,
            key,
            value,
            mask=mask,
            rng=self.make_rng("dropout") if self.train and self.dropout_rate > 0.0 else None,
            dropout_rate=self.dropout_rate,
            with_probabilities=self.with_probabilities,
        )
        out = out.reshape(*x.shape[:-1], width)  # [B, T, D]
        out = Dense(width, kernel_init=self.kernel_init, name="out")(out)
        return out, probabilities, cache
