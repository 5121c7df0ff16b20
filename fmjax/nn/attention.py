"""Attention: the key-value cache, the one function that every family calls, the layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.core import Tracer

from fmjax.nn.dropout import dropout
from fmjax.nn.fused_attention import fused, fused_attention
from fmjax.nn.linear import Dense
from fmjax.nn.mask import Mask, keep_of
from fmjax.nn.parameter import columns_held
from fmjax.nn.placement import constrain_heads
from fmjax.nn.position import Rotary, rotate
from fmjax.tree import flatten


class Cache(NamedTuple):
    """Keys and values of one layer so far.

    Args:
        key, value: [B, G, S, K]; positions not yet written are zero and masked. Heads come first
            so that a step reads them as they lie.
    """

    key: Array
    value: Array


def empty_cache(
    num_layers: int, shape: tuple[int, int, int, int], *, dtype: Any, scan: bool
) -> dict[str, Any]:
    """A cache of `num_layers` layers, named as the parameters are, that holds 0 positions.

    Args:
        num_layers: L.
        shape: [B, G, S, K].
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


def write_positions(buffer: Array, new: Array, start: Array | int) -> Array:
    """The buffer [B, G, S, K] with new keys or values [B, G, T, K] from position `start` on.

    Axes of size 1 are dropped around the update, and `fmjax.generate` drops them in its loop. XLA
    would do so between the update and the products that read it, and on CPU fuse that step into a
    second update, for which it copies the whole buffer, every step.
    """
    lead = tuple(size for size in buffer.shape[:2] if size > 1)
    flat = buffer.reshape(*lead, *buffer.shape[2:])
    new = new.astype(buffer.dtype).reshape(*lead, *new.shape[2:])
    at = (*(0 for _ in lead), start, 0)
    return jax.lax.dynamic_update_slice(flat, new, at).reshape(buffer.shape)


def cache_room(cache: dict[str, Any], length: int) -> tuple[Array, int]:
    """How many positions a cache holds, and how many it has room for.

    Args:
        cache: of a model.
        length: T, the positions that are to be written.

    Raises:
        ValueError: it has no room for them. In a compiled function, where what it holds is not
            known, nobody can say, and the last positions would be overwritten.
    """
    layer = next(value for name, value in cache.items() if name.startswith("layers"))
    if isinstance(layer, dict):  # of an encoder-decoder, beside the cross-attention's
        layer = layer["self"]
    start, capacity = cache["length"], layer.key.shape[-2]
    if not isinstance(start, Tracer) and (needed := int(start) + length) > capacity:
        raise ValueError(
            f"{length} more positions behind the {start} that the cache holds are more than the "
            f"{capacity} it has room for; make it with init_cache(..., length={needed})"
        )
    return start, capacity


