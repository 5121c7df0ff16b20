"""BERT (Devlin et al. 2019, arXiv:1810.04805): bidirectional post-norm encoder. HF "bert"."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.attention import Attention, Cache
from fmjax.nn.checks import refuse
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.encoder import Encoder, Inputs, Shared, TextEmbeddings
from fmjax.nn.heads import VocabularyHead
from fmjax.nn.linear import Dense
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.stack import LayerOutput
from fmjax.types import Output
from fmjax.weights import Rule, dense_rules, norm_rules, vocabulary_rules


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
        check_config(self)


def check_config(config: Any, problems: Sequence[str] = ()) -> None:
    """Refuses values that no encoder of this kind can have.

    Args:
        config: with BERT's names, as fields or properties.
        problems: what the family has found besides.

    Raises:
        ValueError: all that is wrong.
    """
    problems = list(problems)
    if config.hidden_size % config.num_attention_heads:
        problems.append(
            f"hidden_size={config.hidden_size} is not a multiple of "
            f"num_attention_heads={config.num_attention_heads}"
        )
    if config.add_cross_attention and not config.is_decoder:
        problems.append("add_cross_attention=True needs is_decoder=True")
    if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
        problems.append(
            f"pad_token_id={config.pad_token_id} is outside the vocabulary of {config.vocab_size}"
        )
    refuse(config, problems)


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


class Block(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and norm (post-norm)."""

    config: Any
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, cache: Any, index: Array | int, shared: Shared
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config = self.config
        # A cache that keeps the encoder's keys and values too has both by name.
        own, cross = (cache["self"], cache["cross"]) if isinstance(cache, dict) else (cache, None)
        update, probabilities, own = self.attend(self.enter(hidden, "norm_1"), own, index, shared)
        hidden = self.leave(hidden, update, "norm_1")
        crossed = None
        if config.add_cross_attention and (shared.encoder is not None or cross is not None):
            update, crossed, made = self.attention("cross_attn")(
                self.enter(hidden, "norm_cross"),
                mask=shared.encoder_mask,
                others=shared.encoder,
                fixed=cross if shared.encoder is None else None,
            )
            if cross is not None and made is not None:
                cross = Cache(
                    made.key.astype(cross.key.dtype), made.value.astype(cross.value.dtype)
                )
            hidden = self.leave(hidden, update, "norm_cross")
        update = self.feed_forward(self.enter(hidden, "norm_2"))
        hidden = self.close(self.leave(hidden, update, "norm_2"), index, shared)
        copy = hidden if self.output_hidden_states else None
        cache = {"self": own, "cross": cross} if isinstance(cache, dict) else own
        return hidden, LayerOutput(cache, copy, probabilities, crossed)

    def enter(self, hidden: Array, norm: str) -> Array:
        """What a sublayer reads: [B, T, D] -> [B, T, D]."""
        return hidden

    def leave(self, hidden: Array, update: Array, norm: str) -> Array:
        """The hidden state after a sublayer."""
        update = Dropout(self.config.hidden_dropout_prob)(update, self.train)
        return LayerNorm(self.config.layer_norm_eps, name=norm)(hidden + update)

    def close(self, hidden: Array, index: Array | int, shared: Shared) -> Array:
        """What follows the last sublayer."""
        return hidden

    def attend(
        self, x: Array, cache: Cache | None, index: Array | int, shared: Shared
    ) -> tuple[Array, Array | None, Cache | None]:
        """Self-attention: ([B, T, D], probabilities, the cache with x)."""
        return self.attention("attn")(
            x,
            mask=shared.mask,
            bias=shared.bias,
            rotary=shared.rotary,
            cache=cache,
            start=shared.start,
        )

    def attention(self, name: str, **fields: Any) -> Attention:
        """An attention layer by the config; `fields` are further ones."""
        return Attention(
            self.config.num_attention_heads,
            dropout_rate=self.config.attention_probs_dropout_prob,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=nn.initializers.normal(self.config.initializer_range),
            name=name,
            **fields,
        )

    def feed_forward(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        init = nn.initializers.normal(self.config.initializer_range)
        return Mlp(self.config.intermediate_size, self.config.hidden_act, init, name="mlp")(x)


class Head(nn.Module):
    """What each head makes of the last hidden state and the pooled first token."""

    config: Any
    head: str

    vocabulary: ClassVar[tuple[str, ...]] = VOCABULARY

    @property
    def vocabulary_act(self) -> str:
        """The activation of the vocabulary head's transform."""
        return self.config.hidden_act

    @property
    def vocabulary_width(self) -> int:
        """The width of the vocabulary head's transform."""
        return self.config.hidden_size

    @property
    def tied(self) -> bool:
        """Whether the word embedding is the output matrix."""
        return self.config.tie_word_embeddings

    @property
    def classifier_dropout(self) -> float:
        """The rate before a classifier."""
        rate = self.config.classifier_dropout
        return self.config.hidden_dropout_prob if rate is None else rate

    def sequence(self, hidden: Array, pooled: Array | None, train: bool) -> Array:
        """What a whole sequence is scored by, dropout included: [B, D]."""
        assert pooled is not None  # `Encoder.pool` gives it to the heads that take it
        return self.drop(pooled, train)

    def tokens(self, hidden: Array, train: bool) -> Array:
        """What each token is scored by, dropout included: [B, T, D]."""
        return self.drop(hidden, train)

    def setup(self) -> None:
        config = self.config
        if self.head in self.vocabulary:
            self.predictions = VocabularyHead(
                config.vocab_size,
                self.vocabulary_act,
                config.layer_norm_eps,
                self.tied,
                nn.initializers.normal(config.initializer_range),
                self.vocabulary_width,
            )

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        pooled: Array | None,
        inputs: Inputs,
        word: Embed,
        *,
        output_logits: bool,
    ) -> Output:
        labels, train = len(self.config.id2label), inputs.train
        logits = None  # [B, T, V]
        states = None if output_logits else hidden
        if self.head in self.vocabulary and output_logits:
            logits = self.predictions(hidden, word)
        match self.head:
            case "model":
                return Output(last_hidden_state=hidden, pooler_output=pooled)
            case "masked_lm" | "causal_lm":
                return Output(logits=logits, last_hidden_state=states)
            case "pretraining":
                return self.pretraining(logits, states, hidden, pooled, inputs)
            case "next_sentence_prediction":
                return Output(logits=self.dense("seq_relationship", 2, pooled))
            case "sequence_classification":
                x = self.sequence(hidden, pooled, train)
                return Output(logits=self.dense("classifier", labels, x))
            case "token_classification":
                x = self.tokens(hidden, train)
                return Output(logits=self.dense("classifier", labels, x))
            case "question_answering":
                start, end = jnp.moveaxis(self.answers(hidden, inputs), -1, 0)  # [B, T] each
                return Output(start_logits=start, end_logits=end)
            case "multiple_choice":
                x = self.sequence(hidden, pooled, train)
                scores = self.dense("classifier", 1, x)  # [B * N, 1]
                return Output(logits=scores.reshape(inputs.batch_shape[:-1]))
        raise ValueError(f"{type(self).__module__} has no head {self.head!r}")

    def pretraining(
        self,
        logits: Array | None,
        states: Array | None,
        hidden: Array,
        pooled: Array | None,
        inputs: Inputs,
    ) -> Output:
        """The outputs of the head "pretraining"."""
        return Output(
            prediction_logits=logits,
            last_hidden_state=states,
            seq_relationship_logits=self.dense("seq_relationship", 2, pooled),
        )

    def answers(self, hidden: Array, inputs: Inputs) -> Array:
        """Scores of each token as start and end of the answer: [B, T, 2]."""
        return self.dense("classifier", 2, hidden)

    def dense(self, name: str, features: int, x: Array | None) -> Array:
        """A dense layer onto float32 scores: [..., D] -> [..., features]."""
        assert x is not None  # `Encoder.pool` gives it to the heads that take it
        init = nn.initializers.normal(self.config.initializer_range)
        return Dense(features, kernel_init=init, name=name)(x).astype(jnp.float32)

    def drop(self, x: Array, train: bool, rate: float | None = None) -> Array:
        """Dropout, by default of `classifier_dropout`."""
        return Dropout(self.classifier_dropout if rate is None else rate)(x, train)


