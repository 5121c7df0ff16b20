"""What decoder-only families share: inputs, positions, masks, the stack of blocks, the heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.activation import ACTIVATIONS
from fmjax.nn.attention import cache_room, empty_cache, prefix_length
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed, token_shape
from fmjax.nn.heads import Unembedding
from fmjax.nn.linear import Dense
from fmjax.nn.mask import Mask, check_mask, make_attention_mask
from fmjax.nn.sides import empty_seq2seq_cache
from fmjax.nn.stack import run_stack
from fmjax.types import Output, PyTree, Remat


class Inputs(NamedTuple):
    """What a call was given, checked.

    Args:
        input_ids: int [B, T] or None.
        inputs_embeds: [B, T, D] or None; exactly one of the two is there.
        attention_mask: [B, S], [B, T, S] or None.
        position_ids: int [B | 1, T].
        length: T.
        capacity: S, T without a cache.
        start: positions already in the cache, int32 [] or 0.
        train: whether dropout is on.
        extra: what a family takes besides, by name.
    """

    input_ids: Array | None
    inputs_embeds: Array | None
    attention_mask: Array | None
    position_ids: Array
    length: int
    capacity: int
    start: Array | int
    train: bool
    extra: Mapping[str, Any] = MappingProxyType({})

    def embedded(self, word: Embed) -> Array:
        """[B, T, D]: the ids' vectors in this table, or what was given in their place."""
        if self.inputs_embeds is not None:
            return self.inputs_embeds
        assert self.input_ids is not None  # checked: exactly one of the two is there
        return word(self.input_ids)

    def mask(self, window: int | None = None) -> Mask:
        """The causal mask, perhaps of a sliding window."""
        mask = make_attention_mask(
            self.attention_mask,
            query_length=self.length,
            key_length=self.capacity,
            causal=True,
            start=self.start,
            window=window,
        )
        assert mask is not None  # it is causal
        return mask


