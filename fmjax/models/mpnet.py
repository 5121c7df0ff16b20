"""MPNet (Song et al. 2020, arXiv:2004.09297): RoBERTa with a relative position bias that all
layers share, trained by masked and permuted modelling. HF "mpnet".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import bert, roberta
from fmjax.models.bert import IGNORED, inputs
from fmjax.nn.embed import Embed
from fmjax.nn.encoder import Inputs, Shared, TextEmbeddings
from fmjax.nn.position import relative_position_buckets
from fmjax.weights import Rule, dense_rules, renamed

__all__ = ["IGNORED", "inputs"]

PADDING = 1  # the padding token, whatever pad_token_id says
BUCKETS, MAX_DISTANCE = 32, 128  # of the relative positions, whatever the config says


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 30527
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    relative_attention_num_buckets: int = 32
    pad_token_id: int | None = 1
    tie_word_embeddings: bool = True
    # Whether the head "model" has a pooler; the weights tell, Hugging Face's files do not.
    add_pooling_layer: bool = dataclasses.field(default=True, metadata={"saved": False})
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    # What BERT's code reads and MPNet lacks; these are no keys of config.json.
    is_decoder = add_cross_attention = False
    type_vocab_size = 0
    classifier_dropout = None

    def __post_init__(self) -> None:
        problems = []
        if self.relative_attention_num_buckets < BUCKETS:
            problems.append(
                f"relative_attention_num_buckets={self.relative_attention_num_buckets} must be at "
                f"least {BUCKETS}, which PyTorch's code uses always"
            )
        bert.check_config(self, problems)


MODEL_TYPE = "mpnet"
HEADS = {
    "model": "MPNetModel",
    "masked_lm": "MPNetForMaskedLM",
    "sequence_classification": "MPNetForSequenceClassification",
    "token_classification": "MPNetForTokenClassification",
    "question_answering": "MPNetForQuestionAnswering",
    "multiple_choice": "MPNetForMultipleChoice",
}
# Song et al. 2020, section 3.1: BERT-base's size; 512 tokens are rows 2 to 513.
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=34,
    ),
    "base": Config(max_position_embeddings=514, layer_norm_eps=1e-5),
}  # fmt: skip


class Model(roberta.Model):
    """MPNet with one head; see `fmjax.models.roberta.Model`, here with padding token 1."""

    heads = HEADS

    @property
    def padding(self) -> int:
        return PADDING

    def setup(self) -> None:
        super().setup()
        config = self.config
        self.relative_bias = Embed(
            config.relative_attention_num_buckets,
            config.num_attention_heads,
            nn.initializers.normal(config.initializer_range),
        )

    def embeddings(self) -> TextEmbeddings:
        return super().embeddings().clone(padding_index=PADDING)

    def shared(self, inputs: Inputs, embedded: Array) -> Shared:
        # Distances are of places in the row, not of position_ids.
        place = jnp.arange(inputs.length)
        buckets = relative_position_buckets(
            place[None, :] - place[:, None],
            bidirectional=True,
            num_buckets=BUCKETS,
            max_distance=MAX_DISTANCE,
        )
        bias = jnp.moveaxis(self.relative_bias(buckets), -1, 0)[None]  # [1, H, T, S]
        return super().shared(inputs, embedded)._replace(bias=bias)


PREFIX = "mpnet."
FIXED = {"is_decoder": False, "add_cross_attention": False, "is_encoder_decoder": False}
NAMES = {
    "bert": "mpnet",
    "attention.self.query": "attention.attn.q",
    "attention.self.key": "attention.attn.k",
    "attention.self.value": "attention.attn.v",
    "attention.output.dense": "attention.attn.o",
    "attention.output.LayerNorm": "attention.LayerNorm",
}


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell: whether "model" has a pooler."""
    return bert.told_pooler(config, head, names, PREFIX)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = bert.body_of(head)
    table = bert.body_rules(config, head, tied="lm_head.decoder.weight")
    table.append(
        Rule("params/relative_bias/embedding", f"{body}encoder.relative_attention_bias.weight")
    )
    if bert.has_pooler(config, head, roberta.POOLED):
        table += dense_rules("pooler", f"{body}pooler.dense")
    return renamed(table, NAMES) + roberta.head_rules(config, head)
