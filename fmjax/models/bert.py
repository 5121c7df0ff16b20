"""BERT (Devlin et al. 2019, arXiv:1810.04805): bidirectional post-norm encoder. HF "bert"."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.attention import (
    Attention,
    Cache,
    cache_capacity,
    empty_cache,
    make_attention_mask,
)
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.heads import VocabularyHead
from fmjax.nn.linear import Dense
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.stack import LayerOutput, run_stack
from fmjax.types import Output, PyTree
from fmjax.weights import TRANSPOSE, Rule


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    # Whether the head "model" has a pooler; the weights tell, Hugging Face's files do not.
    add_pooling_layer: bool = dataclasses.field(default=True, metadata={"saved": False})
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = []
        if self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.add_cross_attention and not self.is_decoder:
            problems.append("add_cross_attention=True needs is_decoder=True")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            rate = dataclasses.asdict(self)[name]
            if rate is not None and not 0 <= rate < 1:
                problems.append(f"{name}={rate} must be at least 0 and below 1")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            problems.append(
                f"pad_token_id={self.pad_token_id} is outside the vocabulary of {self.vocab_size}"
            )
        if problems:
            raise ValueError("bert config: " + "; ".join(problems))


MODEL_TYPE = "bert"
HEADS = {
    "model": "BertModel",
    "pretraining": "BertForPreTraining",
    "masked_lm": "BertForMaskedLM",
    "causal_lm": "BertLMHeadModel",
    "next_sentence_prediction": "BertForNextSentencePrediction",
    "sequence_classification": "BertForSequenceClassification",
    "token_classification": "BertForTokenClassification",
    "question_answering": "BertForQuestionAnswering",
    "multiple_choice": "BertForMultipleChoice",
}
POOLED = ("pretraining", "next_sentence_prediction", "sequence_classification", "multiple_choice")
VOCABULARY = ("pretraining", "masked_lm", "causal_lm")

# Devlin et al. 2019, section 3 (base, large); Turc et al. 2019, arXiv:1908.08962, table 1.
VARIANTS = {
    name: Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )
    for name, layers, width in (
        ("tiny", 2, 128),
        ("mini", 4, 256),
        ("small", 4, 512),
        ("medium", 8, 512),
        ("base", 12, 768),
        ("large", 24, 1024),
    )
}


class Shared(NamedTuple):
    """What every block reads.

    Args:
        mask: bool [B | 1, 1, T | 1, S] or None.
        start: positions already in the cache, int32 [].
        encoder: [B, S, D] or None.
        encoder_mask: bool [B, 1, 1, S] or None.
    """

    mask: Array | None
    start: Array | int
    encoder: Array | None
    encoder_mask: Array | None


class Block(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and norm (post-norm)."""

    config: Config
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, cache: Cache | None, index: Array | int, shared: Shared
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config = self.config
        init = nn.initializers.normal(config.initializer_range)

        def attention(name: str) -> Attention:
            return Attention(
                config.num_attention_heads,
                dropout_rate=config.attention_probs_dropout_prob,
                train=self.train,
                with_probabilities=self.output_attentions,
                kernel_init=init,
                name=name,
            )

        def add(hidden: Array, update: Array, name: str) -> Array:
            update = Dropout(config.hidden_dropout_prob)(update, self.train)
            return LayerNorm(config.layer_norm_eps, name=name)(hidden + update)

        update, probabilities, cache = attention("attn")(
            hidden, mask=shared.mask, cache=cache, start=shared.start
        )
        hidden = add(hidden, update, "norm_1")
        crossed = None
        if config.add_cross_attention and shared.encoder is not None:
            update, crossed, _ = attention("cross_attn")(
                hidden, mask=shared.encoder_mask, others=shared.encoder
            )
            hidden = add(hidden, update, "norm_cross")
        update = Mlp(config.intermediate_size, config.hidden_act, init, name="mlp")(hidden)
        hidden = add(hidden, update, "norm_2")
        copy = hidden if self.output_hidden_states else None
        return hidden, LayerOutput(cache, copy, probabilities, crossed)


