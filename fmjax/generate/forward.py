"""The model as generation calls it: a prompt into the cache, then tokens one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.tree import path_of
from fmjax.types import PyTree, Variables


class Prompt(NamedTuple):
    """What a model starts from.

    Args:
        tokens: int32 [B, P], the decoder's prompt, padded on the left.
        padding: int32 [B], the columns of padding.
        encoder_inputs: what the model's ``encode`` reads, by name: ``input_ids`` int32 [B, S],
            padded on the right, or images or sounds; None where there is none or states are given.
        encoder_states: [B, S, D] in place of them, as ``encode`` returns them.
        encoder_mask: [B, S] over them, 1 = token; None keeps everything.
    """

    tokens: Array | np.ndarray
    padding: Array | np.ndarray
    encoder_inputs: Mapping[str, Array | np.ndarray] | None = None
    encoder_states: Array | None = None
    encoder_mask: Array | np.ndarray | None = None

    @property
    def encoded(self) -> bool:
        """Whether there is an encoder."""
        return self.encoder_inputs is not None or self.encoder_states is not None


class Context(NamedTuple):
    """What every call needs and no call changes.

    Args:
        padding: int32 [B], the columns before each row's first token.
        mask: [B, S] over the cache, 0 for padding; None for an encoder-decoder.
        encoder_mask: [B, S] or None.
        last_position: int32 [], the largest position there can be.
    """

    padding: Array
    mask: Array | None
    encoder_mask: Array | None
    last_position: Array


def prefill(
    model: Any, variables: Variables, prompt: Prompt, limit: Array, *, capacity: int
) -> tuple[Array, PyTree, Context]:
    """Runs the prompt.

    Args:
        model: with the head "causal_lm" or "seq2seq_lm".
        variables: its variables.
        prompt: what it starts from.
        limit: int32 [], new tokens there may be.
        capacity: columns the cache has room for.

    Returns:
        (hidden state of the last column [B, D], cache, context).
    """
    batch, length = prompt.tokens.shape
    dtype = weight_dtype(variables)
    padding, tokens = jnp.asarray(prompt.padding), jnp.asarray(prompt.tokens)
    last_position = length - jnp.min(padding) + limit - 1  # columns that no row fills do not count
    if not prompt.encoded:
        column = jnp.arange(capacity)
        mask = (column >= padding[:, None]).astype(jnp.int32)  # [B, S]
        context = Context(padding, mask, None, last_position)
        cache = model.init_cache(batch, capacity, dtype=dtype)
        hidden, cache = forward(model, variables, tokens, cache, context)
        return hidden[:, -1], cache, context
    states: Any = prompt.encoder_states
    mask = prompt.encoder_mask
    if prompt.encoder_inputs is not None:
        masks = {} if mask is None else {"attention_mask": mask}
        states = model.apply(
            variables, **prompt.encoder_inputs, **masks, method="encode"
        ).last_hidden_state
        if mask is not None:
            mask = model.state_mask(jnp.asarray(mask), states.shape[1])
    context = Context(padding, None, None if mask is None else jnp.asarray(mask), last_position)
    cache = model.init_cache(batch, capacity, states.shape[1], dtype=dtype)
    hidden, cache = forward(model, variables, tokens, cache, context, states)
    return hidden[:, -1], cache, context


def forward(
    model: Any,
    variables: Variables,
    tokens: Array,
    cache: PyTree,
    context: Context,
    encoder_states: Array | None = None,
) -> tuple[Array, PyTree]:
    """Runs tokens [B, T] behind what the cache holds: (hidden states [B, T, D], the cache)."""
    if context.mask is None:
        out = model.apply(
            variables,
            encoder_outputs=encoder_states,
            attention_mask=context.encoder_mask,
            decoder_input_ids=tokens,
            cache=cache,
            output_logits=False,
        )
    else:
        column = cache["length"] + jnp.arange(tokens.shape[1])
        positions = jnp.maximum(column - context.padding[:, None], 0)  # [B, T]
        out = model.apply(
            variables,
            input_ids=tokens,
            attention_mask=context.mask,
            # Drafted tokens may lie beyond the limit; they are dropped, but must not be nan.
            position_ids=jnp.minimum(positions, context.last_position),
            cache=cache,
            output_logits=False,
        )
    return out.last_hidden_state, out.cache


def unembed(model: Any, variables: Variables, hidden: Array) -> Array:
    """Logits float32 [..., V] of hidden states [..., D]."""
    return model.apply(variables, hidden, method="unembed").astype(jnp.float32)


def weight_dtype(variables: Variables) -> Any:
    """The dtype of the largest weight, which keys and values are kept in."""
    floats = [x for x in jax.tree.leaves(variables) if jnp.issubdtype(x.dtype, jnp.floating)]
    return max(floats, key=lambda leaf: leaf.size).dtype


def rewind(cache: PyTree, length: Array) -> PyTree:
    """The cache as if only `length` columns had been written."""
    return {**cache, "length": jnp.asarray(length, jnp.int32)}


def _map_rows(fn: Callable[[Array, int], Array], cache: PyTree, *, cross: bool) -> PyTree:
    """`fn(array, axis of B)` of all keys and values; those of the encoder only if `cross`."""

    def mapped(keys: tuple[Any, ...], array: Array) -> Array:
        names = path_of(keys).split("/")
        if names[-1] == "length" or ("cross" in names and not cross):
            return array
        return fn(array, array.ndim - 4)  # [B, G, S, K], or stacked [L, B, G, S, K]

    return jax.tree_util.tree_map_with_path(mapped, cache)


def drop_ones(cache: PyTree) -> PyTree:
    """Keys and values without their axes B and G where these are 1; see `while_decoding`."""

    def dropped(array: Array, axis: int) -> Array:
        ones = [i for i in (axis, axis + 1) if array.shape[i] == 1]
        return jnp.squeeze(array, ones)

    return _map_rows(dropped, cache, cross=True)


def while_decoding(
    condition: Callable[[Any], Array], step: Callable[[Any], Any], start: Any
) -> Any:
    """``jax.lax.while_loop`` over a tuple with a field ``cache``, which is updated in place.

    Between steps keys and values have no axes of size 1, as `fmjax.nn.attention.write_positions`
    explains.
    """
    shapes = jax.tree.map(jnp.shape, start.cache)

    def packed(carry: Any) -> Any:
        return carry._replace(cache=drop_ones(carry.cache))

    def unpacked(carry: Any) -> Any:
        return carry._replace(cache=jax.tree.map(jnp.reshape, carry.cache, shapes))

    end = jax.lax.while_loop(
        lambda carry: condition(carry._replace(cache=None)),
        lambda carry: packed(step(unpacked(carry))),
        packed(start),
    )
    return unpacked(end)


def repeat_rows(cache: PyTree, context: Context, times: int) -> tuple[PyTree, Context]:
    """Every row `times` times in a row: B becomes B * times."""
    if times == 1:
        return cache, context

    def repeated(array: Array, axis: int = 0) -> Array:
        return jnp.repeat(array, times, axis=axis)

    return _map_rows(repeated, cache, cross=True), Context(
        repeated(context.padding),
        None if context.mask is None else repeated(context.mask),
        None if context.encoder_mask is None else repeated(context.encoder_mask),
        context.last_position,
    )


def take_rows(cache: PyTree, rows: Array) -> PyTree:
    """The cache with other rows, int32 [B], of the same prompts: the encoder's stay."""

    def taken(array: Array, axis: int) -> Array:
        return jnp.take(array, rows, axis=axis, mode="clip")  # none is out of bounds

    return _map_rows(taken, cache, cross=False)
