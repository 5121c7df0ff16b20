"""Which positions attention sees: masks, and what is known of how they came about."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("keep", "padding"),
    meta_fields=("causal", "window"),
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask with its reasons: a kernel that knows them skips what no query sees.

    Attributes:
        keep: the whole of it, bool [B | 1, 1, T | 1, S]; True = seen.
        padding: the part that was given, bool [B, 1, T | 1, S], or None where there was none.
        causal: whether the rest is that position t of T sees the keys up to t of the same T.
        window: of a causal mask, how many keys a query sees, itself included; of one that is not,
            the rest is that keys of the same T at a distance below it are seen; None for all.
    """

    keep: Array
    padding: Array | None = None
    causal: bool = False
    window: int | None = None


def keep_of(mask: Mask | Array | None) -> Array | None:
    """The mask as an array, bool, broadcastable to [B, H, T, S]; None for none."""
    return mask.keep if isinstance(mask, Mask) else mask


def queries_that_see(keep: Array, length: int, causal: bool, window: int | None) -> Array:
    """bool [B, T]: queries that see a key which counts.

    Args:
        keep: [B, S], 1 or True for keys that count.
        length: T.
        causal, window: see `Mask`.
    """
    keep = keep.astype(jnp.int32)
    if not causal and window is None:
        return jnp.broadcast_to(keep.max(axis=1, keepdims=True) > 0, (keep.shape[0], length))
    place, reach = np.arange(length), length if window is None else window
    last = np.minimum(place + (1 if causal else reach), keep.shape[1])
    first = np.minimum(np.maximum(place + 1 - reach, 0), last)
    until = jnp.cumsum(jnp.pad(keep, ((0, 0), (1, 0))), axis=1)  # keys that count before each
    return until[:, last] > until[:, first]


def check_mask(
    mask: Array | None, query_length: int, key_length: int, batch: int | None = None
) -> None:
    """Refuses a mask that does not fit.

    Args:
        mask, query_length, key_length: see `make_attention_mask`.
        batch: B; None where it is not known.
    """
    if mask is None:
        return
    if (
        mask.ndim not in (2, 3)
        or mask.shape[-1] != key_length
        or (mask.ndim == 3 and mask.shape[1] not in (1, query_length))
        or (batch is not None and mask.shape[0] not in (1, batch))
    ):
        rows = "B" if batch is None else batch
        raise ValueError(
            f"attention_mask has shape {mask.shape}; it must be [{rows}, {key_length}] or "
            f"[{rows}, {query_length}, {key_length}] (with a cache, its whole length)"
        )


def make_attention_mask(
    mask: Array | None,
    *,
    query_length: int,
    key_length: int,
    causal: bool,
    start: Array | int = 0,
    window: int | None = None,
) -> Mask | None:
    """Which key positions each query position may see; None where all may see all.

    Args:
        mask: None, [B, S] (keys that are not padding) or [B, T, S]; nonzero = keep.
        query_length: T.
        key_length: S.
        causal: whether position t sees only keys up to t.
        start: key position of the first query, for cached decoding.
        window: of a causal mask, how many keys a query sees, itself included; None for all. Of a
            mask that is not causal, keys at a distance below it are seen.

    Raises:
        ValueError: the mask does not fit T and S.
    """
    check_mask(mask, query_length, key_length)
    padding = None
    if mask is not None:
        padding = mask.astype(bool)
        padding = padding[:, None, None, :] if mask.ndim == 2 else padding[:, None]
    if not causal and window is None:
        return None if padding is None else Mask(padding, padding)
    query = start + jnp.arange(query_length)[:, None]
    distance = query - jnp.arange(key_length)[None, :]  # [T, S]
    near = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if window is not None:
        near = near & (jnp.abs(distance) < window)
    near = near[None, None]  # [1, 1, T, S]
    keep = near if padding is None else padding & near
    whole = isinstance(start, int) and start == 0 and query_length == key_length
    if whole:
        return Mask(keep, padding, causal, window)
    return Mask(keep, padding)