class Embeddings(nn.Module):
    """Word, position and token-type vectors, summed, normed and dropped."""

    config: Config

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        width = config.hidden_size
        self.word = Embed(config.vocab_size, width, init, config.pad_token_id)
        self.position = Embed(config.max_position_embeddings, width, init)
        self.token_type = Embed(config.type_vocab_size, width, init)
        self.norm = LayerNorm(config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def __call__(
        self,
        input_ids: Array | None,
        inputs_embeds: Array | None,
        token_type_ids: Array | None,
        position_ids: Array,
        train: bool,
    ) -> Array:  # [B, T] -> [B, T, D]
        if inputs_embeds is None:
            assert input_ids is not None  # the model has checked that there is exactly one
            inputs_embeds = self.word(input_ids)
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, 1), jnp.int32)
        x = inputs_embeds + self.token_type(token_type_ids) + self.position(position_ids)
        return self.dropout(self.norm(x), train)


class Head(nn.Module):
    """What each of `HEADS` makes of the last hidden state and the pooled first token."""

    config: Config
    head: str

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        if self.head in VOCABULARY:
            self.predictions = VocabularyHead(
                config.vocab_size,
                config.hidden_act,
                config.layer_norm_eps,
                config.tie_word_embeddings,
                init,
            )
        if self.head in ("pretraining", "next_sentence_prediction"):
            self.seq_relationship = Dense(2, kernel_init=init)
        if features := {
            "sequence_classification": len(config.id2label),
            "token_classification": len(config.id2label),
            "question_answering": 2,
            "multiple_choice": 1,
        }.get(self.head):
            self.classifier = Dense(features, kernel_init=init)
        rate = config.classifier_dropout
        self.dropout = Dropout(config.hidden_dropout_prob if rate is None else rate)

    def __call__(
        self,
        hidden: Array,
        pooled: Array | None,
        word: Embed,
        batch_shape: tuple[int, ...],
        *,
        train: bool,
        output_logits: bool,
    ) -> Output:
        def dense(layer: Dense, x: Array | None, *, drop: bool = False) -> Array:
            assert x is not None  # every head that takes the pooled token is in POOLED
            return layer(self.dropout(x, train and drop)).astype(jnp.float32)

        def vocabulary() -> Array | None:  # [B, T, D] -> [B, T, V]
            return self.predictions(hidden, word) if output_logits else None

        states = None if output_logits else hidden
        match self.head:
            case "model":
                return Output(last_hidden_state=hidden, pooler_output=pooled)
            case "masked_lm" | "causal_lm":
                return Output(logits=vocabulary(), last_hidden_state=states)
            case "pretraining":
                return Output(
                    prediction_logits=vocabulary(),
                    last_hidden_state=states,
                    seq_relationship_logits=dense(self.seq_relationship, pooled),
                )
            case "next_sentence_prediction":
                return Output(logits=dense(self.seq_relationship, pooled))
            case "sequence_classification":
                return Output(logits=dense(self.classifier, pooled, drop=True))
            case "token_classification":
                return Output(logits=dense(self.classifier, hidden, drop=True))
            case "question_answering":
                start, end = jnp.moveaxis(dense(self.classifier, hidden), -1, 0)  # [B, T] each
                return Output(start_logits=start, end_logits=end)
            case "multiple_choice":
                scores = dense(self.classifier, pooled, drop=True)  # [B * N, 1]
                return Output(logits=scores.reshape(batch_shape[:-1]))
        raise ValueError(f"bert has no head {self.head!r}; it has {sorted(HEADS)}")


