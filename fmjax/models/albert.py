"""ALBERT (Lan et al. 2020, arXiv:1909.11942): BERT with a narrow embedding and layers that share
their weights. HF "albert".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import bert
from fmjax.models.bert import IGNORED, inputs
from fmjax.nn.encoder import Inputs, TextEmbeddings
from fmjax.nn.norm import LayerNorm
from fmjax.nn.remat import mark_block_input, policy, recomputed
from fmjax.nn.stack import LayerOutput, StackOutput
from fmjax.types import Output, PyTree
from fmjax.weights import Rule, dense_rules, norm_rules, vocabulary_rules

__all__ = ["IGNORED", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 30000
    embedding_size: int = 128
    hidden_size: int = 4096
    num_hidden_layers: int = 12
    num_hidden_groups: int = 1
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    inner_group_num: int = 1
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    classifier_dropout_prob: float = 0.1
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    # Whether the head "model" has a pooler; the weights tell, Hugging Face's files do not.
    add_pooling_layer: bool = dataclasses.field(default=True, metadata={"saved": False})
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    # What BERT's blocks read and ALBERT lacks; these are no keys of config.json.
    is_decoder = add_cross_attention = False

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.num_hidden_groups <= self.num_hidden_layers:
            problems.append(
                f"num_hidden_groups={self.num_hidden_groups} must be 1 to num_hidden_layers="
                f"{self.num_hidden_layers}"
            )
        if self.inner_group_num < 1:
            problems.append(f"inner_group_num={self.inner_group_num} must be at least 1")
        bert.check_config(self, problems)

    @property
    def order(self) -> tuple[int, ...]:
        """Which of the G * J sets of weights each of the L * J blocks in sequence has.

        Layer l belongs to group floor(l * G / L), whose J inner layers follow one another.
        """
        inner = self.inner_group_num
        layers = self.num_hidden_layers
        groups = (int(i / (layers / self.num_hidden_groups)) for i in range(layers))
        return tuple(group * inner + j for group in groups for j in range(inner))


MODEL_TYPE = "albert"
HEADS = {
    "model": "AlbertModel",
    "pretraining": "AlbertForPreTraining",
    "masked_lm": "AlbertForMaskedLM",
    "sequence_classification": "AlbertForSequenceClassification",
    "token_classification": "AlbertForTokenClassification",
    "question_answering": "AlbertForQuestionAnswering",
    "multiple_choice": "AlbertForMultipleChoice",
}
POOLED = ("pretraining", "sequence_classification", "multiple_choice")
VOCABULARY = ("pretraining", "masked_lm")


def _sized(width: int, layers: int = 12, heads: int | None = None) -> Config:
    return Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 if heads is None else heads,
        intermediate_size=4 * width,
    )


# Lan et al. 2020, table 1; the heads are the released models'.
VARIANTS = {
    "tiny": Config(
        vocab_size=99, embedding_size=16, hidden_size=24, num_hidden_layers=3, num_hidden_groups=2,
        num_attention_heads=3, intermediate_size=40, max_position_embeddings=32,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    ),
    "base": _sized(768),
    "large": _sized(1024, 24),
    "xlarge": _sized(2048, 24, 16),
    "xxlarge": _sized(4096),
}  # fmt: skip


class Block(bert.Block):
    """BERT's block, without the dropout after the feed-forward layer."""

    def leave(self, hidden: Array, update: Array, norm: str) -> Array:
        if norm == "norm_2":
            return LayerNorm(self.config.layer_norm_eps, name=norm)(hidden + update)
        return super().leave(hidden, update, norm)


class Head(bert.Head):
    """BERT's heads; pretraining tells the order of two sentences."""

    vocabulary = VOCABULARY

    @property
    def vocabulary_width(self) -> int:
        return self.config.embedding_size

    @property
    def classifier_dropout(self) -> float:
        return self.config.classifier_dropout_prob

    def pretraining(
        self,
        logits: Array | None,
        states: Array | None,
        hidden: Array,
        pooled: Array | None,
        inputs: Inputs,
    ) -> Output:
        pair = self.sequence(hidden, pooled, inputs.train)
        order = self.dense("classifier", len(self.config.id2label), pair)
        return Output(prediction_logits=logits, last_hidden_state=states, sop_logits=order)