class Model(Encoder):
    """BERT with one head; see `fmjax.nn.encoder.Encoder`."""

    config: Any
    block = Block
    head_module = Head
    heads = HEADS

    pooled: ClassVar[tuple[str, ...]] = POOLED

    def embeddings(self) -> TextEmbeddings:
        config = self.config
        return TextEmbeddings(
            config.vocab_size,
            config.hidden_size,
            config.layer_norm_eps,
            config.hidden_dropout_prob,
            nn.initializers.normal(config.initializer_range),
            positions=config.max_position_embeddings,
            token_types=config.type_vocab_size,
            padding_index=config.pad_token_id,
        )

    def pool(self, hidden: Array, inputs: Inputs) -> Array | None:
        config = self.config
        if not has_pooler(config, self.head, self.pooled):
            return None
        init = nn.initializers.normal(config.initializer_range)
        return jnp.tanh(Dense(config.hidden_size, kernel_init=init, name="pooler")(hidden[:, 0]))


def has_pooler(config: Any, head: str, pooled: Collection[str] = POOLED) -> bool:
    """Whether a head reads the pooled first token; `pooled` are the family's heads that do."""
    return head in pooled or (head == "model" and config.add_pooling_layer)


def inputs(config: Any, head: str) -> dict[str, Array]:
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
    return told_pooler(config, head, names, PREFIX)