class Model(nn.Module):
    """BERT with one head.

    Args:
        config: the function's sizes and constants.
        head: a key of `HEADS`.
        scan: weights stacked over layers (``layers/...`` [L, ...]) and one compiled block.
        remat: blocks are recomputed in the backward pass.
    """

    config: Config
    head: str = "model"
    scan: bool = False
    remat: bool = False

    def setup(self) -> None:
        self.embed = Embeddings(self.config)
        self.outputs = Head(self.config, self.head, name="head")

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
            token_type_ids: int [B, T]; None is all 0.
            position_ids: int [B, T]; None counts from 0, or from the cache's length.
            inputs_embeds: [B, T, D], in place of `input_ids`.
            encoder_hidden_states: [B, S, D], for cross-attention.
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
        config = self.config
        if self.head not in HEADS:
            raise ValueError(f"bert has no head {self.head!r}; it has {sorted(HEADS)}")
        if input_ids is not None and inputs_embeds is None:
            batch_shape = input_ids.shape
        elif inputs_embeds is not None and input_ids is None:
            batch_shape = inputs_embeds.shape[:-1]
        else:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if cache is not None and not config.is_decoder:
            raise ValueError("a cache needs a causal model: set is_decoder=True in the config")
        if encoder_hidden_states is not None and not config.add_cross_attention:
            raise ValueError("encoder_hidden_states needs add_cross_attention=True in the config")
        if self.head == "multiple_choice":
            per_choice = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
                None if x is None else x.reshape(-1, *x.shape[2:]) for x in per_choice
            )  # [B, N, T] -> [B * N, T]
        length = batch_shape[-1]
        start, capacity = 0, length
        if cache is not None:
            start, capacity = cache["length"], cache_capacity(cache)
        if len(batch_shape) != 2 + (self.head == "multiple_choice"):
            raise ValueError(
                f"{self.head} takes {'[B, N, T]' if self.head == 'multiple_choice' else '[B, T]'}; "
                f"got token ids of shape {batch_shape}"
            )
        if capacity > config.max_position_embeddings:
            raise ValueError(
                f"{capacity} positions are more than the model's max_position_embeddings="
                f"{config.max_position_embeddings}; truncate the input"
            )
        positions = start + jnp.arange(length)[None] if position_ids is None else position_ids
        init = nn.initializers.normal(config.initializer_range)

        hidden = self.embed(input_ids, inputs_embeds, token_type_ids, positions, train)
        embedded = hidden
        encoder_mask = None
        if encoder_attention_mask is not None:
            encoder_mask = encoder_attention_mask.astype(bool)[:, None, None, :]  # [B, 1, 1, S]
        mask = make_attention_mask(
            attention_mask,
            query_length=length,
            key_length=capacity,
            causal=config.is_decoder,
            start=start,
        )
        hidden, layers, cache = run_stack(
            Block,
            {
                "config": config,
                "train": train,
                "output_hidden_states": output_hidden_states,
                "output_attentions": output_attentions,
            },
            hidden,
            Shared(mask, start, encoder_hidden_states, encoder_mask),
            num_layers=config.num_hidden_layers,
            cache=cache,
            scan=self.scan,
            remat=self.remat,
        )
        if cache is not None:
            cache = {"length": start + length, **cache}

        pooled = None
        if self.head in POOLED or (self.head == "model" and config.add_pooling_layer):
            pooled = jnp.tanh(
                Dense(config.hidden_size, kernel_init=init, name="pooler")(hidden[:, 0])
            )
        out = self.outputs(
            hidden, pooled, self.embed.word, batch_shape, train=train, output_logits=output_logits
        )
        if output_hidden_states:
            states = (embedded, *(layer.hidden_state for layer in layers))
            out = dataclasses.replace(out, hidden_states=states)
        if output_attentions:
            out = dataclasses.replace(out, attentions=tuple(layer.attentions for layer in layers))
        if output_attentions and encoder_hidden_states is not None:
            crossed = tuple(layer.cross_attentions for layer in layers)
            out = dataclasses.replace(out, cross_attentions=crossed)
        return dataclasses.replace(out, cache=cache)

    def init_cache(self, batch_size: int, length: int, dtype: Any = jnp.float32) -> PyTree:
        """An empty cache for `length` positions; its key dtype should be the weights'."""
        config = self.config
        size = config.hidden_size // config.num_attention_heads
        return empty_cache(
            config.num_hidden_layers,
            (batch_size, config.num_attention_heads, length, size),
            dtype=dtype,
            scan=self.scan,
        )


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    tokens = jnp.zeros((1, 1, 1) if head == "multiple_choice" else (1, 1), jnp.int32)
    if not config.add_cross_attention:
        return {"input_ids": tokens}
    return {
        "input_ids": tokens,
        "encoder_hidden_states": jnp.zeros((1, 1, config.hidden_size)),
    }


