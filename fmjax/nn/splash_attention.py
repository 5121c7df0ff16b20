"""Attention by the Pallas kernel for TPUs that JAX ships, "splash attention": Dao 2023's algorithm
(arXiv:2307.08691) in blocks, of which those that a causal mask or a window hides are left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from fmjax.nn.mask import Mask, keep_of, queries_that_see
from fmjax.nn.placement import BATCH, divided_over, divides_heads, on_a_mesh, on_each_device

LANES = 128
"""Positions that the kernel takes at once: lengths are padded to a multiple."""
SHORTEST = 512
"""Keys from which on it is chosen. As compiled for a v5e it moves as many bytes as products and a
softmax at 300 keys, and half at 512. Nobody has measured its time on a TPU yet."""
WIDEST = 256
"""Features of a head."""
_BLOCKS = (512, 256, 128)  # what a TPU's fast memory holds with room to fetch the next ones


def suits(query: Array, key: Array, mask: Mask | Array | None, bias: Array | None) -> bool:
    """Whether the kernel can compute this attention, whatever the platform.

    It knows causal masks with or without a window, and padding of keys; heads in groups; no bias.
    On a mesh examples and heads have to divide by its axes, as each device computes its own.
    """
    size = query.shape[-1]
    return (
        bias is None
        and (_hides_keys(mask) or _static(mask))
        and size % 8 == 0
        and size <= WIDEST
        and divides_heads(query, key)
    )


def _static(mask: Mask | Array | None) -> bool:
    """Whether the mask is none, or causal with no more than padding of keys besides."""
    if mask is None:
        return True
    if not isinstance(mask, Mask) or not mask.causal:
        return False
    return mask.padding is None or mask.padding.shape[-2] == 1


def _hides_keys(mask: Mask | Array | None) -> bool:
    """Whether the mask hides the same keys from all heads and queries, [B | 1, 1, 1, S]."""
    keep = keep_of(mask)
    return keep is not None and keep.ndim == 4 and keep.shape[1:3] == (1, 1)


def splash_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None,
    scale: float,
    interpret: bool = False,
) -> Array:
    """What `fmjax.nn.attention.attend` computes of the same arguments, [B, T, H, K].

    A query that sees no key which counts attends to those that are hidden, by its scores.

    Args:
        query: [B, T, H, K].
        key, value: [B, G, S, K].
        mask: that `suits`.
        scale: of the scores.
        interpret: whether JAX computes what the kernel would, step by step, on any device.
    """
    length, keys = query.shape[1], key.shape[2]
    causal, window, keep = False, None, keep_of(mask)
    if isinstance(mask, Mask) and mask.causal:
        causal, window, keep = True, mask.window, keep_of(mask.padding)
    query = jnp.swapaxes((query * scale).astype(query.dtype), 1, 2)  # [B, H, T, K]
    query, key, value = (_padded(x, 2) for x in (query, key, value))
    if keep is None and not causal and key.shape[2] != keys:
        keep = jnp.ones((1, 1, 1, keys), bool)  # no query is to see what was padded
    if keep is not None:
        keep = jnp.broadcast_to(keep[:, 0, 0], (query.shape[0], keys))
        keep = _padded(keep, 1).astype(jnp.int32)  # [B, S]
    # As segments, queries that see no key have those that are hidden: the kernel's gradients are
    # wrong for queries without any (its sums of exponentials are lost beside what stands for minus
    # infinity).
    sees = None
    if keep is not None:
        sees = queries_that_see(keep, query.shape[2], causal, window).astype(jnp.int32)
    attend = partial(_of_device, causal=causal, window=window, interpret=interpret)
    if on_a_mesh():
        rows = None if keep is None else P(divided_over(BATCH))
        # A kernel does not say how its results vary.
        attend = on_each_device(attend, rows, rows, check_vma=False)
    out = attend(query, key, value, sees, keep)
    return jnp.swapaxes(out[:, :, :length], 1, 2)


def _of_device(
    query: Array,
    key: Array,
    value: Array,
    sees: Array | None,
    keep: Array | None,
    *,
    causal: bool,
    window: int | None,
    interpret: bool,
) -> Array:
    """[B, H, T, K], [B, G, S, K] twice, [B, T], [B, S] -> [B, H, T, K]."""
    heads, length, keys = query.shape[1], query.shape[2], key.shape[2]
    shape = (length, keys)
    if window is not None:
        seen = splash.LocalMask(shape, (window - 1, 0), 0)
    elif causal:
        seen = splash.CausalMask(shape)
    else:
        seen = splash.FullMask(shape)
    of_queries, of_keys = _block(length), _block(keys)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([seen] * heads),
        block_sizes=splash.BlockSizes(
            block_q=of_queries, block_kv=of_keys,
            block_q_dkv=of_queries, block_kv_dkv=of_keys,
            block_q_dq=of_queries, block_kv_dq=of_keys,
        ),
        interpret=interpret,
    )  # fmt: skip

    def of_example(
        query: Array, key: Array, value: Array, sees: Array | None, keep: Array | None
    ) -> Any:
        segments = None
        if sees is not None and keep is not None:
            segments = splash.SegmentIds(sees, keep)
        return kernel(query, key, value, segments)

    return jax.vmap(of_example)(query, key, value, sees, keep)


def _block(size: int) -> int:
    """The largest block that divides a padded length."""
    return next(block for block in _BLOCKS if size % block == 0)


def _padded(x: Array, axis: int) -> Array:
    """x with zeros at the end of an axis, to a multiple of `LANES`."""
    more = -x.shape[axis] % LANES
    return jnp.pad(x, [(0, more if place == axis else 0) for place in range(x.ndim)])