class Model(bert.Model):
    """ALBERT with one head; see `fmjax.nn.encoder.Encoder`.

    ``layers_{k}`` is the k-th set of weights, ``k = group * inner_group_num + inner``. With
    ``scan`` they are stacked and one compiled block runs over them in their order.
    ``hidden_states`` and ``attentions`` have an entry for each of the L * J blocks.
    """

    block = Block
    head_module = Head
    heads = HEADS
    pooled = POOLED

    def embeddings(self) -> TextEmbeddings:
        config = self.config
        modules = super().embeddings()
        return modules.clone(width=config.embedding_size, project=config.hidden_size)

    def run_blocks(
        self, hidden: Array, shared: PyTree, cache: PyTree, fields: dict[str, Any]
    ) -> StackOutput:
        run = self.scan_blocks if self.scan else self.loop_blocks
        hidden, layers = run(hidden, shared, fields)
        return StackOutput(hidden, layers, None)

    def loop_blocks(
        self, hidden: Array, shared: PyTree, fields: dict[str, Any]
    ) -> tuple[Array, tuple[LayerOutput, ...]]:
        """One block after the other; a set of weights is a module that is called several times."""
        order = self.config.order
        block = recomputed(self.block, self.remat)
        sets = [block(**fields, name=f"layers_{k}") for k in range(max(order) + 1)]
        layers = []
        for index, k in enumerate(order):
            hidden, layer = sets[k](hidden, None, index, shared)
            layers.append(layer)
        return hidden, tuple(layers)

    def scan_blocks(
        self, hidden: Array, shared: PyTree, fields: dict[str, Any]
    ) -> tuple[Array, tuple[LayerOutput, ...]]:
        """One compiled block that takes its weights from the stack ``layers`` [G * J, ...]."""
        order = self.config.order
        if self.is_initializing():
            # nn.scan makes the stack; what it computes is of no use.
            stacked = nn.scan(
                self.block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=max(order) + 1,
            )
            hidden, _ = stacked(**fields, name="layers")(hidden, None, 0, shared)
            return hidden, (LayerOutput(),)
        stack = {
            collection: tree["layers"]
            for collection, tree in self.variables.items()
            if "layers" in tree
        }
        block = self.block(**fields, parent=None)
        rng = self.make_rng("dropout") if fields["train"] else None

        def step(hidden: Array, at: tuple[Array, Array]) -> tuple[Array, LayerOutput]:
            index, k = at
            weights = jax.tree.map(lambda leaf: leaf[k], stack)
            rngs = None if rng is None else {"dropout": jax.random.fold_in(rng, index)}
            start = mark_block_input(hidden)
            result: Any = block.apply(weights, start, None, index, shared, rngs=rngs)
            return result

        if self.remat != "none":  # with the choice of weights, of which no copies are kept
            step = jax.checkpoint(step, prevent_cse=False, policy=policy(self.remat))
        indices = jnp.arange(len(order))
        hidden, outputs = jax.lax.scan(step, hidden, (indices, jnp.array(order)))
        layers = tuple(
            LayerOutput(*jax.tree.map(lambda leaf, i=i: leaf[i], tuple(outputs)))
            for i in range(len(order))
        )
        return hidden, layers


PREFIX = "albert."
FIXED = bert.FIXED | {
    "is_decoder": False, "add_cross_attention": False,
    # What the authors' code lists and none of the released models turns on.
    "gap_size": 0, "net_structure_type": 0, "num_memory_blocks": 0, "down_scale_factor": 1,
    "layers_to_keep": [],
}  # fmt: skip


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell: whether "model" has a pooler."""
    return bert.told_pooler(config, head, names, PREFIX)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    word = f"{body}embeddings.word_embeddings.weight"
    tied = ("predictions.decoder.weight",) if config.tie_word_embeddings else ()
    table = [
        Rule("params/embed/word/embedding", word, aliases=tied),
        *(
            Rule(f"params/embed/{name}/embedding", f"{body}embeddings.{name}_embeddings.weight")
            for name in ("position", "token_type")
        ),
        *norm_rules("embed/norm", f"{body}embeddings.LayerNorm"),
        *dense_rules("embed/projection", f"{body}encoder.embedding_hidden_mapping_in"),
    ]
    for k in sorted(set(config.order)):
        group, inner = divmod(k, config.inner_group_num)
        table += _layer_rules(
            f"layers_{k}", f"{body}encoder.albert_layer_groups.{group}.albert_layers.{inner}"
        )
    if bert.has_pooler(config, head, POOLED):
        table += dense_rules("pooler", f"{body}pooler")
    if head in VOCABULARY:
        table += vocabulary_rules(
            tied=config.tie_word_embeddings,
            dense="predictions.dense",
            norm="predictions.LayerNorm",
            decoder="predictions.decoder",
            bias="predictions.bias",
        )
    if head == "pretraining":
        return table + dense_rules("head/classifier", "sop_classifier.classifier")
    return table + bert.classifier_rules(head)


def _layer_rules(here: str, layer: str) -> list[Rule]:
    return [
        *(
            rule
            for name in ("query", "key", "value")
            for rule in dense_rules(f"{here}/attn/{name}", f"{layer}.attention.{name}")
        ),
        *dense_rules(f"{here}/attn/out", f"{layer}.attention.dense"),
        *norm_rules(f"{here}/norm_1", f"{layer}.attention.LayerNorm"),
        *dense_rules(f"{here}/mlp/up", f"{layer}.ffn"),
        *dense_rules(f"{here}/mlp/down", f"{layer}.ffn_output"),
        *norm_rules(f"{here}/norm_2", f"{layer}.full_layer_layer_norm"),
    ]
