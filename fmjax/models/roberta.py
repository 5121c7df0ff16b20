"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT with other training, other positions and a
classifier of its own. HF "roberta".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from fmjax.models import bert
from fmjax.models.bert import FIXED, IGNORED, inputs
from fmjax.nn.activation import activation
from fmjax.nn.encoder import TextEmbeddings
from fmjax.weights import Rule, dense_rules, renamed, vocabulary_rules

__all__ = ["FIXED", "IGNORED", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config(bert.Config):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 50265
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        problems = []
        if self.pad_token_id is None:
            problems.append("pad_token_id=null: positions count from it, give its number")
        bert.check_config(self, problems)


MODEL_TYPE = "roberta"
HEADS = {
    "model": "RobertaModel",
    "masked_lm": "RobertaForMaskedLM",
    "causal_lm": "RobertaForCausalLM",
    "sequence_classification": "RobertaForSequenceClassification",
    "token_classification": "RobertaForTokenClassification",
    "question_answering": "RobertaForQuestionAnswering",
    "multiple_choice": "RobertaForMultipleChoice",
}
POOLED = ("multiple_choice",)
VOCABULARY = ("masked_lm", "causal_lm")

# Liu et al. 2019, section 5: BERT's sizes; 512 tokens are rows 2 to 513 of the position table.
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=34,
    ),
    "base": Config(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5),
    "large": Config(
        max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, hidden_size=1024,
        num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
    ),
}  # fmt: skip


class Head(bert.Head):
    """BERT's heads, but a sequence is classified by a layer over its first token."""

    vocabulary = VOCABULARY

    sequence_act: ClassVar[str] = "tanh"

    @property
    def vocabulary_act(self) -> str:
        return "gelu"  # whatever hidden_act is

    def sequence(self, hidden: Array, pooled: Array | None, train: bool) -> Array:
        if self.head == "multiple_choice":
            assert pooled is not None
            return self.drop(pooled, train, self.config.hidden_dropout_prob)
        return self.first_token(hidden, self.sequence_act, train)

    def first_token(self, hidden: Array, act: str, train: bool) -> Array:
        """A transform of the first token between two dropouts: [B, T, D] -> [B, D]."""
        x = self.dense("dense", hidden.shape[-1], self.drop(hidden[:, 0], train))
        return self.drop(activation(act)(x), train)


class Model(bert.Model):
    """RoBERTa with one head; see `fmjax.nn.encoder.Encoder`.

    Positions count from ``pad_token_id + 1``, over tokens that are not padding; padding has
    position ``pad_token_id``. ``position_ids`` are such rows of the table, as in PyTorch.
    """

    head_module = Head
    heads = HEADS
    pooled = POOLED

    @property
    def padding(self) -> int:
        """The padding token, and the row of the position table before the first token's."""
        return self.config.pad_token_id

    @property
    def position_offset(self) -> int:
        return self.padding + 1

    def embeddings(self) -> TextEmbeddings:
        return super().embeddings().clone(position_padding_index=self.padding)

    def default_positions(self, input_ids: Array | None, start: Array | int, length: int) -> Array:
        if input_ids is None:
            return super().default_positions(input_ids, start, length)
        token = (input_ids != self.padding).astype(jnp.int32)  # [B, T]
        return (jnp.cumsum(token, axis=1) + start) * token + self.padding


PREFIX = "roberta."


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell: whether "model" has a pooler."""
    return bert.told_pooler(config, head, names, PREFIX)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = bert.body_rules(config, head, tied="lm_head.decoder.weight")
    if bert.has_pooler(config, head, POOLED):
        body += dense_rules("pooler", f"{bert.body_of(head)}pooler.dense")
    return renamed(body, {"bert": "roberta"}) + head_rules(config, head)


def head_rules(config: Any, head: str) -> list[Rule]:
    """The heads, whose tensors have the same names in RoBERTa's relatives."""
    if head in VOCABULARY:
        return vocabulary_rules(
            tied=config.tie_word_embeddings,
            dense="lm_head.dense",
            norm="lm_head.layer_norm",
            decoder="lm_head.decoder",
            bias="lm_head.bias",
        )
    if head == "sequence_classification":
        return [
            *dense_rules("head/dense", "classifier.dense"),
            *dense_rules("head/classifier", "classifier.out_proj"),
        ]
    return bert.classifier_rules(head)