def prefix_length(variables: Mapping[str, Any]) -> int:
    """P of the keys and values that a model's `Attention` layers have before those of the tokens,
    whose positions begin behind them; 0 for none.

    Args:
        variables: of a model whose positions are counted, or of one of its sides.

    Raises:
        ValueError: layers have different P, so that positions cannot agree.
    """
    flat = flatten(variables.get("adapters", {}))
    lengths = {leaf.shape[-2] for path, leaf in flat.items() if path.endswith("/prefix_key")}
    if len(lengths) > 1:
        raise ValueError(f"prefixes have lengths {sorted(lengths)}; all layers' must have one")
    return lengths.pop() if lengths else 0


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None = None,
    bias: Array | None = None,
    prefix: Cache | None = None,
    scale: float | Array | None = None,
    softcap: float | None = None,
    rng: Array | None = None,
    dropout_rate: float = 0.0,
    with_probabilities: bool = False,
) -> tuple[Array, Array | None]:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    On a GPU or TPU a fused kernel computes it where one can, and on CPUs long rows are computed in
    blocks; see `fmjax.nn.fused_attention`.

    Args:
        query: [B, T, H, K].
        key, value: [B, G, S, K]; G divides H, and G < H is grouped-query attention. The values'
            head size may differ from the keys'.
        mask: bool, broadcastable to [B, H, T, S]; True = keep. A row that keeps nothing attends
            everywhere alike, as in PyTorch. A `Mask` lets kernels skip what it says nobody sees.
        bias: added to the scaled scores, broadcastable to [B, H, T, S].
        prefix: keys and values [G, P, K] that every query sees besides, without mask or bias.
        scale: of the scores; None is 1 / sqrt(K).
        softcap: c of ``c * tanh(scores / c)``, applied before bias and mask; None for none.
        rng: key for dropout of the probabilities; None drops nothing.
        dropout_rate: share of probabilities dropped.
        with_probabilities: whether the probabilities (before dropout) are returned too.

    Returns:
        ([B, T, H, K], [B, H, T, S] or None; [B, H, T, P + S] with a prefix, which comes first).
    """
    dropped_rate = dropout_rate if rng is not None else 0.0
    drops = dropped_rate > 0.0
    kernel = None
    if prefix is None and not with_probabilities:
        special = drops or softcap is not None
        kernel = fused(query, key, value, mask, bias, drops_or_caps=special)
    if kernel is not None:
        out = fused_attention(
            query, key, value, mask=mask, bias=bias, scale=scale, softcap=softcap,
            rng=rng, dropout_rate=dropped_rate, kernel=kernel,
        )  # fmt: skip
        return out, None
    mask = keep_of(mask)
    batch, length, heads, size = query.shape
    groups, keys = key.shape[1], key.shape[2]
    # Heads are brought forward once and the mask is added, not selected: measured on CPU, the
    # products then need no transposes of their own and the softmax fuses.
    scale = 1.0 / math.sqrt(size) if scale is None else scale
    query = jnp.swapaxes((query * scale).astype(query.dtype), 1, 2)  # [B, H, T, K]
    query = query.reshape(batch, groups, heads // groups * length, size)

    def capped(scores: Array) -> Array:  # [B, G, H / G * T, S] -> [B, H, T, S] float32
        scores = scores.reshape(batch, heads, length, scores.shape[-1]).astype(jnp.float32)
        return scores if softcap is None else softcap * jnp.tanh(scores / softcap)

    scores = capped(jnp.einsum("BGTK,BGSK->BGTS", query, key))
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if mask is not None:
        scores = scores + jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
    if prefix is not None:
        # Scores are joined, not keys: a cache would be copied to stand behind a prefix.
        before = jnp.einsum("BGTK,GPK->BGTP", query, prefix.key.astype(query.dtype))
        scores = jnp.concatenate([capped(before), scores], axis=-1)  # [B, H, T, P + S]
    probabilities = jax.nn.softmax(scores, axis=-1).astype(query.dtype)  # [B, H, T, S]
    dropped = probabilities
    if rng is not None and drops:
        dropped = dropout(rng, probabilities, dropped_rate)
    dropped = dropped.reshape(batch, groups, heads // groups * length, dropped.shape[-1])
    if prefix is None:
        out = jnp.einsum("BGTS,BGSK->BGTK", dropped, value)
    else:
        out = jnp.einsum("BGTS,BGSK->BGTK", dropped[..., -keys:], value)
        before = dropped[..., :-keys]
        out = out + jnp.einsum("BGTP,GPK->BGTK", before, prefix.value.astype(query.dtype))
    out = out.reshape(batch, heads, length, value.shape[-1])
    return jnp.swapaxes(out, 1, 2), probabilities if with_probabilities else None


class Attention(nn.Module):
    """Multi-head attention with its four projections, over itself or over other states.

    Where there is a collection "adapters", its ``prefix_key`` and ``prefix_value`` [P, G * K] here
    are keys and values that every query sees besides: as they are, neither normed nor rotated.

    Once heads were removed, there are as many as the kernels have columns for.

    Args:
        num_heads: H.
        dropout_rate: of the probabilities.
        train: whether to drop.
        with_probabilities: whether the probabilities are returned.
        kernel_init: initializer of the kernels.
        out_init: of the output's kernel; None is as `kernel_init`.
        query_init: of the queries' kernel; None is as `kernel_init`.
        num_key_value_heads: G; None is H.
        head_dim: K; None is D / H.
        use_bias: whether query, key and value have biases.
        key_bias: whether keys have one; None is as `use_bias`. (It adds the same to all scores of
            a query, which changes nothing.)
        out_bias: whether the output has one; None is as `use_bias`.
        scale: of the scores; None is 1 / sqrt(K).
        softcap: see `attend`.
        head_norm: makes the norm (``head_norm(name=...)``) that queries and keys pass, over the
            features of each head, before they are rotated; None for none.
        width_norm: the same over all heads' features together.
        interleaved: see `fmjax.nn.position.rotate`.
        rotary_value: whether values are rotated too (RoFormer).
    """

    num_heads: int
    dropout_rate: float = 0.0
    train: bool = False
    with_probabilities: bool = False
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    out_init: Callable[..., Array] | None = None
    query_init: Callable[..., Array] | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    use_bias: bool = True
    key_bias: bool | None = None
    out_bias: bool | None = None
    scale: float | Array | None = None
    softcap: float | None = None
    head_norm: Callable[..., nn.Module] | None = None
    width_norm: Callable[..., nn.Module] | None = None
    interleaved: bool = False
    rotary_value: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        mask: Mask | Array | None,
        bias: Array | None = None,
        rotary: Rotary | None = None,
        others: Array | None = None,
        keys: Array | None = None,
        fixed: Cache | None = None,
        cache: Cache | None = None,
        start: Array | int = 0,
    ) -> tuple[Array, Array | None, Cache | None]:
        """Attends from x [B, T, D] to itself, or to `others` [B, S, D].

        Args:
            x: [B, T, D].
            mask: see `attend`.
            bias: added to the scores, broadcastable to [B, H, T, S].
            rotary: tables for the positions of x, by which queries and keys are rotated.
            others: what the keys and values are made of; None is x.
            keys: what the keys alone are made of, [B, S, D]; None is what the values are.
            fixed: keys and values that an earlier call made of `others`, in its place.
            cache: keys and values of earlier positions; x's are written at `start`.
            start: how many positions the cache holds.

        Returns:
            ([B, T, D], probabilities or None, cache): the given cache with x's positions, or the
            keys and values of `others`; None where there is neither.
        """
        width = x.shape[-1]
        size = width // self.num_heads if self.head_dim is None else self.head_dim
        count = columns_held(self, "query", self.num_heads * size) // size
        groups = self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads
        groups = columns_held(self, "key", groups * size) // size
        for name, given, own in (
            ("cache", None if cache is None else cache.key, groups),
            ("bias of scores", bias, count),
        ):
            if given is not None and given.ndim > 2 and given.shape[-3] not in (own, 1):
                raise ValueError(
                    f"the {name} has {given.shape[-3]} heads, and {'/'.join(self.path)} has {own}: "
                    "layers that lack heads which the config counts cannot use it"
                )

        def project(states: Array, heads: int, name: str) -> Array:
            init = self.query_init if name == "query" else None
            init = self.kernel_init if init is None else init
            own = self.key_bias if name == "key" else None
            use_bias = self.use_bias if own is None else own
            y = Dense(heads * size, use_bias, init, name=name)(states)
            if self.width_norm is not None and name != "value":
                y = self.width_norm(name=f"{name}_norm")(y)
            y = y.reshape(*y.shape[:-1], heads, size)  # [B, T, H, K]
            y = constrain_heads(y, "/".join((*self.path, name)))
            if name == "value" and not self.rotary_value:
                return y
            if name != "value" and self.head_norm is not None:
                y = self.head_norm(name=f"{name}_norm")(y)
            return y if rotary is None else rotate(y, rotary, interleaved=self.interleaved)

        query = project(x, count, "query")
        if fixed is None:
            source = x if others is None else others
            keyed = source if keys is None else keys
            key = jnp.swapaxes(project(keyed, groups, "key"), 1, 2)  # [B, G, S, K]
            value = jnp.swapaxes(project(source, groups, "value"), 1, 2)
        else:
            key, value = fixed
        if cache is not None:
            key = write_positions(cache.key, key, start)
            value = write_positions(cache.value, value, start)
            cache = Cache(key, value)
        elif others is not None or fixed is not None:
            cache = Cache(key, value)
        out, probabilities = attend(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            prefix=self.prefix(groups, size),
            scale=self.scale,
            softcap=self.softcap,
            rng=self.make_rng("dropout") if self.train and self.dropout_rate > 0.0 else None,
            dropout_rate=self.dropout_rate,
            with_probabilities=self.with_probabilities,
        )
        out = out.reshape(*x.shape[:-1], count * size)  # [B, T, H * K]
        out_bias = self.use_bias if self.out_bias is None else self.out_bias
        out_init = self.kernel_init if self.out_init is None else self.out_init
        out = Dense(width, out_bias, out_init, name="out")(out)  # [B, T, D]
        return out, probabilities, cache

    def prefix(self, groups: int, size: int) -> Cache | None:
        """The layer's own keys and values [G, P, K], or None."""
        if not self.has_variable("adapters", "prefix_key"):
            return None

        def heads(name: str) -> Array:
            rows = self.get_variable("adapters", name)
            if rows.ndim != 2 or rows.shape[1] != groups * size:
                place = "/".join(("adapters", *self.path, name))
                raise ValueError(
                    f"{place} has shape {rows.shape}; it must be [P, {groups * size}]: {groups} "
                    f"heads of {size}"
                )
            return jnp.swapaxes(rows.reshape(-1, groups, size), 0, 1)

        return Cache(heads("prefix_key"), heads("prefix_value"))