def told_pooler(config: Any, head: str, names: Collection[str], prefix: str) -> Any:
    """`config` with ``add_pooling_layer`` as the tensors' names have it."""
    pooler = any(name.removeprefix(prefix).startswith("pooler.") for name in names)
    return dataclasses.replace(config, add_pooling_layer=pooler or head != "model")


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    table = body_rules(config, head, tied="cls.predictions.decoder.weight")
    if has_pooler(config, head):
        table += dense_rules("pooler", f"{body_of(head)}pooler.dense")
    if head in VOCABULARY:
        table += vocabulary_rules(
            tied=config.tie_word_embeddings,
            dense="cls.predictions.transform.dense",
            norm="cls.predictions.transform.LayerNorm",
            decoder="cls.predictions.decoder",
            bias="cls.predictions.bias",
        )
    if head in ("pretraining", "next_sentence_prediction"):
        table += dense_rules("head/seq_relationship", "cls.seq_relationship")
    return table + classifier_rules(head)


def body_of(head: str) -> str:
    """What stands before the body's tensors in the file of a head."""
    return "" if head == "model" else PREFIX


def body_rules(
    config: Any,
    head: str,
    *,
    tied: str,
    positions: bool = True,
    projections: bool = True,
    bias: bool = True,
) -> list[Rule]:
    """Embeddings and layers, for BERT and its relatives.

    Args:
        config: with BERT's names.
        head: the bare model's tensors have no prefix.
        tied: a tensor that old files hold as a copy of a tied word embedding.
        positions: whether there is a table of positions.
        projections: whether self-attention's query, key and value are BERT's.
        bias: whether these have biases.
    """
    body = body_of(head)

    def attention(param: str, tensor: str, *, projections: bool, bias: bool) -> list[Rule]:
        table = []
        for name in ("query", "key", "value") if projections else ():
            table += dense_rules(f"{param}/{name}", f"{tensor}.self.{name}", bias=bias)
        return table + dense_rules(f"{param}/out", f"{tensor}.output.dense")

    layer, here = f"{body}encoder.layer.{{i}}", "layers_{i}"
    word = f"{body}embeddings.word_embeddings.weight"
    aliases = (tied,) if config.tie_word_embeddings else ()
    there = {"position": positions, "token_type": config.type_vocab_size > 0}
    table = [
        Rule("params/embed/word/embedding", word, aliases=aliases),
        *(
            Rule(f"params/embed/{name}/embedding", f"{body}embeddings.{name}_embeddings.weight")
            for name in there
            if there[name]
        ),
        *norm_rules("embed/norm", f"{body}embeddings.LayerNorm"),
        *attention(f"{here}/attn", f"{layer}.attention", projections=projections, bias=bias),
        *norm_rules(f"{here}/norm_1", f"{layer}.attention.output.LayerNorm"),
        *dense_rules(f"{here}/mlp/up", f"{layer}.intermediate.dense"),
        *dense_rules(f"{here}/mlp/down", f"{layer}.output.dense"),
        *norm_rules(f"{here}/norm_2", f"{layer}.output.LayerNorm"),
    ]
    if config.add_cross_attention:
        table += attention(
            f"{here}/cross_attn", f"{layer}.crossattention", projections=True, bias=bias
        )
        table += norm_rules(f"{here}/norm_cross", f"{layer}.crossattention.output.LayerNorm")
    return table


def classifier_rules(head: str) -> list[Rule]:
    """The last layer of the heads that classify."""
    if head in ("sequence_classification", "token_classification", "multiple_choice"):
        return dense_rules("head/classifier", "classifier")
    if head == "question_answering":
        return dense_rules("head/classifier", "qa_outputs")
    return []
