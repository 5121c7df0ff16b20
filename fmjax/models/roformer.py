"""RoFormer (Su et al. 2021, arXiv:2104.09864): BERT whose positions rotate queries and keys.
HF "roformer".
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.models import bert, config_alone, electra
from fmjax.models.bert import FIXED, inputs
from fmjax.nn.attention import Attention
from fmjax.nn.encoder import Inputs, Shared, TextEmbeddings
from fmjax.nn.position import sinusoids
from fmjax.weights import Rule, dense_rules, renamed, vocabulary_rules

__all__ = ["FIXED", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 50000
    embedding_size: int | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 1536
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    rotary_value: bool = False
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        if self.embedding_size is None:
            object.__setattr__(self, "embedding_size", self.hidden_size)
        problems = []
        if self.hidden_size // self.num_attention_heads % 2:
            problems.append(
                f"hidden_size / num_attention_heads = {self.hidden_size}/{self.num_attention_heads}"
                " must be even: features rotate in pairs"
            )
        bert.check_config(self, problems)


MODEL_TYPE = "roformer"
HEADS = {
    "model": "RoFormerModel",
    "masked_lm": "RoFormerForMaskedLM",
    "causal_lm": "RoFormerForCausalLM",
    "sequence_classification": "RoFormerForSequenceClassification",
    "token_classification": "RoFormerForTokenClassification",
    "question_answering": "RoFormerForQuestionAnswering",
    "multiple_choice": "RoFormerForMultipleChoice",
}
# Su et al. 2021, section 4.5: BERT-base's size on Chinese; the small one is junnyu's on the hub.
VARIANTS = {
    "tiny": Config(
        vocab_size=99, embedding_size=16, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=40, max_position_embeddings=32, rotary_value=True,
    ),
    "small": Config(
        vocab_size=50000, embedding_size=384, hidden_size=384, num_hidden_layers=6,
        num_attention_heads=6, intermediate_size=1536, max_position_embeddings=512,
    ),
    "base": Config(),
}  # fmt: skip


class Block(bert.Block):
    """BERT's block with rotations; by ``rotary_value`` of the values too."""

    def attention(self, name: str) -> Attention:
        rotated = self.config.rotary_value and name == "attn"
        return super().attention(name, interleaved=True, rotary_value=rotated)


class Head(electra.Head):
    """A sequence is classified by a layer over its first token, a choice by its last one."""

    @property
    def vocabulary_act(self) -> str:
        return self.config.hidden_act

    @property
    def classifier_dropout(self) -> float:
        return self.config.hidden_dropout_prob

    def sequence(self, hidden: Array, pooled: Array | None, train: bool) -> Array:
        if self.head == "multiple_choice":
            return hidden[:, -1]
        return self.first_token(hidden, self.config.hidden_act, train)


class Model(electra.Model):
    """RoFormer with one head; see `fmjax.nn.encoder.Encoder`.

    Unlike PyTorch's it takes ``position_ids`` (PyTorch ignores them and counts from 0).
    """

    block = Block
    head_module = Head
    heads = HEADS

    def setup(self) -> None:
        super().setup()
        config = self.config
        size = config.hidden_size // config.num_attention_heads
        shape = (config.max_position_embeddings, size)
        # A constant, which PyTorch's files hold.
        self.sinusoids = self.variable(
            "buffers", "sinusoids", lambda: jnp.asarray(sinusoids(*shape, interleaved=False))
        )

    def embeddings(self) -> TextEmbeddings:
        return super().embeddings().clone(positions=0)

    def shared(self, inputs: Inputs, embedded: Array) -> Shared:
        table = jax.lax.stop_gradient(self.sinusoids.value)[inputs.position_ids]  # [B, T, K]
        sine, cosine = jnp.split(table, 2, axis=-1)
        return super().shared(inputs, embedded)._replace(rotary=(cosine, sine))


PREFIX = "roformer."
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = electra.body_rules(config, head, tied="cls.predictions.decoder.weight", positions=False)
    size = config.hidden_size // config.num_attention_heads
    body.append(
        Rule(
            "buffers/sinusoids",
            f"{bert.body_of(head)}encoder.embed_positions.weight",
            # Flax computed it and kept it in no file.
            default=partial(sinusoids, config.max_position_embeddings, size, interleaved=False),
        )
    )
    table = renamed(body, {"bert": "roformer"})
    if head in electra.VOCABULARY:
        table += vocabulary_rules(
            tied=config.tie_word_embeddings,
            dense="cls.predictions.transform.dense",
            norm="cls.predictions.transform.LayerNorm",
            decoder="cls.predictions.decoder",
            bias="cls.predictions.bias",
        )
    if head == "sequence_classification":
        table += dense_rules("head/dense", "classifier.dense")
        return table + dense_rules("head/classifier", "classifier.out_proj")
    return table + bert.classifier_rules(head)
