"""What encoder-decoder families share: input checks, masks, the cache, the frame, the heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.attention import Attention, Cache, cache_capacity, make_attention_mask
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.heads import Unembedding
from fmjax.nn.linear import Dense
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
    """

    ids: Array | None
    embeds: Array | None
    length: int
    capacity: int
    start: Array | int
    mask: Array | None
    train: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False

    def positions(self) -> Array:
        """int [1, T], counted from what is in the cache."""
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

    mask: Array | None
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
    if (ids is None) == (embeds is None):
        raise ValueError(f"give exactly one of {prefix}input_ids and {prefix}inputs_embeds")
    shape = ids.shape if ids is not None else embeds.shape[:-1]  # pyright: ignore
    if len(shape) != 2:
        raise ValueError(f"{prefix}input_ids must be [B, T]; got token ids of shape {shape}")
    length, capacity, start = shape[-1], shape[-1], 0
    if cache is not None:
        start, capacity = cache["length"], cache_capacity(cache)
    if max_positions is not None and capacity > max_positions:
        raise ValueError(
            f"{capacity} positions of {prefix}input_ids are more than the model's {max_positions}; "
            "truncate the input"
        )
    mask = make_attention_mask(
        attention_mask, query_length=length, key_length=capacity, causal=causal, start=start
    )
    return Tokens(ids, embeds, length, capacity, start, mask, *flags)


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
    attention: Attention, hidden: Array, shared: Shared, cache: PyTree
) -> tuple[Array, Array | None, Cache | None]:
    """Attention to the encoder's states, or to the keys and values that a layer's cache keeps.

    Args:
        attention: the layer.
        hidden: [B, T, D].
        shared: with the encoder's states, which are then written to the cache; without, they must
            be there.
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


class SentenceHead(nn.Module):
    """Scores of a sequence from one of its vectors: dense, tanh, dense, with dropout before each.

    Args:
        num_labels: C.
        dropout_rate: before either layer.
        kernel_init: initializer of the kernels.
    """

    num_labels: int
    dropout_rate: float
    kernel_init: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:  # [B, D] -> [B, C] float32
        x = Dropout(self.dropout_rate)(x, train)
        x = jnp.tanh(Dense(x.shape[-1], True, self.kernel_init, name="dense")(x))
        x = Dropout(self.dropout_rate)(x, train)
        return Dense(self.num_labels, True, self.kernel_init, name="out")(x).astype(jnp.float32)


class EncoderDecoder(nn.Module):
    """An encoder, a decoder that attends to its states, and one head.

    A family subclasses it as its ``Model``, makes its modules in ``setup``, calls
    ``super().setup()`` there, which makes the head, and gives the methods below that raise
    NotImplementedError.

    Args:
        config: the family's.
        head: "model", "seq2seq_lm", "sequence_classification", "question_answering", or of the
            encoder alone "encoder" and "token_classification".
        scan: weights stacked over layers and one compiled block for each of the two stacks.
        remat: blocks are recomputed in the backward pass.
    """

    config: Any
    head: str = "model"
    scan: bool = False
    remat: bool = False

    @property
    def max_positions(self) -> int | None:
        """How many positions either side has; None where any position is computed."""
        return None

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """(L, H, K): the decoder's layers, heads and head size."""
        raise NotImplementedError

    @property
    def word(self) -> Embed:
        """The table of the decoder's word vectors, which the vocabulary head may be tied to."""
        return self.embed.word

    @property
    def encoder_alone(self) -> bool:
        """Whether the head reads the encoder alone; then there is no decoder."""
        return self.head in ("encoder", "token_classification")

    @property
    def head_init(self) -> Callable[..., Array]:
        """Initializer of the head's kernels."""
        return nn.initializers.normal(self.config.init_std)

    def default_decoder_ids(self, input_ids: Array, attention_mask: Array | None) -> Array | None:
        """int [B, T]: what is decoded where only the encoder's tokens are given; None for none."""
        return None

    def run_encoder(self, side: Tokens) -> Output:
        """The encoder's states."""
        raise NotImplementedError

    def run_decoder(
        self, side: Tokens, encoder: Array | None, encoder_mask: Array | None, cache: PyTree
    ) -> Output:
        """The decoder's states; `encoder` [B, S, D] is None where the cache has it."""
        raise NotImplementedError

    def setup(self) -> None:
        config = self.config
        match self.head:
            case "seq2seq_lm" | "causal_lm":
                self.vocabulary = Unembedding(
                    self.word.num_embeddings, config.tie_word_embeddings, False, self.head_init,
                    name="head",
                )  # fmt: skip
            case "sequence_classification":
                self.sentence = SentenceHead(
                    len(config.id2label), config.classifier_dropout, self.head_init, name="head"
                )
            case "question_answering":
                self.classifier = Dense(2, True, self.head_init, name="head")
            case "token_classification":
                labels = len(config.id2label)
                self.classifier = Dense(labels, True, self.head_init, name="head")
                self.drop = Dropout(config.classifier_dropout)

    def unembed(self, hidden: Array) -> Array:
        """Logits of the decoder's last hidden states: [..., D] -> [..., V] float32."""
        return self.vocabulary(hidden, self.word)

    def encode(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """The encoder alone: ``last_hidden_state`` [B, S, D] and what else is asked for."""
        side = tokens(
            input_ids,
            inputs_embeds,
            attention_mask,
            Flags(train, output_hidden_states, output_attentions),
            prefix="",
            causal=False,
            max_positions=self.max_positions,
        )
        return self.run_encoder(side)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        encoder_outputs: Array | None = None,
        inputs_embeds: Array | None = None,
        decoder_inputs_embeds: Array | None = None,
        cache: PyTree = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
    ) -> Output:
        """Runs the model.

        Args:
            input_ids: int [B, S], the encoder's tokens.
            attention_mask: [B, S], 1 = token, 0 = padding, of the encoder's tokens; None keeps
                everything.
            decoder_input_ids: int [B, T].
            decoder_attention_mask: [B, T]; with a cache, over the cache's whole length.
            encoder_outputs: [B, S, D], the states that `encode` returned, in place of `input_ids`.
            inputs_embeds: [B, S, D], in place of `input_ids`.
            decoder_inputs_embeds: [B, T, D], in place of `decoder_input_ids`.
            cache: from `init_cache` or the last output. The first call with it also gets the
                encoder's tokens or states; it keeps their keys and values, and later calls get
                neither.
            train: whether dropout is on; it needs ``rngs={"dropout": key}``.
            output_hidden_states: whether hidden states of both sides are returned.
            output_attentions: whether attentions of both sides are returned.
            output_logits: whether the head "seq2seq_lm" returns logits; if not, it returns
                ``last_hidden_state``, whose logits `unembed` makes.

        Raises:
            ValueError: inputs that contradict each other or the config.
        """
        flags = Flags(train, output_hidden_states, output_attentions)
        if self.encoder_alone:
            refused = (
                decoder_input_ids, decoder_attention_mask, encoder_outputs, decoder_inputs_embeds,
                cache,
            )  # fmt: skip
            if any(x is not None for x in refused):
                raise ValueError(f"the head {self.head!r} has no decoder: give no inputs for one")
            return self.encoder_output(input_ids, attention_mask, inputs_embeds, flags)
        given = [x is not None for x in (input_ids, inputs_embeds, encoder_outputs)]
        if sum(given) > 1 or (not any(given) and cache is None):
            raise ValueError(
                "give exactly one of input_ids, inputs_embeds and encoder_outputs (none where the "
                "cache has the encoder's keys and values already)"
            )
        if cache is not None and self.head not in ("model", "seq2seq_lm"):
            raise ValueError(f"the head {self.head!r} does not decode; drop the cache")
        encoded = Output(last_hidden_state=encoder_outputs)
        if encoder_outputs is None and any(given):
            encoded = self.encode(input_ids, attention_mask, inputs_embeds, **flags._asdict())
        states = encoded.last_hidden_state
        if cache is not None and states is not None:
            _check_encoder_length(cache, states.shape[1])
        if decoder_input_ids is None and decoder_inputs_embeds is None and input_ids is not None:
            decoder_input_ids = self.default_decoder_ids(input_ids, attention_mask)
        side = tokens(
            decoder_input_ids,
            decoder_inputs_embeds,
            decoder_attention_mask,
            flags,
            prefix="decoder_",
            causal=True,
            cache=cache,
            max_positions=self.max_positions,
        )
        encoder_mask = cross_mask(attention_mask, None if states is None else states.shape[1])
        decoded = self.run_decoder(side, states, encoder_mask, cache)
        out = self.head_output(decoded, input_ids, attention_mask, train, output_logits)
        return dataclasses.replace(
            out,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=states,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            cache=decoded.cache,
        )

    def encoder_output(
        self,
        input_ids: Array | None,
        attention_mask: Array | None,
        inputs_embeds: Array | None,
        flags: Flags,
    ) -> Output:
        """What a head of the encoder alone returns."""
        out = self.encode(input_ids, attention_mask, inputs_embeds, **flags._asdict())
        if self.head == "encoder":
            return out
        hidden = out.last_hidden_state
        assert hidden is not None  # every encoder has one
        logits = self.classifier(self.drop(hidden, flags.train)).astype(jnp.float32)  # [B, S, C]
        return dataclasses.replace(out, logits=logits, last_hidden_state=None)

    def head_output(
        self,
        decoded: Output,
        input_ids: Array | None,
        attention_mask: Array | None,
        train: bool,
        output_logits: bool,
    ) -> Output:
        """What the head makes of the decoder's last hidden state."""
        hidden = decoded.last_hidden_state
        assert hidden is not None  # every decoder has one
        match self.head:
            case "model":
                return Output(last_hidden_state=hidden)
            case "seq2seq_lm":
                if not output_logits:
                    return Output(last_hidden_state=hidden)
                return Output(logits=self.unembed(hidden))
            case "sequence_classification":
                if input_ids is None or input_ids.shape != hidden.shape[:2]:
                    raise ValueError(
                        "sequence_classification reads the decoder where input_ids end: give "
                        "input_ids, and decoder inputs of the same shape or none"
                    )
                last = last_end(input_ids, attention_mask, self.config.eos_token_id)
                pooled = hidden[jnp.arange(hidden.shape[0]), last]  # [B, D]
                return Output(logits=self.sentence(pooled, train))
            case "question_answering":
                logits = self.classifier(hidden).astype(jnp.float32)
                start, end = jnp.moveaxis(logits, -1, 0)  # [B, T] each
                return Output(start_logits=start, end_logits=end)
        raise ValueError(f"{type(self).__module__} has no head {self.head!r}")

    def init_cache(
        self, batch_size: int, length: int, encoder_length: int, dtype: Any = jnp.float32
    ) -> PyTree:
        """An empty cache for `length` decoded positions; its dtype should be the weights'.

        Args:
            batch_size: B.
            length: decoder positions there is room for.
            encoder_length: S of the encoder's states.
            dtype: of keys and values.
        """
        layers, heads, size = self.cache_shape
        shape = (batch_size, heads, length, size)
        return empty_seq2seq_cache(layers, shape, encoder_length, dtype=dtype, scan=self.scan)


def _check_encoder_length(cache: dict[str, Any], length: int) -> None:
    layer = next(value for name, value in cache.items() if name.startswith("layers"))
    if (room := jax.tree.leaves(layer["cross"])[0].shape[-2]) != length:
        raise ValueError(
            f"the cache is for {room} encoder positions and got {length}; make it by "
            f"init_cache(..., encoder_length={length})"
        )


def last_end(input_ids: Array, attention_mask: Array | None, eos_token_id: int | None) -> Array:
    """int32 [B]: the last end-of-sequence token of each row, where a classifier reads.

    A row that has none is read at its last token, as none can be refused inside a compiled step.
    """
    length = input_ids.shape[-1]
    real = jnp.ones_like(input_ids, bool)
    if attention_mask is not None:
        real = attention_mask.astype(bool)
    is_end = input_ids == (-1 if eos_token_id is None else eos_token_id)
    keep = jnp.where(is_end.any(axis=-1, keepdims=True), is_end, real)
    return jnp.argmax(jnp.where(keep, jnp.arange(length), -1), axis=-1)
