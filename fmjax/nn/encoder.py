"""What encoder families share: inputs, positions, masks, the stack of blocks, hidden states."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.attention import cache_room, empty_cache, prefix_length
from fmjax.nn.checks import check_head
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed, token_shape
from fmjax.nn.linear import Dense
from fmjax.nn.mask import Mask, check_mask, make_attention_mask
from fmjax.nn.norm import LayerNorm
from fmjax.nn.stack import StackOutput, run_stack
from fmjax.types import Output, PyTree, Remat


class Inputs(NamedTuple):
    """What a call was given, checked; for multiple choice B is B * N.

    Args:
        input_ids: int [B, T] or None.
        inputs_embeds: [B, T, D] or None; exactly one of the two is there.
        attention_mask: [B, S], [B, T, S] or None.
        token_type_ids: int [B, T] or None.
        position_ids: int [B | 1, T].
        encoder: states for cross-attention [B, S, D], or None.
        encoder_mask: bool [B, 1, 1, S] or None.
        batch_shape: (B, T), or (B, N, T).
        capacity: S, T without a cache.
        start: positions already in the cache, int32 [] or 0.
        train: whether dropout is on.
        extra: what one family takes besides.
    """

    input_ids: Array | None
    inputs_embeds: Array | None
    attention_mask: Array | None
    token_type_ids: Array | None
    position_ids: Array
    encoder: Array | None
    encoder_mask: Array | None
    batch_shape: tuple[int, ...]
    capacity: int
    start: Array | int
    train: bool
    extra: PyTree = None

    @property
    def length(self) -> int:
        """T."""
        return self.batch_shape[-1]

    def mask(self, *, causal: bool = False, window: int | None = None) -> Mask | None:
        """Which keys each query may see; None for all."""
        return make_attention_mask(
            self.attention_mask,
            query_length=self.length,
            key_length=self.capacity,
            causal=causal,
            start=self.start,
            window=window,
        )


class Shared(NamedTuple):
    """What every block reads.

    Args:
        mask: of self-attention, or None.
        start: positions already in the cache, int32 [].
        encoder: [B, S, D] or None.
        encoder_mask: bool [B, 1, 1, S] or None.
        bias: added to the scores of self-attention, broadcastable to [B, H, T, S], or None.
        rotary: tables by which queries and keys are rotated, or None.
        extra: what one family's blocks read besides.
    """

    mask: Mask | Array | None
    start: Array | int
    encoder: Array | None
    encoder_mask: Array | None
    bias: Array | None = None
    rotary: tuple[Array, Array] | None = None
    extra: PyTree = None


class TextEmbeddings(nn.Module):
    """Word, position and token-type vectors, summed, normed and dropped.

    Args:
        vocab_size: V.
        width: of the tables.
        epsilon: of the layer norm.
        dropout_rate: after the norm.
        embedding_init: initializer of the tables and of the projection.
        positions: rows of the position table; 0 for none.
        token_types: rows of the token-type table; 0 for none.
        padding_index: row of the word table that is not trained; None for none.
        position_padding_index: the same of the position table.
        position_init: initializer of the position table; None is `embedding_init`.
        project: the width that a dense layer brings the sum to at the end; None for no such layer.
        normed: whether there is a norm.
    """

    vocab_size: int
    width: int
    epsilon: float
    dropout_rate: float
    embedding_init: Callable[..., Array]
    positions: int = 0
    token_types: int = 0
    padding_index: int | None = None
    position_padding_index: int | None = None
    position_init: Callable[..., Array] | None = None
    project: int | None = None
    normed: bool = True

    def setup(self) -> None:
        init = self.embedding_init
        self.word = Embed(self.vocab_size, self.width, init, self.padding_index)
        if self.positions:
            position_init = init if self.position_init is None else self.position_init
            self.position = Embed(
                self.positions, self.width, position_init, self.position_padding_index
            )
        if self.token_types:
            self.token_type = Embed(self.token_types, self.width, init)
        if self.normed:
            self.norm = LayerNorm(self.epsilon)
        self.dropout = Dropout(self.dropout_rate)
        if self.project is not None:
            self.projection = Dense(self.project, kernel_init=init)

    def __call__(self, inputs: Inputs) -> Array:  # [B, T] -> [B, T, D]
        x = self.total(inputs)
        x = self.dropout(self.norm(x) if self.normed else x, inputs.train)
        return x if self.project is None else self.projection(x)

    def total(self, inputs: Inputs) -> Array:
        """The sum of the vectors, [B, T, D]."""
        x = inputs.inputs_embeds
        if x is None:
            x = self.word(inputs.input_ids)  # pyright: ignore[reportArgumentType]
        if self.token_types:
            types = inputs.token_type_ids
            x = x + self.token_type(jnp.zeros((1, 1), jnp.int32) if types is None else types)
        if self.positions:
            x = x + self.position(inputs.position_ids)
        return x


class Encoder(nn.Module):
    """An encoder, or with ``is_decoder`` a causal decoder, with one head.

    A family subclasses it as its ``Model`` and gives `block`, `head_module`, `heads` and
    `embeddings`, and overrides what differs. Its blocks are called ``(hidden, cache, index,
    shared)`` (see `fmjax.nn.stack.run_stack`) and have the fields of `block_fields`; its head
    module is called ``(hidden, pooled, inputs, word, output_logits=...) -> Output``.

    Args:
        config: the family's.
        head: a key of the family's ``HEADS``.
        scan: weights stacked over layers (``layers/...`` [L, ...]) and one compiled block.
        remat: what the backward pass recomputes, as `fmjax.types.Remat` says.
    """

    config: Any
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    block: ClassVar[type[nn.Module]]
    head_module: ClassVar[type[nn.Module]]
    heads: ClassVar[Mapping[str, str]]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_hidden_layers

    @property
    def cache_shape(self) -> tuple[int, int]:
        """(G, K): key-value heads and their size."""
        heads = self.config.num_attention_heads
        return heads, self.config.hidden_size // heads

    @property
    def max_positions(self) -> int | None:
        """How many positions there are; None where any position is computed."""
        return self.config.max_position_embeddings - self.position_offset

    @property
    def position_offset(self) -> int:
        """The row of the position table that a sequence's first token has."""
        return 0

    @property
    def family(self) -> str:
        """The name of the family's file, for errors."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def embeddings(self) -> nn.Module:
        """The module that makes [B, T, D] from `Inputs`; its table of words is ``word``."""
        raise NotImplementedError

    def default_positions(self, input_ids: Array | None, start: Array | int, length: int) -> Array:
        """int [B | 1, T]: positions where none are given."""
        return start + self.position_offset + jnp.arange(length)[None]

    def shared(self, inputs: Inputs, embedded: Array) -> PyTree:
        """What every block reads: masks, biases, rotary tables."""
        mask = inputs.mask(causal=self.config.is_decoder)
        return Shared(mask, inputs.start, inputs.encoder, inputs.encoder_mask)

    def finish(self, hidden: PyTree) -> Array:
        """What follows the last block, to [B, T, D]."""
        return hidden

    def states(
        self, embedded: Array, layers: tuple[Array | None, ...], hidden: Array
    ) -> tuple[Array | None, ...]:
        """The ``hidden_states``: of the embeddings, the layers' outputs and what `finish` gave."""
        return (embedded, *layers[:-1], hidden)

    def pool(self, hidden: Array, inputs: Inputs) -> Array | None:
        """[B, T, D] -> [B, D]: one vector a sequence, for the heads that take it."""
        return None

    def setup(self) -> None:
        check_head(self, self.heads)
        self.embed = self.embeddings()
        self.outputs = self.head_module(
            self.config,  # pyright: ignore[reportCallIssue]
            self.head,
            name="head",
        )

    def unembed(self, hidden: Array) -> Array:
        """Logits of any last hidden states, by a vocabulary head: [..., D] -> [..., V] float32."""
        return self.outputs.predictions(hidden, self.embed.word)

    @nn.compact
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        encoder_hidden_states: Array | None = None,
        encoder_attention_mask: Array | None = None,
        cache: PyTree = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
    ) -> Output:
        """Runs the model; for multiple choice every [B, T] below is [B, N, T].

        Args:
            input_ids: int [B, T].
            attention_mask: [B, T] (1 = token, 0 = padding) or [B, T, S]; with a cache, over the
                cache's whole length. None keeps everything.
            token_type_ids: int [B, T]; None is all 0. Families without token types ignore it.
            position_ids: int [B, T], rows of the position table as in PyTorch; with a cache they
                count from 0 in every family. None counts from the first token's, or from the
                cache's length.
            inputs_embeds: [B, T, D], in place of `input_ids`.
            encoder_hidden_states: [B, S, D], for cross-attention. With a cache made for them they
                are needed in the first call only.
            encoder_attention_mask: [B, S].
            cache: from `init_cache` or the last output; needs ``is_decoder``.
            train: whether dropout is on; it needs ``rngs={"dropout": key}``.
            output_hidden_states: whether ``hidden_states`` is returned.
            output_attentions: whether ``attentions`` is returned.
            output_logits: whether logits over the vocabulary are returned; if not, the heads that
                have them return ``last_hidden_state``, whose logits `unembed` makes.

        Raises:
            ValueError: inputs that contradict each other or the config.
        """
        inputs = self.check(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            cache,
            train,
        )
        return self.run(
            inputs,
            cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_logits=output_logits,
        )

    def check(
        self,
        input_ids: Array | None,
        attention_mask: Array | None,
        token_type_ids: Array | None,
        position_ids: Array | None,
        inputs_embeds: Array | None,
        encoder_hidden_states: Array | None,
        encoder_attention_mask: Array | None,
        cache: PyTree,
        train: bool,
    ) -> Inputs:
        """The arguments of a call, checked and completed.

        Raises:
            ValueError: they contradict each other or the config.
        """
        config = self.config
        batch_shape = token_shape(input_ids, inputs_embeds)
        if cache is not None and not config.is_decoder:
            raise ValueError(
                f"a cache needs a causal model, which this {self.family} is not (is_decoder=False)"
            )
        if encoder_hidden_states is not None and not config.add_cross_attention:
            raise ValueError("encoder_hidden_states needs add_cross_attention=True in the config")
        choices = self.head == "multiple_choice"
        if len(batch_shape) != 2 + choices:
            raise ValueError(
                f"{self.head} takes {'[B, N, T]' if choices else '[B, T]'}; got token ids of "
                f"shape {batch_shape}"
            )
        if choices:
            per_choice = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
                None if x is None else x.reshape(-1, *x.shape[2:]) for x in per_choice
            )  # [B, N, T] -> [B * N, T]
        start, capacity = 0, batch_shape[-1]
        if cache is not None:
            start, capacity = cache_room(cache, batch_shape[-1])
        check_mask(attention_mask, batch_shape[-1], capacity, math.prod(batch_shape[:-1]))
        # A cache may have columns to spare, for padding, where positions are given.
        spare = cache is not None and position_ids is not None
        before = prefix_length(self.variables)
        most = self.max_positions
        if most is not None and before + capacity > most and not spare:
            raise ValueError(
                f"{before + capacity} positions are more than the model's {most} "
                f"(max_position_embeddings={config.max_position_embeddings}); truncate the input"
            )
        if position_ids is None:
            position_ids = self.default_positions(input_ids, start, batch_shape[-1])
        elif cache is not None:
            position_ids = position_ids + self.position_offset
        if before:
            position_ids = position_ids + before
        encoder_mask = None
        if encoder_attention_mask is not None:
            encoder_mask = encoder_attention_mask.astype(bool)[:, None, None, :]  # [B, 1, 1, S]
        return Inputs(
            input_ids,
            inputs_embeds,
            attention_mask,
            token_type_ids,
            position_ids,
            encoder_hidden_states,
            encoder_mask,
            batch_shape,
            capacity,
            start,
            train,
        )

    def run(
        self,
        inputs: Inputs,
        cache: PyTree,
        *,
        output_hidden_states: bool,
        output_attentions: bool,
        output_logits: bool,
    ) -> Output:
        """Embeddings, blocks, pooling and head; to be called in a compact method."""
        embedded = self.embed(inputs)  # [B, T, D]
        hidden, layers, new_cache = self.run_blocks(
            embedded,
            self.shared(inputs, embedded),
            cache,
            {
                "config": self.config,
                "train": inputs.train,
                "output_hidden_states": output_hidden_states,
                "output_attentions": output_attentions,
            },
        )
        hidden = self.finish(hidden)
        if new_cache is not None:
            new_cache = {"length": inputs.start + inputs.length, **new_cache}
        out = self.outputs(
            hidden,
            self.pool(hidden, inputs),
            inputs,
            self.embed.word,
            output_logits=output_logits,
        )
        if output_hidden_states:
            inner = tuple(layer.hidden_state for layer in layers)
            out = dataclasses.replace(out, hidden_states=self.states(embedded, inner, hidden))
        if output_attentions:
            out = dataclasses.replace(out, attentions=tuple(layer.attentions for layer in layers))
        if layers[0].cross_attentions is not None:
            crossed = tuple(layer.cross_attentions for layer in layers)
            out = dataclasses.replace(out, cross_attentions=crossed)
        return dataclasses.replace(out, cache=new_cache)

    def run_blocks(
        self, hidden: Array, shared: PyTree, cache: PyTree, fields: dict[str, Any]
    ) -> StackOutput:
        """The stack of blocks, as a loop or a scan; to be called in a compact method."""
        return run_stack(
            self.block,
            fields,
            hidden,
            shared,
            num_layers=self.num_layers,
            cache=cache,
            scan=self.scan,
            remat=self.remat,
        )

    def init_cache(
        self,
        batch_size: int,
        length: int,
        encoder_length: int | None = None,
        *,
        dtype: Any = jnp.float32,
    ) -> PyTree:
        """An empty cache; its key dtype should be the weights'.

        Args:
            batch_size: B.
            length: positions it has room for.
            encoder_length: S of the ``encoder_hidden_states``, whose keys and values are then kept
                too; None keeps none.
            dtype: of keys and values.
        """
        groups, size = self.cache_shape
        cache = empty_cache(
            self.num_layers, (batch_size, groups, length, size), dtype=dtype, scan=self.scan
        )
        if encoder_length is None:
            return cache
        shape = (batch_size, groups, encoder_length, size)
        cross = empty_cache(self.num_layers, shape, dtype=dtype, scan=self.scan)
        position = cache.pop("length")
        both = {name: {"self": cache[name], "cross": cross[name]} for name in cache}
        return {"length": position, **both}
