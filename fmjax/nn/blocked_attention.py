"""Attention on CPUs, in blocks of queries: scores of a few queries and heads stay in the caches,
where those of all pairs go through memory a dozen times.

Rabe & Staats 2021, arXiv:2112.05682, whose blocks are computed again for the gradient; from what is
kept of their sums, as in Dao 2023, arXiv:2307.08691. A block has all the keys that its queries can
see, so that no sums have to be corrected, and none of those that an order or a window hides. It has
derivatives of all orders, forward and reverse, and drops what the plain way drops.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from fmjax.nn.dropout import is_kept, seeds_of
from fmjax.nn.mask import Mask, keep_of, queries_that_see
from fmjax.nn.placement import (
    divides_heads,
    heads_divided,
    on_a_mesh,
    on_each_device,
)

SHORTEST = 384
"""Queries and keys from which on it is chosen. There, of 12 heads, it took 0.3 (8 examples) to 1.0
(one) of the plain way's time, and its gradient 0.6 to 0.8, on 2 cores; at 256 they were even."""
_MOST = 8  # blocks of a head: each is compiled by itself
_SCORES = 2**19  # of the heads together that are computed at once: 2 MiB
_NAME = "blocked_attention"  # of the function, and of what a block keeps for its gradient


def suits(
    query: Array, key: Array, value: Array, mask: Mask | Array | None, bias: Array | None
) -> bool:
    """Whether it can compute this attention, on any device.

    Operands are of one dtype of up to 32 bits, a mask is all heads' and a bias each head's. On a
    mesh examples and heads have to divide by its axes, as each device computes its own.
    """
    keep = keep_of(mask)
    return (
        (bias is None or (bias.ndim == 4 and bias.shape[1] == query.shape[2]))
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        and (keep is None or (keep.ndim == 4 and keep.shape[1] == 1))
        and divides_heads(query, key)
    )


def share_of_pairs(name: str) -> Fraction | None:
    """Of a compiled function's name, how many of all pairs of queries and keys this attention
    computes, which skips some; None of another function.

    >>> share_of_pairs("blocked_attention_10_of_16")
    Fraction(5, 8)
    """
    found = re.fullmatch(rf"{_NAME}_(\d+)_of_(\d+)", name)
    return None if found is None else Fraction(int(found[1]), int(found[2]))


class _Order(NamedTuple):
    """What a mask says of places alone; see `fmjax.nn.mask.Mask`."""

    causal: bool
    window: int | None

    def hides(self) -> bool:
        return self.causal or self.window is not None


class _Block(NamedTuple):
    """Queries ``first`` up to ``last`` and the keys that they can see, ``low`` up to ``high``."""

    first: int
    last: int
    low: int
    high: int


