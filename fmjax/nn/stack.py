"""A stack of equal blocks, as a Python loop or as one scan over stacked weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.placement import constrain_examples, on_a_mesh
from fmjax.nn.remat import recomputed
from fmjax.types import PyTree, Remat


class LayerOutput(NamedTuple):
    """What a block returns beside its hidden state; None where not asked for.

    Args:
        cache: the block's cache with the new positions.
        hidden_state: [B, T, D], a copy of the hidden state.
        attentions: [B, H, T, S].
        cross_attentions: [B, H, T, S].
        router_logits: [B * T, E].
    """

    cache: PyTree = None
    hidden_state: Array | None = None
    attentions: Array | None = None
    cross_attentions: Array | None = None
    router_logits: Array | None = None


class StackOutput(NamedTuple):
    """The last hidden state, each layer's `LayerOutput`, and the new cache."""

    hidden: Array
    layers: tuple[LayerOutput, ...]
    cache: dict[str, PyTree] | None


def run_stack(
    block: type[nn.Module],
    fields: dict[str, Any],
    hidden: PyTree,
    shared: PyTree,
    *,
    num_layers: int,
    cache: dict[str, PyTree] | None = None,
    scan: bool = False,
    remat: Remat = "none",
) -> StackOutput:
    """Runs `num_layers` blocks named ``layers_{i}`` (or, scanned, ``layers``) in a compact method.

    Args:
        block: a module whose call is ``(hidden, cache, index, shared) -> (hidden, LayerOutput)``;
            the index is the layer's number, traced in a scan: what depends on it is selected by
            jnp.where or looked up in an array of `shared`.
        fields: the block's fields.
        hidden: [B, T, D], or a tree of such.
        shared: a tree of arrays that every block reads: masks, encoder states.
        num_layers: L.
        cache: by layer name, as the parameters are; None for none.
        scan: one compiled block over weights stacked along a leading axis L.
        remat: what the backward pass recomputes of each block.
    """
    block = recomputed(block, remat, scanned=scan)
    hidden = jax.tree.map(constrain_examples, hidden)
    if scan:
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "adapters": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=num_layers,
        )
        layer_cache = None if cache is None else cache["layers"]
        index = jnp.arange(num_layers)
        hidden, stacked = scanned(**fields, name="layers")(hidden, layer_cache, index, shared)
        layers = tuple(
            LayerOutput(*jax.tree.map(lambda leaf, i=i: leaf[i], tuple(stacked)))
            for i in range(num_layers)
        )
        return StackOutput(hidden, layers, None if cache is None else {"layers": stacked.cache})
    layers = []
    for i in range(num_layers):
        name = f"layers_{i}"
        layer_cache = None if cache is None else cache[name]
        hidden, layer = block(**fields, name=name)(hidden, layer_cache, i, shared)
        if on_a_mesh():  # where `_computed_once` would have all devices wait for one number
            hidden = jax.tree.map(constrain_examples, hidden)
        else:
            hidden = jax.lax.platform_dependent(hidden, cpu=_computed_once, default=lambda x: x)
        layers.append(layer)
    new_cache = {f"layers_{i}": layer.cache for i, layer in enumerate(layers)}
    return StackOutput(hidden, tuple(layers), None if cache is None else new_cache)


def _computed_once(hidden: PyTree) -> PyTree:
    """The same values, to which the CPU compiler ends one fusion and its gradient's.

    In pre-norm models hidden states are long sums, which it would compute anew, from all layers'
    outputs, for each layer that reads them or (transposed, which is slow) their gradient: a tenth
    of GPT-2's train step, and it grows with the square of the depth. It does not repeat a division
    by what it does not know, and it ignores optimization barriers. The divisor is 1, always.
    """

    def divided(x: Array) -> Array:
        if x.size == 0:
            return x
        any_value = x[(0,) * x.ndim]
        anything = (any_value >= 0) | (any_value < 0) | jnp.isnan(any_value)
        return x / jnp.where(anything, 1, 2).astype(x.dtype)

    return jax.tree.map(divided, hidden)