PREFIX = "bert."
# Constants that files list and this code has no other way to compute.
FIXED = {"position_embedding_type": "absolute", "is_encoder_decoder": False}
IGNORED = (r"(^|\.)embeddings\.position_ids$",)


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell: whether "model" has a pooler."""
    pooler = any(name.removeprefix(PREFIX).startswith("pooler.") for name in names)
    return dataclasses.replace(config, add_pooling_layer=pooler or head != "model")


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX

    def dense(param: str, tensor: str) -> list[Rule]:
        return [
            Rule(f"params/{param}/kernel", f"{tensor}.weight", TRANSPOSE),
            Rule(f"params/{param}/bias", f"{tensor}.bias"),
        ]

    def norm(param: str, tensor: str) -> list[Rule]:
        return [
            Rule(f"params/{param}/scale", f"{tensor}.weight"),
            Rule(f"params/{param}/bias", f"{tensor}.bias"),
        ]

    def attention(param: str, tensor: str) -> list[Rule]:
        table = []
        for name in ("query", "key", "value"):
            table += dense(f"{param}/{name}", f"{tensor}.self.{name}")
        return table + dense(f"{param}/out", f"{tensor}.output.dense")

    layer, here = f"{body}encoder.layer.{{i}}", "layers_{i}"
    tied = ("cls.predictions.decoder.weight",) if config.tie_word_embeddings else ()
    table = [
        Rule(
            "params/embed/word/embedding", f"{body}embeddings.word_embeddings.weight", aliases=tied
        )
    ]
    table += [
        Rule(f"params/embed/{name}/embedding", f"{body}embeddings.{name}_embeddings.weight")
        for name in ("position", "token_type")
    ]
    table += norm("embed/norm", f"{body}embeddings.LayerNorm")
    table += attention(f"{here}/attn", f"{layer}.attention")
    table += norm(f"{here}/norm_1", f"{layer}.attention.output.LayerNorm")
    if config.add_cross_attention:
        table += attention(f"{here}/cross_attn", f"{layer}.crossattention")
        table += norm(f"{here}/norm_cross", f"{layer}.crossattention.output.LayerNorm")
    table += dense(f"{here}/mlp/up", f"{layer}.intermediate.dense")
    table += dense(f"{here}/mlp/down", f"{layer}.output.dense")
    table += norm(f"{here}/norm_2", f"{layer}.output.LayerNorm")
    if head in POOLED or (head == "model" and config.add_pooling_layer):
        table += dense("pooler", f"{body}pooler.dense")
    if head in VOCABULARY:
        predictions = "head/predictions"
        table += dense(f"{predictions}/transform", "cls.predictions.transform.dense")
        table += norm(f"{predictions}/norm", "cls.predictions.transform.LayerNorm")
        bias = f"params/{predictions}/bias"
        if config.tie_word_embeddings:
            table.append(
                Rule(bias, "cls.predictions.bias", aliases=("cls.predictions.decoder.bias",))
            )
        else:
            table.append(
                Rule(f"params/{predictions}/kernel", "cls.predictions.decoder.weight", TRANSPOSE)
            )
            table.append(
                Rule(bias, "cls.predictions.decoder.bias", copies=("cls.predictions.bias",))
            )
    if head in ("pretraining", "next_sentence_prediction"):
        table += dense("head/seq_relationship", "cls.seq_relationship")
    if head in ("sequence_classification", "token_classification", "multiple_choice"):
        table += dense("head/classifier", "classifier")
    if head == "question_answering":
        table += dense("head/classifier", "qa_outputs")
    return table