def _blocks(length: int, keys: int, order: _Order) -> Iterator[_Block]:
    """Blocks of T queries on S keys.

    As measured on 2 cores, 256 to 512 queries are the best; what they may skip is worth more
    blocks, up to what it costs to compile them.
    """
    wanted = 8 if order.window is not None else 4 if order.causal else 1
    count = min(_MOST, max(round(length / 512), min(wanted, round(length / 256)), 1))
    rows = -(-length // count)
    for first in range(0, length, rows):
        last = min(first + rows, length)
        low, high = 0, keys
        if order.causal:
            high = min(last, keys)
        if order.window is not None:
            low = max(0, first - order.window + 1)
            high = high if order.causal else min(last + order.window - 1, keys)
        yield _Block(first, last, low, high)


def blocked_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None,
    bias: Array | None = None,
    scale: float,
    softcap: float | None = None,
    rng: Array | None = None,
    dropout_rate: float = 0.0,
) -> Array:
    """What `fmjax.nn.attention.attend` computes of the same arguments, [B, T, H, K], but that
    queries which see nothing drop nothing.

    Args:
        query: [B, T, H, K].
        key, value: [B, G, S, K].
        mask, bias: that `suits`.
        scale, softcap, rng, dropout_rate: as there.
    """
    order, keep = _Order(False, None), keep_of(mask)
    if isinstance(mask, Mask) and (mask.causal or mask.window is not None):
        order, keep = _Order(mask.causal, mask.window), mask.padding
    length, keys = query.shape[1], key.shape[2]
    heads_first = jnp.swapaxes(query.astype(jnp.float32) * scale, 1, 2)  # [B, H, T, K]
    seeds = None if rng is None or dropout_rate == 0.0 else seeds_of(rng)
    number = jnp.arange(math.prod(heads_first.shape[:2]), dtype=jnp.uint32)
    number = number.reshape(heads_first.shape[:2])  # of each head of all examples
    attend = _compiled(length, keys, order, softcap, dropout_rate)
    if on_a_mesh():
        # A loop over examples and heads gathers them.
        others = (heads_divided(), _divided(bias), _divided(keep), None if seeds is None else P())
        attend = on_each_device(attend, *others)
    out = attend(heads_first, key, value, number, bias, keep, seeds)
    out = jnp.swapaxes(out.astype(query.dtype), 1, 2)
    if isinstance(mask, Mask) and order.hides() and keep is not None:
        # Queries that see nothing attend everywhere alike, behind their blocks too.
        if keep.shape[2] == 1:
            sees = queries_that_see(keep[:, 0, 0], length, *order)  # [B | 1, T]
        else:
            sees = mask.keep[:, 0].any(-1)
        mean = value.mean(2, dtype=jnp.float32).astype(out.dtype)  # [B, G, K]
        mean = jnp.repeat(mean, query.shape[2] // mean.shape[1], axis=1)[:, None]
        out = jnp.where(sees[:, :, None, None], out, mean)
    return out


def _divided(x: Array | None) -> P | None:
    """How a mesh divides a mask or a bias, whose examples and heads may be one for all."""
    if x is None:
        return None
    axes = zip(heads_divided(), x.shape[:2], strict=True)
    return P(*(None if size == 1 else names for names, size in axes))


@cache
def _compiled(
    length: int, keys: int, order: _Order, softcap: float | None, rate: float
) -> Callable[..., Array]:
    """A function of [B, H, T, K], [B, G, S, K] twice, the heads' numbers [B, H], bias, mask and the
    seeds of what is dropped, that gives [B, H, T, K].

    Traced once for all layers; its name says what it skips, see `share_of_pairs`.
    """
    blocks = tuple(_blocks(length, keys, order))

    def attend(
        query: Array,
        key: Array,
        value: Array,
        number: Array,
        bias: Array | None,
        keep: Array | None,
        seeds: Array | None,
    ) -> Array:
        batch, heads = query.shape[:2]
        together = _together(heads, blocks)

        def grouped(x: Array) -> Array:  # [B, H, ...] -> [H / together, B, together, ...]
            return jnp.swapaxes(x.reshape(len(x), -1, together, *x.shape[2:]), 0, 1)

        def turned(x: Array) -> Array:  # [B, G, S, K] -> [H / together, B, together, K, S]
            # A product with the many scores as the left one, contracted over its rows, takes twice
            # as long as with the few features there: so gradients of keys and values are turned.
            x = jnp.swapaxes(x.astype(jnp.float32), 2, 3)
            x = grouped(jnp.repeat(x, heads // x.shape[1], axis=1))
            return jax.lax.optimization_barrier(x)  # written out

        kept = None
        if seeds is not None:
            kept = partial(_kept, seeds=seeds, shape=(length, keys), rate=rate)
        of_heads = partial(
            _of_heads, blocks=blocks, order=order, softcap=softcap, keep=keep, kept=kept
        )
        example = jnp.broadcast_to(jnp.arange(batch), (heads // together, batch))
        given = (example, *map(grouped, (number, query)), turned(key), turned(value))

        def of_examples(given: tuple[Any, ...], bias: Array | None) -> Array:
            if bias is not None and len(bias) == 1:
                return jax.lax.map(lambda own: of_heads(own, bias[0]), given)
            return jax.lax.map(lambda own: of_heads(*own), (given, bias))

        if bias is None:
            merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), given)
            out = of_examples(merged, None)
        else:
            # One head's examples behind each other, which sums the gradient of their bias.
            grouped_bias = grouped(bias.astype(jnp.float32))
            out = jax.lax.map(lambda own: of_examples(*own), (given, grouped_bias))
        out = jnp.swapaxes(out.reshape(-1, batch, together, *query.shape[2:]), 0, 1)
        out = out.reshape(query.shape)
        return out if seeds is None else out / (1.0 - rate)

    pairs = sum((b.last - b.first) * (b.high - b.low) for b in blocks)
    attend.__name__ = attend.__qualname__ = f"{_NAME}_{pairs}_of_{length * keys}"
    return jax.jit(attend)


def _together(heads: int, blocks: tuple[_Block, ...]) -> int:
    """How many heads of an example are computed at once.

    Two, as products of one alone have slower kernels in the gradient, and more of short rows: each
    operation is started in turn, which takes microseconds.
    """
    largest = max((b.last - b.first) * (b.high - b.low) for b in blocks)
    most = max(2, _SCORES // largest)
    return max(count for count in range(1, heads + 1) if heads % count == 0 and count <= most)


def _of_heads(
    given: tuple[Array, Array, Array, Array, Array],
    bias: Array | None,
    *,
    blocks: tuple[_Block, ...],
    order: _Order,
    softcap: float | None,
    keep: Array | None,
    kept: Callable[[_Block, Array], Array] | None,
) -> Array:
    """([], [N], [N, T, K], [N, K, S], [N, K, S]), [N, T | 1, S | 1] -> [N, T, K]."""
    example, number, *operands = given

    def of_block(
        block: _Block, query: Array, key: Array, value: Array, bias: Array | None
    ) -> Array:
        first, last, low, high = block
        scores = _product(query[:, first:last], key[:, :, low:high], 1)  # [N, rows, columns]
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if bias is not None:
            bias = bias if bias.shape[1] == 1 else bias[:, first:last]
            scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, low:high])
        seen = _seen(block, order)
        if keep is not None:
            mine = keep[example if keep.shape[0] > 1 else 0, 0, :, low:high]
            mine = mine if mine.shape[0] == 1 else mine[first:last]
            seen = mine if seen is None else seen & mine
        if seen is not None:
            scores = scores + jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)
        here = None if kept is None else kept(block, number)
        return _averaged(scores, value[:, :, low:high], here)

    saved = jax.checkpoint_policies.save_only_these_names(_NAME)
    parts = [
        jax.checkpoint(partial(of_block, block), prevent_cse=False, policy=saved)(*operands, bias)
        for block in blocks
    ]
    return jnp.concatenate(parts, axis=1)


def _seen(block: _Block, order: _Order) -> Array | None:
    """bool [rows, columns]: the keys of a block that a query sees by their places."""
    if not order.hides():
        return None
    place = jnp.arange(block.first, block.last)[:, None]
    distance = place - jnp.arange(block.low, block.high)[None]
    seen = distance >= 0 if order.causal else jnp.ones_like(distance, bool)
    return seen if order.window is None else seen & (jnp.abs(distance) < order.window)


def _kept(
    block: _Block, number: Array, *, seeds: Array, shape: tuple[int, int], rate: float
) -> Array:
    """bool [N, rows, columns]: which probabilities of numbered heads are kept."""
    row = jnp.arange(block.first, block.last, dtype=jnp.uint32)[:, None]
    column = jnp.arange(block.low, block.high, dtype=jnp.uint32)
    index = (number[:, None, None] * shape[0] + row) * shape[1] + column
    return is_kept(seeds, index, rate)


def _product(a: Array, b: Array, axis: int) -> Array:
    """a [N, I, J] times b [N, J, O] over `axis` 1, or [N, O, J] over 2, in float32: [N, I, O]."""
    numbers = (((2,), (axis,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


@jax.custom_jvp
def _averaged(scores: Array, value: Array, kept: Array | None) -> Array:
    """Sums of values [N, K, S] weighted by the softmax of scores [N, rows, S], where it is kept:
    [N, rows, K]."""
    return _weighted(scores, value, kept)[0]


def _weighted(scores: Array, value: Array, kept: Array | None) -> tuple[Array, Array, Array]:
    """The sums, and of the scores the largest ones and the sums of exponentials [N, rows, 1]."""
    top = jax.lax.stop_gradient(scores.max(axis=2, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=2, keepdims=True)
    return _product(_where(kept, weights), value, 2) / total, top, total


@_averaged.defjvp
def _averaged_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    (scores, value, kept), (dscores, dvalue, _) = primals, tangents
    out, top, total = (checkpoint_name(part, _NAME) for part in _weighted(scores, value, kept))
    # One logarithm would do for both, but not beside what stands for minus infinity.
    weights = jnp.exp(scores - top) * (1.0 / total)
    change = weights * dscores
    dout = _product(_where(kept, weights), dvalue, 2) + _product(_where(kept, change), value, 2)
    return out, dout - out * change.sum(axis=2, keepdims=True)


def _where(kept: Array | None, x: Array) -> Array:
    return x if kept is None else jnp.where(kept, x, 0.0)
