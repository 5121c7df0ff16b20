"""The frame of encoder-decoder families: one call, encoding alone, cached decoding, the heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.attention import empty_cache
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.heads import Unembedding
from fmjax.nn.linear import Dense
from fmjax.nn.sides import Flags, Tokens, cross_mask, empty_seq2seq_cache, tokens
from fmjax.types import Output, PyTree, Remat


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
        remat: what the backward pass recomputes, as `fmjax.types.Remat` says.
    """

    config: Any
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    vocabulary_heads: ClassVar[tuple[str, ...]] = ("seq2seq_lm", "causal_lm")
    """Heads that have what makes logits of the vocabulary."""

    @property
    def max_positions(self) -> int | None:
        """How many positions either side has; None where any position is computed."""
        return None

    @property
    def side_positions(self) -> tuple[int | None, int | None]:
        """The same for the encoder and for the decoder, which may differ."""
        return self.max_positions, self.max_positions

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

    def state_mask(self, attention_mask: Array, length: int) -> Array:
        """[B, S] over the encoder's `length` states, of the mask over its inputs."""
        return attention_mask

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
            case head if head in self.vocabulary_heads:
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
        check_source(
            cache, input_ids=input_ids, inputs_embeds=inputs_embeds, encoder_outputs=encoder_outputs
        )
        encoded = Output(last_hidden_state=encoder_outputs)
        if input_ids is not None or inputs_embeds is not None:
            encoded = self.encode(input_ids, attention_mask, inputs_embeds, **flags._asdict())
        if decoder_input_ids is None and decoder_inputs_embeds is None and input_ids is not None:
            decoder_input_ids = self.default_decoder_ids(input_ids, attention_mask)
        return self.decode(
            encoded, attention_mask, decoder_input_ids, decoder_attention_mask,
            decoder_inputs_embeds, cache, flags,
            input_ids=input_ids, output_logits=output_logits,
        )  # fmt: skip

    def decode(
        self,
        encoded: Output,
        attention_mask: Array | None,
        decoder_input_ids: Array | None,
        decoder_attention_mask: Array | None,
        decoder_inputs_embeds: Array | None,
        cache: PyTree,
        flags: Flags,
        *,
        input_ids: Array | None = None,
        output_logits: bool,
    ) -> Output:
        """The decoder and the head on encoded inputs of any kind.

        Args:
            encoded: of the encoder; without a last hidden state where the cache has its keys and
                values.
            attention_mask: [B, S] over the encoder's states, or None.
            decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, cache, output_logits:
                see `__call__`.
            flags: how the stacks are run.
            input_ids: the encoder's tokens where it reads any, for heads that read where they end.

        Raises:
            ValueError: inputs that contradict each other or the head.
        """
        if cache is not None and self.head not in ("model", "seq2seq_lm"):
            raise ValueError(f"the head {self.head!r} does not decode; drop the cache")
        states = encoded.last_hidden_state
        if cache is not None and states is not None:
            _check_encoder_length(cache, states.shape[1])
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
        out = self.head_output(decoded, input_ids, attention_mask, flags.train, output_logits)
        return dataclasses.replace(
            out,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            state_mask=None if attention_mask is None else attention_mask.astype(bool),
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


class WithDecoderAlone(EncoderDecoder):
    """An `EncoderDecoder` with one head more, "causal_lm": the decoder alone, cross-attending if it
    is given states.
    """

    @property
    def alone(self) -> bool:
        """Whether there is no encoder."""
        return self.head == "causal_lm"

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        encoder_outputs: Array | None = None,
        inputs_embeds: Array | None = None,
        decoder_inputs_embeds: Array | None = None,
        position_ids: Array | None = None,
        encoder_hidden_states: Array | None = None,
        encoder_attention_mask: Array | None = None,
        cache: PyTree = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
    ) -> Output:
        """Runs the model; see `EncoderDecoder`.

        The head "causal_lm" takes `input_ids` or `inputs_embeds`, `attention_mask` and `cache` as
        decoder-only models do (`fmjax.nn.decoder.Decoder`), and as the one head

        Args:
            position_ids: int [B, T]; None counts from 0, or from the cache's length.
            encoder_hidden_states: [B, S, D], for cross-attention. With a cache made for them they
                are needed in the first call only.
            encoder_attention_mask: [B, S].

        Raises:
            ValueError: inputs that contradict each other, the head or the config.
        """
        refused = {
            "position_ids": (position_ids, False),
            "encoder_hidden_states": (encoder_hidden_states, False),
            "encoder_attention_mask": (encoder_attention_mask, False),
            "decoder_input_ids": (decoder_input_ids, True),
            "decoder_attention_mask": (decoder_attention_mask, True),
            "decoder_inputs_embeds": (decoder_inputs_embeds, True),
            "encoder_outputs": (encoder_outputs, True),
        }
        if names := [
            name for name, (x, alone) in refused.items() if x is not None and alone == self.alone
        ]:
            raise ValueError(f"the head {self.head!r} does not take {', '.join(names)}")
        if not self.alone:
            return super().__call__(
                input_ids, attention_mask, decoder_input_ids, decoder_attention_mask,
                encoder_outputs, inputs_embeds, decoder_inputs_embeds, cache,
                train=train, output_hidden_states=output_hidden_states,
                output_attentions=output_attentions, output_logits=output_logits,
            )  # fmt: skip
        side = tokens(
            input_ids,
            inputs_embeds,
            attention_mask,
            Flags(train, output_hidden_states, output_attentions),
            prefix="",
            causal=True,
            cache=cache,
            # A cache may have columns to spare, for padding, where positions are given.
            max_positions=self.max_positions if cache is None or position_ids is None else None,
        )._replace(position_ids=position_ids)
        encoder_mask = cross_mask(encoder_attention_mask, None)
        out = self.run_decoder(side, encoder_hidden_states, encoder_mask, cache)
        if output_logits and self.head == "causal_lm":
            assert out.last_hidden_state is not None  # every decoder has one
            logits = self.unembed(out.last_hidden_state)
            out = dataclasses.replace(out, logits=logits, last_hidden_state=None)
        return out

    def init_cache(
        self,
        batch_size: int,
        length: int,
        encoder_length: int | None = None,
        dtype: Any = jnp.float32,
    ) -> PyTree:
        """An empty cache; see `EncoderDecoder`.

        Args:
            batch_size: B.
            length: decoder positions there is room for.
            encoder_length: S of the encoder's states; None, for the head "causal_lm" alone, keeps
                none.
            dtype: of keys and values.
        """
        if encoder_length is not None:
            return super().init_cache(batch_size, length, encoder_length, dtype)
        if not self.alone:
            raise ValueError(
                f"encoder_length=None for the head {self.head!r}: only 'causal_lm' decodes alone"
            )
        layers, heads, size = self.cache_shape
        return empty_cache(layers, (batch_size, heads, length, size), dtype=dtype, scan=self.scan)


def check_source(cache: PyTree, **sources: Array | None) -> None:
    """Refuses anything but exactly one source of the encoder's states.

    Args:
        cache: of the decoder, which may have their keys and values already, or None.
        sources: by the arguments' names, in the order that an error lists them.

    Raises:
        ValueError: several are given, or none and no cache.
    """
    given = sum(x is not None for x in sources.values())
    if given > 1 or (not given and cache is None):
        *names, last = sources
        raise ValueError(
            f"give exactly one of {', '.join(names)} and {last} (none where the cache has the "
            "encoder's keys and values already)"
        )


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
