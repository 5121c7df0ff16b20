"""The two sides of an encoder-decoder: input checks, masks, the cross-attention and its cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.attention import Attention, Cache, cache_room
from fmjax.nn.embed import Embed, token_shape
from fmjax.nn.mask import Mask, check_mask, make_attention_mask
from fmjax.nn.stack import StackOutput
from fmjax.types import Output, PyTree


class Tokens(NamedTuple):
    """One side's tokens, checked.

    Args:
        ids: int [B, T] or None.
        embeds: [B, T, D] or None; exactly one of the two is there.
        length: T.
        capacity: S, the key positions: T, or with a cache its whole length.
        start: positions already in the cache, int32 [] or 0.
        mask: bool [B | 1, 1, T | 1, S] or None.
        train: whether dropout is on.
        output_hidden_states, output_attentions: what else to return.
        position_ids: int [B | 1, T], or None: counted from what is in the cache.
        attention_mask: what `mask` was made of, [B, S], [B, T, S] or None.
    """

    ids: Array | None
    embeds: Array | None
    length: int
    capacity: int
    start: Array | int
    mask: Mask | None
    train: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False
    position_ids: Array | None = None
    attention_mask: Array | None = None

    def positions(self) -> Array:
        """int [B | 1, T]."""
        if self.position_ids is not None:
            return self.position_ids
        return self.start + jnp.arange(self.length)[None]


class Shared(NamedTuple):
    """What every block reads.

    Args:
        mask: of self-attention, bool [B | 1, 1, T | 1, S] or None.
        start: positions already in the cache, int32 [] or 0.
        encoder: [B, S, D], or None where the cache has its keys and values.
        encoder_mask: bool [B, 1, 1, S] or None.
        bias: added to the scores of self-attention, [B | 1, H, T, S] or None.
    """

    mask: Mask | None
    start: Array | int = 0
    encoder: Array | None = None
    encoder_mask: Array | None = None
    bias: Array | None = None


class Flags(NamedTuple):
    """How a stack is run: the fields that every block has beside its config."""

    train: bool
    output_hidden_states: bool
    output_attentions: bool


def tokens(
    ids: Array | None,
    embeds: Array | None,
    attention_mask: Array | None,
    flags: Flags,
    *,
    prefix: str,
    causal: bool,
    cache: PyTree = None,
    max_positions: int | None = None,
) -> Tokens:
    """One side's inputs, checked, with their self-attention mask.

    Args:
        ids: int [B, T] or None.
        embeds: [B, T, D] or None.
        attention_mask: [B, S] or [B, T, S]; S is T, or with a cache its whole length.
        flags: how the stack is run.
        prefix: "" or "decoder_", what the arguments' names start with.
        causal: whether position t sees only positions up to t.
        cache: of the stack, or None.
        max_positions: how many positions there are; None where any position is computed.

    Raises:
        ValueError: the inputs contradict each other or the model.
    """
    shape = token_shape(ids, embeds, prefix)
    if len(shape) != 2:
        raise ValueError(f"{prefix}input_ids must be [B, T]; got token ids of shape {shape}")
    length, capacity, start = shape[-1], shape[-1], 0
    if cache is not None:
        start, capacity = cache_room(cache, length)
    if max_positions is not None and capacity > max_positions:
        raise ValueError(
            f"{capacity} positions of {prefix}input_ids are more than the model's {max_positions}; "
            "truncate the input"
        )
    check_mask(attention_mask, length, capacity, shape[0])
    mask = make_attention_mask(
        attention_mask, query_length=length, key_length=capacity, causal=causal, start=start
    )
    return Tokens(ids, embeds, length, capacity, start, mask, *flags, attention_mask=attention_mask)


def cross_mask(attention_mask: Array | None, length: int | None) -> Array | None:
    """Which of the encoder's positions the decoder may see: bool [B, 1, 1, S], or None for all.

    Args:
        attention_mask: [B, S], 1 = token, 0 = padding.
        length: S, or None where the encoder's states are not at hand.

    Raises:
        ValueError: the mask has another shape.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or length not in (None, attention_mask.shape[-1]):
        wanted = "S" if length is None else length
        raise ValueError(
            f"attention_mask has shape {attention_mask.shape}; for cross-attention it must be "
            f"[B, {wanted}]"
        )
    return attention_mask.astype(bool)[:, None, None, :]