def config_problems(config: Any, *, width: str, heads: str, act: str | None = None) -> list[str]:
    """What is wrong with a decoder's config, as far as families agree on it.

    Numbers must be positive, rates of dropout below 1, the width a multiple of the heads, the
    activation known and the padding token in the vocabulary.

    Args:
        config: a family's, with ``vocab_size`` and ``pad_token_id``.
        width, heads, act: the names of its fields for D, H and, if there is one, the activation.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    problems = [
        f"{name}={value} must be at least 1"
        for name, value in values.items()
        if type(value) is int and "drop" not in name and not name.endswith("_id") and value < 1
    ]
    problems += [
        f"{name}={value} must be at least 0 and below 1"
        for name, value in values.items()
        if "drop" in name and value is not None and not 0 <= value < 1
    ]
    if values[heads] > 0 and values[width] % values[heads]:
        problems.append(f"{width}={values[width]} is not a multiple of {heads}={values[heads]}")
    if act is not None and values[act] not in ACTIVATIONS:
        problems.append(f"{act}={values[act]!r} is not one of {sorted(ACTIVATIONS)}")
    pad, size = values["pad_token_id"], values["vocab_size"]
    if pad is not None and not -size <= pad < size:
        problems.append(f"pad_token_id={pad} is outside the vocabulary of {size}")
    return problems


class TokenEmbeddings(nn.Module):
    """Word vectors, dropped: the ``embed`` of families whose positions come later.

    Args:
        vocab_size: V.
        width: D.
        embedding_init: initializer of the table.
        padding_index: see `fmjax.nn.embed.Embed`.
        dropout_rate: of the vectors.
    """

    vocab_size: int
    width: int
    embedding_init: Callable[..., Array]
    padding_index: int | None = None
    dropout_rate: float = 0.0

    def setup(self) -> None:
        self.word = Embed(self.vocab_size, self.width, self.embedding_init, self.padding_index)
        self.dropout = Dropout(self.dropout_rate)

    def __call__(self, inputs: Inputs) -> Array:  # [B, T] -> [B, T, D]
        return self.dropout(inputs.embedded(self.word), inputs.train)


class Decoder(nn.Module):
    """A causal model with one head; a family subclasses it as its ``Model``.

    A family gives `block` and the methods below that raise NotImplementedError, makes ``embed``
    and ``final_norm`` (and whatever else) in ``setup``, and calls ``super().setup()`` there, which
    makes the head. Its blocks are called ``(hidden, cache, index, shared)`` (see
    `fmjax.nn.stack.run_stack`) and have the fields of `block_fields`.

    Args:
        config: the family's.
        head: "model", "causal_lm", "sequence_classification", "token_classification" or
            "question_answering".
        scan: weights stacked over layers (``layers/...`` [L, ...]) and one compiled block.
        remat: what the backward pass recomputes, as `fmjax.types.Remat` says.
    """

    config: Any
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    block: ClassVar[type[nn.Module]]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_hidden_layers

    @property
    def max_positions(self) -> int | None:
        """How many positions there are; None where any position is computed."""
        return None

    @property
    def cache_shape(self) -> tuple[int, int]:
        """(G, K): key-value heads and their size."""
        raise NotImplementedError

    @property
    def tied(self) -> bool:
        """Whether the input embedding is the output matrix."""
        return self.config.tie_word_embeddings

    @property
    def lm_bias(self) -> bool:
        """Whether the vocabulary head has a bias."""
        return False

    @property
    def word(self) -> Embed:
        """The table of input embeddings."""
        return self.embed.word

    @property
    def classifier_bias(self) -> bool:
        """Whether the token classifier has a bias (that of sequences never has)."""
        return True

    @property
    def classifier_dropout(self) -> float:
        """Rate before the token classifier."""
        return 0.0

    def embed_inputs(self, inputs: Inputs) -> Array:
        """[B, T, D] from ids (or embeddings) and positions."""
        return self.embed(inputs)

    def shared(self, inputs: Inputs, hidden: Array) -> PyTree:
        """What every block reads: masks, rotary tables, biases."""
        raise NotImplementedError

    def default_positions(self, attention_mask: Array | None, start: Array | int, length: int):
        """int [B | 1, T]: positions where none are given."""
        return start + jnp.arange(length)[None]

    def finish(self, hidden: Array) -> Array:
        """[B, T, D] -> [B, T, D]: what follows the last block."""
        return self.final_norm(hidden)

    def scale_logits(self, logits: Array) -> Array:
        """[..., V] -> [..., V]: what follows the output matrix."""
        return logits

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        match self.head:
            case "causal_lm":
                self.vocabulary = Unembedding(
                    config.vocab_size, self.tied, self.lm_bias, init, name="head"
                )
            case "sequence_classification":
                self.classifier = Dense(len(config.id2label), False, init, name="head")
            case "token_classification":
                labels = len(config.id2label)
                self.classifier = Dense(labels, self.classifier_bias, init, name="head")
                self.drop = Dropout(self.classifier_dropout)
            case "question_answering":
                self.classifier = Dense(2, True, init, name="head")

    def unembed(self, hidden: Array) -> Array:
        """Logits of hidden states that have passed the last norm: [..., D] -> [..., V] float32."""
        return self.scale_logits(self.vocabulary(hidden, self.word))

    @nn.compact
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        cache: PyTree = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
    ) -> Output:
        """Runs the model.

        Args:
            input_ids: int [B, T].
            attention_mask: [B, T] (1 = token, 0 = padding) or [B, T, S]; with a cache, over the
                cache's whole length. None keeps everything.
            position_ids: int [B, T]; None counts from 0, or from the cache's length.
            inputs_embeds: [B, T, D], in place of `input_ids`.
            cache: from `init_cache` or the last output.
            train: whether dropout is on; it needs ``rngs={"dropout": key}``.
            output_hidden_states: whether ``hidden_states`` is returned.
            output_attentions: whether ``attentions`` is returned.
            output_logits: whether the head "causal_lm" returns logits; if not, it returns
                ``last_hidden_state``, whose logits `unembed` makes.

        Raises:
            ValueError: inputs that contradict each other or the config.
        """
        return self.run(
            self.check(input_ids, attention_mask, position_ids, inputs_embeds, cache, train),
            cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_logits=output_logits,
        )

    def check(
        self,
        input_ids: Array | None,
        attention_mask: Array | None,
        position_ids: Array | None,
        inputs_embeds: Array | None,
        cache: PyTree,
        train: bool,
    ) -> Inputs:
        """The arguments of a call, checked and completed.

        Raises:
            ValueError: they contradict each other or the config.
        """
        shape = token_shape(input_ids, inputs_embeds)
        if len(shape) != 2:
            raise ValueError(f"{self.head} takes [B, T]; got token ids of shape {shape}")
        length, start, capacity = shape[-1], 0, shape[-1]
        if cache is not None:
            start, capacity = cache_room(cache, length)
        check_mask(attention_mask, length, capacity, shape[0])
        # A cache may have columns to spare, for padding, where positions are given.
        spare = cache is not None and position_ids is not None
        before = prefix_length(self.variables)
        most = self.max_positions
        if most is not None and before + capacity > most and not spare:
            raise ValueError(
                f"{before + capacity} positions are more than the model's {most}; "
                "truncate the input"
            )
        if position_ids is None:
            position_ids = self.default_positions(attention_mask, start, length)
        if before:
            position_ids = position_ids + before
        return Inputs(
            input_ids, inputs_embeds, attention_mask, position_ids, length, capacity, start, train
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
        """Embeddings, blocks, last norm and head; to be called in a compact method."""
        if cache is not None and self.head not in ("model", "causal_lm"):
            raise ValueError(f"the head {self.head!r} does not decode; drop the cache")
        hidden = self.embed_inputs(inputs)  # [B, T, D]
        embedded = hidden
        hidden, layers, new_cache = run_stack(
            self.block,
            {
                "config": self.config,
                "train": inputs.train,
                "output_hidden_states": output_hidden_states,
                "output_attentions": output_attentions,
            },
            hidden,
            self.shared(inputs, hidden),
            num_layers=self.num_layers,
            cache=cache,
            scan=self.scan,
            remat=self.remat,
        )
        hidden = self.finish(hidden)
        if new_cache is not None:
            new_cache = {"length": inputs.start + inputs.length, **new_cache}
        out = self.head_output(hidden, inputs, output_logits)
        if output_hidden_states:
            inner = tuple(layer.hidden_state for layer in layers[:-1])
            out = dataclasses.replace(out, hidden_states=(embedded, *inner, hidden))
        if output_attentions:
            out = dataclasses.replace(out, attentions=tuple(layer.attentions for layer in layers))
        if layers[0].cross_attentions is not None:
            crossed = tuple(layer.cross_attentions for layer in layers)
            out = dataclasses.replace(out, cross_attentions=crossed)
        if layers[0].router_logits is not None:
            routed = tuple(layer.router_logits for layer in layers)
            out = dataclasses.replace(out, router_logits=routed)
        return dataclasses.replace(out, cache=new_cache)

    def head_output(self, hidden: Array, inputs: Inputs, output_logits: bool) -> Output:
        """What the head makes of the last hidden state [B, T, D]."""
        match self.head:
            case "model":
                return Output(last_hidden_state=hidden)
            case "causal_lm":
                if not output_logits:
                    return Output(last_hidden_state=hidden)
                return Output(logits=self.unembed(hidden))
            case "sequence_classification":
                logits = self.classifier(hidden).astype(jnp.float32)  # [B, T, C]
                last = last_token(
                    inputs.input_ids, inputs.attention_mask, self.config.pad_token_id, logits
                )
                return Output(logits=logits[jnp.arange(logits.shape[0]), last])
            case "token_classification":
                hidden = self.drop(hidden, inputs.train)
                return Output(logits=self.classifier(hidden).astype(jnp.float32))
            case "question_answering":
                logits = self.classifier(hidden).astype(jnp.float32)
                start, end = jnp.moveaxis(logits, -1, 0)  # [B, T] each
                return Output(start_logits=start, end_logits=end)
        raise ValueError(f"{type(self).__module__} has no head {self.head!r}")

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
            encoder_length: S of the ``encoder_hidden_states`` of families that cross-attend, whose
                keys and values are then kept too; None keeps none.
            dtype: of keys and values.
        """
        groups, size = self.cache_shape
        shape = (batch_size, groups, length, size)
        if encoder_length is None:
            return empty_cache(self.num_layers, shape, dtype=dtype, scan=self.scan)
        return empty_seq2seq_cache(
            self.num_layers, shape, encoder_length, dtype=dtype, scan=self.scan
        )


def last_token(
    input_ids: Array | None, attention_mask: Array | None, pad_token_id: int | None, hidden: Array
) -> Array:
    """int32 [B]: the last position that is no padding, which a causal classifier reads.

    As in transformers it is told by the padding token, on whichever side it stands; and by the
    attention mask, which knows of rows padded with another token. Without both it is the last
    position.
    """
    batch, length = hidden.shape[:2]
    keep = jnp.ones((batch, length), bool)
    if input_ids is not None and pad_token_id is not None:
        keep &= input_ids != pad_token_id
    if attention_mask is not None and attention_mask.shape == keep.shape:
        keep &= attention_mask.astype(bool)
    return jnp.argmax(jnp.where(keep, jnp.arange(length), -1), axis=-1)
