"""ELECTRA (Clark et al. 2020, arXiv:2003.10555): BERT that tells replaced tokens from original
ones (the head "pretraining"), and the small generator that replaces them ("masked_lm").
HF "electra".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import bert, config_alone, roberta
from fmjax.models.bert import FIXED, IGNORED, inputs
from fmjax.nn.activation import ACTIVATIONS, activation
from fmjax.nn.encoder import Inputs, TextEmbeddings
from fmjax.nn.linear import Dense
from fmjax.types import Output
from fmjax.weights import Rule, dense_rules, renamed, vocabulary_rules

__all__ = ["FIXED", "IGNORED", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 30522
    embedding_size: int = 128
    hidden_size: int = 256
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    # Of the head "multiple_choice" alone.
    summary_type: str = "first"
    summary_use_proj: bool = True
    summary_activation: str | None = "gelu"  # "" or null is none
    summary_last_dropout: float = 0.1
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = []
        if self.summary_type not in ("last", "first", "mean", "cls_index"):
            problems.append(
                f"summary_type={self.summary_type!r} must be 'last', 'first', 'mean' or 'cls_index'"
            )
        if self.summary_activation and self.summary_activation not in ACTIVATIONS:
            problems.append(f"summary_activation={self.summary_activation!r} is not known")
        bert.check_config(self, problems)


MODEL_TYPE = "electra"
HEADS = {
    "model": "ElectraModel",
    "pretraining": "ElectraForPreTraining",
    "masked_lm": "ElectraForMaskedLM",
    "causal_lm": "ElectraForCausalLM",
    "sequence_classification": "ElectraForSequenceClassification",
    "token_classification": "ElectraForTokenClassification",
    "question_answering": "ElectraForQuestionAnswering",
    "multiple_choice": "ElectraForMultipleChoice",
}
VOCABULARY = ("masked_lm", "causal_lm")

# Clark et al. 2020, appendix A, table 6; generators have the embeddings of their discriminator.
VARIANTS = {
    "tiny": Config(
        vocab_size=99, embedding_size=16, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=40, max_position_embeddings=32,
    ),
    "small": Config(),
    "base": Config(
        embedding_size=768, hidden_size=768, num_attention_heads=12, intermediate_size=3072
    ),
    "base-generator": Config(embedding_size=768),
    "large": Config(
        embedding_size=1024, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        intermediate_size=4096,
    ),
    "large-generator": Config(
        embedding_size=1024, num_hidden_layers=24
    ),
}  # fmt: skip


class Head(roberta.Head):
    """RoBERTa's heads with other activations, and the discriminator's."""

    vocabulary = VOCABULARY
    sequence_act = "gelu"

    @property
    def vocabulary_width(self) -> int:
        return self.config.embedding_size

    def setup(self) -> None:
        super().setup()
        if self.head == "pretraining":
            width, init = self.config.hidden_size, self.config.initializer_range
            init = nn.initializers.normal(init)
            self.hidden_layer = Dense(width, kernel_init=init, name="dense")
            self.score = Dense(1, kernel_init=init, name="classifier")

    def pretraining(
        self,
        logits: Array | None,
        states: Array | None,
        hidden: Array,
        pooled: Array | None,
        inputs: Inputs,
    ) -> Output:
        if states is not None:
            return Output(last_hidden_state=states)
        return Output(logits=self.replaced(hidden))

    def replaced(self, hidden: Array) -> Array:
        """The logit that each token is a replaced one: [..., D] -> [...] float32."""
        x = activation(self.config.hidden_act)(self.hidden_layer(hidden))
        return jnp.squeeze(self.score(x), -1).astype(jnp.float32)

    def sequence(self, hidden: Array, pooled: Array | None, train: bool) -> Array:
        if self.head == "multiple_choice":
            return self.summary(hidden, train)
        return super().sequence(hidden, pooled, train)

    def summary(self, hidden: Array, train: bool) -> Array:
        """transformers' SequenceSummary: [B, T, D] -> [B, D]."""
        config = self.config
        match config.summary_type:
            case "first":
                x = hidden[:, 0]
            case "mean":
                x = hidden.mean(axis=1)
            case _:
                x = hidden[:, -1]
        if config.summary_use_proj:
            x = self.dense("dense", hidden.shape[-1], x)
        if config.summary_activation:
            x = activation(config.summary_activation)(x)
        return self.drop(x, train, config.summary_last_dropout)


class Model(bert.Model):
    """ELECTRA with one head; see `fmjax.nn.encoder.Encoder`."""

    head_module = Head
    heads = HEADS
    pooled = ()

    def embeddings(self) -> TextEmbeddings:
        config = self.config
        narrow = config.embedding_size != config.hidden_size
        return (
            super()
            .embeddings()
            .clone(
                width=config.embedding_size,
                project=config.hidden_size if narrow else None,
            )
        )

    def pool(self, hidden: Array, inputs: Inputs) -> None:
        return None

    def unembed(self, hidden: Array) -> Array:
        """Logits of any last hidden states: [..., D] -> [..., V], of the discriminator [...]."""
        if self.head == "pretraining":
            return self.outputs.replaced(hidden)
        return super().unembed(hidden)


PREFIX = "electra."
from_tensors = config_alone


def body_rules(config: Any, head: str, *, tied: str, positions: bool = True) -> list[Rule]:
    """Embeddings, their projection, layers, under the prefix "bert"."""
    table = bert.body_rules(config, head, tied=tied, positions=positions)
    if config.embedding_size != config.hidden_size:
        table += dense_rules("embed/projection", f"{bert.body_of(head)}embeddings_project")
    return table


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    table = renamed(body_rules(config, head, tied="generator_lm_head.weight"), {"bert": "electra"})
    if head in VOCABULARY:
        table += vocabulary_rules(
            tied=config.tie_word_embeddings,
            dense="generator_predictions.dense",
            norm="generator_predictions.LayerNorm",
            decoder="generator_lm_head",
            bias="generator_lm_head.bias",
        )
    if head == "pretraining":
        table += dense_rules("head/dense", "discriminator_predictions.dense")
        table += dense_rules("head/classifier", "discriminator_predictions.dense_prediction")
    if head == "multiple_choice" and config.summary_use_proj:
        table += dense_rules("head/dense", "sequence_summary.summary")
    if head == "sequence_classification":
        return table + roberta.head_rules(config, head)
    return table + bert.classifier_rules(head)