def shift_right(ids: Array, start_token_id: int) -> Array:
    """int [..., T]: the ids one position later, behind the start token; the last one drops out."""
    start = jnp.full_like(ids[..., :1], start_token_id)
    return jnp.concatenate([start, ids[..., :-1]], axis=-1)


def own_cache(cache: PyTree) -> Cache | None:
    """The self-attention's part of a layer's cache, which a decoder alone has nothing beside."""
    return cache["self"] if isinstance(cache, dict) else cache


def cross_attention(
    attention: Attention, hidden: Array, shared: Any, cache: PyTree
) -> tuple[Array, Array | None, Cache | None]:
    """Attention to the encoder's states, or to the keys and values that a layer's cache keeps.

    Args:
        attention: the layer.
        hidden: [B, T, D].
        shared: ``encoder``, the states, which are then written to the cache (None where they are
            there already), and ``encoder_mask``.
        cache: the layer's, ``{"self": Cache, "cross": Cache}``, or None.

    Returns:
        ([B, T, D], probabilities or None, what belongs into the cache under "cross").
    """
    kept = cache["cross"] if isinstance(cache, dict) else None
    update, probabilities, made = attention(
        hidden,
        mask=shared.encoder_mask,
        others=shared.encoder,
        fixed=kept if shared.encoder is None else None,
    )
    if kept is None or made is None:
        return update, probabilities, None
    return (
        update,
        probabilities,
        Cache(made.key.astype(kept.key.dtype), made.value.astype(kept.value.dtype)),
    )


def empty_seq2seq_cache(
    num_layers: int,
    shape: tuple[int, int, int, int],
    encoder_length: int,
    *,
    dtype: Any,
    scan: bool,
) -> dict[str, Any]:
    """A decoder's cache that holds nothing yet: per layer ``{"self": Cache, "cross": Cache}``.

    Args:
        num_layers: L, of the decoder.
        shape: [B, G, S, K] of self-attention.
        encoder_length: positions of the encoder's states.
        dtype: of keys and values.
        scan: whether layers are stacked along a leading axis.
    """

    def empty(shape: tuple[int, ...]) -> Cache:
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    lead = (num_layers,) if scan else ()
    own = (*lead, *shape)
    cross = (*lead, *shape[:2], encoder_length, shape[3])
    names = ["layers"] if scan else [f"layers_{i}" for i in range(num_layers)]
    layers = {name: {"self": empty(own), "cross": empty(cross)} for name in names}
    return {"length": jnp.zeros((), jnp.int32), **layers}


def stack_output(side: Tokens, embedded: Array, stack: StackOutput, hidden: Array) -> Output:
    """What a stack of blocks returns, as an `Output` without logits.

    Args:
        side: what it was run on.
        embedded: [B, T, D], what went into the first block.
        stack: of `fmjax.nn.stack.run_stack`.
        hidden: [B, T, D], the last hidden state, past the last norm.
    """
    layers = stack.layers
    out = Output(last_hidden_state=hidden)
    if side.output_hidden_states:
        inner = tuple(layer.hidden_state for layer in layers[:-1])
        out = dataclasses.replace(out, hidden_states=(embedded, *inner, hidden))
    if side.output_attentions:
        out = dataclasses.replace(out, attentions=tuple(layer.attentions for layer in layers))
        if layers[0].cross_attentions is not None:
            crossed = tuple(layer.cross_attentions for layer in layers)
            out = dataclasses.replace(out, cross_attentions=crossed)
    if stack.cache is not None:
        cache = {"length": side.start + side.length, **stack.cache}
        out = dataclasses.replace(out, cache=cache)
    return out


class Words(nn.Module):
    """A table of word vectors, named as in every family: ``embed/word/embedding``.

    Args:
        vocab_size: V.
        width: D.
        init: initializer of the table.
        padding_index: see `fmjax.nn.embed.Embed`.
        scale: factor of the vectors.
    """

    vocab_size: int
    width: int
    init: Callable[..., Array]
    padding_index: int | None = None
    scale: float = 1.0

    def setup(self) -> None:
        self.word = Embed(self.vocab_size, self.width, self.init, self.padding_index)

    def __call__(self, side: Tokens) -> Array:
        """[B, T, D]: the vectors of the ids, or those given in their place, as they are."""
        if side.ids is None:
            assert side.embeds is not None  # `tokens` has checked that there is exactly one
            return side.embeds
        vectors = self.word(side.ids)
        return vectors if self.scale == 1.0 else vectors * jnp.asarray(self.scale, vectors.dtype)
