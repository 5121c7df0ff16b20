"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT without token types and pooler, half as
deep. HF "distilbert".
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax.numpy as jnp
from jax import Array

from fmjax.models import bert, config_alone
from fmjax.models.bert import inputs
from fmjax.nn.activation import ACTIVATIONS, activation
from fmjax.nn.encoder import Inputs, TextEmbeddings
from fmjax.nn.position import sinusoids
from fmjax.weights import Rule, dense_rules, renamed, vocabulary_rules

__all__ = ["inputs"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    sinusoidal_pos_embds: bool = False
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    initializer_range: float = 0.02
    qa_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    # What BERT's blocks read under BERT's names; none of these are keys of config.json.
    is_decoder = add_cross_attention = False
    layer_norm_eps = 1e-12
    type_vocab_size = 0
    num_hidden_layers = property(lambda self: self.n_layers)
    num_attention_heads = property(lambda self: self.n_heads)
    hidden_size = property(lambda self: self.dim)
    intermediate_size = property(lambda self: self.hidden_dim)
    hidden_act = property(lambda self: self.activation)
    hidden_dropout_prob = property(lambda self: self.dropout)
    attention_probs_dropout_prob = property(lambda self: self.attention_dropout)

    def __post_init__(self) -> None:
        problems = []
        if self.activation not in ACTIVATIONS:
            problems.append(f"activation={self.activation!r} is not known")
        bert.check_config(self, problems)


MODEL_TYPE = "distilbert"
HEADS = {
    "model": "DistilBertModel",
    "masked_lm": "DistilBertForMaskedLM",
    "sequence_classification": "DistilBertForSequenceClassification",
    "token_classification": "DistilBertForTokenClassification",
    "question_answering": "DistilBertForQuestionAnswering",
    "multiple_choice": "DistilBertForMultipleChoice",
}
# Sanh et al. 2019, section 3 and table 3: 66 million parameters.
VARIANTS = {
    "tiny": Config(
        vocab_size=99, max_position_embeddings=32, sinusoidal_pos_embds=True, n_layers=2,
        n_heads=3, dim=24, hidden_dim=40,
    ),
    "base": Config(),
}  # fmt: skip


class Head(bert.Head):
    """A whole sequence is scored by a layer over its first token."""

    vocabulary = ("masked_lm",)

    @property
    def classifier_dropout(self) -> float:
        return self.config.dropout

    def sequence(self, hidden: Array, pooled: Array | None, train: bool) -> Array:
        x = activation("relu")(self.dense("dense", hidden.shape[-1], hidden[:, 0]))
        return self.drop(x, train, self.config.seq_classif_dropout)

    def answers(self, hidden: Array, inputs: Inputs) -> Array:
        hidden = self.drop(hidden, inputs.train, self.config.qa_dropout)
        return super().answers(hidden, inputs)


class Model(bert.Model):
    """DistilBERT with one head; see `fmjax.nn.encoder.Encoder`."""

    head_module = Head
    heads = HEADS

    def embeddings(self) -> TextEmbeddings:
        config = self.config
        modules = super().embeddings()
        if not config.sinusoidal_pos_embds:
            return modules

        def table(rng: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
            return jnp.asarray(sinusoids(*shape, interleaved=True), dtype)

        return modules.clone(position_init=table)

    def pool(self, hidden: Array, inputs: Inputs) -> None:
        return None


PREFIX = "distilbert."
FIXED = {
    "is_decoder": False, "add_cross_attention": False, "is_encoder_decoder": False,
    "tie_weights_": True,
}  # fmt: skip
IGNORED = bert.IGNORED
NAMES = {
    "bert": "distilbert",
    "encoder.layer": "transformer.layer",
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    table = renamed(bert.body_rules(config, head, tied="vocab_projector.weight"), NAMES)
    if config.sinusoidal_pos_embds:
        # Flax computed the table and kept it in no file.
        size = (config.max_position_embeddings, config.dim)
        (position,) = (rule for rule in table if "/position/" in rule.params[0])
        table.remove(position)
        default = partial(sinusoids, *size, interleaved=True)
        table.append(dataclasses.replace(position, default=default))
    if head == "masked_lm":
        table += vocabulary_rules(
            tied=config.tie_word_embeddings,
            dense="vocab_transform",
            norm="vocab_layer_norm",
            decoder="vocab_projector",
            bias="vocab_projector.bias",
        )
    if head in ("sequence_classification", "multiple_choice"):
        table += dense_rules("head/dense", "pre_classifier")
    return table + bert.classifier_rules(head)
