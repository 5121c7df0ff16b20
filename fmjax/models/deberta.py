"""DeBERTa (He et al. 2021, arXiv:2006.03654): BERT whose attention tells content from relative
position. HF "deberta".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import bert
from fmjax.models.bert import inputs
from fmjax.nn.activation import activation
from fmjax.nn.attention import attend
from fmjax.nn.compact import whole
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.encoder import Inputs, Shared, TextEmbeddings
from fmjax.nn.linear import Dense
from fmjax.nn.mask import keep_of
from fmjax.weights import (
    TRANSPOSE,
    Rule,
    compose,
    dense_rules,
    fused_per_head,
    norm_rules,
    renamed,
    vocabulary_rules,
)

__all__ = ["inputs"]

UNSAVED = {"saved": False}


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-7
    relative_attention: bool = False
    max_relative_positions: int = -1
    position_biased_input: bool = True
    pos_att_type: tuple[str, ...] | str | None = None
    pooler_dropout: float = 0.0
    pooler_hidden_act: str = "gelu"
    # They can only be hidden_size; PyTorch's default, and no number, when they are not written.
    pooler_hidden_size: int | None = dataclasses.field(default=None, metadata=UNSAVED)
    embedding_size: int | None = dataclasses.field(default=None, metadata=UNSAVED)
    cls_dropout: float | None = None
    pad_token_id: int | None = 0
    # Whether the masked-LM head is transformers' first one or DeBERTa's own; the names tell.
    legacy: bool = True
    tie_word_embeddings: bool = True
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    # What BERT's blocks read and DeBERTa lacks; these are no keys of config.json.
    is_decoder = add_cross_attention = False

    def __post_init__(self) -> None:
        bert.check_config(self, self.complete())

    def complete(self) -> list[str]:
        """Puts values into one form, and says what is wrong with them."""
        problems = []
        if isinstance(self.pos_att_type, str):
            kinds = tuple(kind.strip() for kind in self.pos_att_type.lower().split("|"))
            object.__setattr__(self, "pos_att_type", kinds)
        kinds = self.kinds
        if len(set(kinds)) != len(kinds) or not set(kinds) <= {"c2p", "p2c"}:
            problems.append(f"pos_att_type={kinds} must be of 'c2p' and 'p2c', each once")
        for name, size in (
            ("pooler_hidden_size", self.pooler_hidden_size),
            ("embedding_size", self.embedding_size),
        ):
            if size not in (None, self.hidden_size):
                problems.append(f"{name}={size} must be hidden_size={self.hidden_size}")
            object.__setattr__(self, name, None)
        return problems

    @property
    def kinds(self) -> tuple[str, ...]:
        """``pos_att_type``, () for none."""
        return () if self.pos_att_type is None else tuple(self.pos_att_type)

    @property
    def relative_span(self) -> int:
        """Half the rows of the table of relative positions."""
        if self.max_relative_positions < 1:
            return self.max_position_embeddings
        return self.max_relative_positions


MODEL_TYPE = "deberta"
HEADS = {
    "model": "DebertaModel",
    "masked_lm": "DebertaForMaskedLM",
    "sequence_classification": "DebertaForSequenceClassification",
    "token_classification": "DebertaForTokenClassification",
    "question_answering": "DebertaForQuestionAnswering",
}
_PUBLISHED: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ("c2p", "p2c"),
    "position_biased_input": False,
}
# He et al. 2021, table 9 (base, large); the sizes of microsoft's models on the hub.
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=32, max_relative_positions=4,
        type_vocab_size=2, relative_attention=True, pos_att_type=("c2p", "p2c"),
    ),
    "base": Config(**_PUBLISHED),
    "large": Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        **_PUBLISHED,
    ),
    "xlarge": Config(
        hidden_size=1024, num_hidden_layers=48, num_attention_heads=16, intermediate_size=4096,
        **_PUBLISHED,
    ),
}  # fmt: skip


class Disentangled(nn.Module):
    """Attention by content to content, content to position and position to content (eq. 4).

    Args:
        config: the family's.
        train: whether to drop.
        with_probabilities: whether the probabilities are returned.
        key_bias: whether the keys have a bias.
        position_key_bias: whether the keys of positions have one.
        share: whether positions are projected as contents are.
    """

    config: Any
    train: bool
    with_probabilities: bool
    key_bias: bool = False
    position_key_bias: bool = False
    share: bool = False

    def setup(self) -> None:
        config = self.config
        width, init = config.hidden_size, nn.initializers.normal(config.initializer_range)
        self.query, self.value = (Dense(width, kernel_init=init) for _ in range(2))
        self.key = Dense(width, self.key_bias, init)
        self.out = Dense(width, kernel_init=init)
        if config.relative_attention and not self.share:
            if "c2p" in config.kinds:
                self.position_key = Dense(width, self.position_key_bias, init)
            if "p2c" in config.kinds:
                self.position_query = Dense(width, kernel_init=init)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def __call__(
        self, x: Array, mask: Array | None, relative: tuple[Array, Array] | None
    ) -> tuple[Array, Array | None]:
        """Attends from x to itself.

        Args:
            x: [B, T, D].
            mask: bool, broadcastable to [B, H, T, S].
            relative: vectors of positions [P, D], and the row of each pair of query and key,
                int [T, S].

        Returns:
            ([B, T, D], [B, H, T, S] or None).
        """
        config = self.config
        heads = config.num_attention_heads

        def split(x: Array) -> Array:  # [..., D] -> [..., H, K]
            return x.reshape(*x.shape[:-1], heads, -1)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        if mask is not None:
            # A query that sees nothing attends to everything alike, whatever the scores: PyTorch
            # fills them in, so that no gradient passes.
            sees = mask.any(axis=-1)[:, 0, :, None]  # [B, T, 1]
            query = jnp.where(sees[..., None], query, 0)
        scale = 1.0 / math.sqrt(query.shape[-1] * (1 + len(config.kinds)))
        bias = None
        if relative is not None:
            # [1, P, D]: as an example's, so that layers can tell that there are not B of them.
            vectors, rows = self.dropout(relative[0], self.train)[None], relative[1]
            bias = jnp.zeros((), jnp.float32)
            if "c2p" in config.kinds:
                make = self.key if self.share else self.position_key
                scores = jnp.einsum("BTHK,PHK->BHTP", query, split(make(vectors))[0])
                bias = bias + jnp.take_along_axis(scores, rows[None, None], axis=-1)
            if "p2c" in config.kinds:
                make = self.query if self.share else self.position_query
                scores = jnp.einsum("BSHK,PHK->BHSP", key, split(make(vectors))[0])
                # Position t looks at key s from where s looks at t: the same row of the table.
                scores = jnp.take_along_axis(scores, rows.T[None, None], axis=-1)
                bias = bias + jnp.swapaxes(scores, -1, -2)  # [B, H, T, S]
            bias = bias.astype(jnp.float32) * scale
            if mask is not None:
                bias = jnp.where(sees[:, None], bias, 0.0)
        rate = config.attention_probs_dropout_prob
        out, probabilities = attend(
            query,
            jnp.swapaxes(key, 1, 2),
            jnp.swapaxes(value, 1, 2),
            mask=mask,
            bias=bias,
            scale=scale,
            rng=self.make_rng("dropout") if self.train and rate > 0.0 else None,
            dropout_rate=rate,
            with_probabilities=self.with_probabilities,
        )
        return self.out(out.reshape(x.shape)), probabilities


class Block(bert.Block):
    """BERT's block with disentangled attention."""

    def attend(
        self, x: Array, cache: None, index: Array | int, shared: Shared
    ) -> tuple[Array, Array | None, None]:
        attention = Disentangled(self.config, self.train, self.output_attentions, name="attn")
        return *attention(x, keep_of(shared.mask), shared.extra["relative"]), None


class Embeddings(TextEmbeddings):
    """Zero where there is padding."""

    def __call__(self, inputs: Inputs) -> Array:
        x = super().__call__(inputs)
        keep = token_mask(inputs)
        return x if keep is None else x * keep[..., None].astype(x.dtype)


def token_mask(inputs: Inputs) -> Array | None:
    """bool [B, T]: which tokens are no padding, that is, seen by any; None for all."""
    mask = inputs.attention_mask
    if mask is None:
        return None
    return mask.astype(bool) if mask.ndim == 2 else mask.astype(bool).any(axis=1)


class Head(bert.Head):
    """BERT's heads; a sequence is scored by a layer over its first token."""

    vocabulary = ("masked_lm",)

    @property
    def tied(self) -> bool:
        return self.config.tie_word_embeddings or not self.config.legacy

    @property
    def classifier_dropout(self) -> float:
        rate = self.config.cls_dropout
        if self.head in ("token_classification", "question_answering") or rate is None:
            return self.config.hidden_dropout_prob
        return rate

    def sequence(self, hidden: Array, pooled: Array | None, train: bool) -> Array:
        x = self.drop(hidden[:, 0], train, self.config.pooler_dropout)
        x = activation(self.config.pooler_hidden_act)(self.dense("dense", x.shape[-1], x))
        return self.drop(x, train)


class Model(bert.Model):
    """DeBERTa with one head; see `fmjax.nn.encoder.Encoder`."""

    block = Block
    head_module = Head
    heads = HEADS

    def setup(self) -> None:
        super().setup()
        config = self.config
        if config.relative_attention:
            self.relative = Embed(
                2 * config.relative_span,
                config.hidden_size,
                nn.initializers.normal(config.initializer_range),
            )

    def embeddings(self) -> TextEmbeddings:
        config = self.config
        return Embeddings(
            config.vocab_size,
            config.hidden_size,
            config.layer_norm_eps,
            config.hidden_dropout_prob,
            nn.initializers.normal(config.initializer_range),
            positions=config.max_position_embeddings if config.position_biased_input else 0,
            token_types=config.type_vocab_size,
            padding_index=config.pad_token_id,
        )

    @property
    def max_positions(self) -> int | None:
        # Distances past the table's ends share its last rows, so without absolute positions a text
        # of any length has its place.
        config = self.config
        return config.max_position_embeddings if config.position_biased_input else None

    def relative_rows(self, length: int) -> Array:
        """int [T, S]: the row of the table for each pair of query and key."""
        place, span = jnp.arange(length), self.config.relative_span
        return jnp.clip(place[:, None] - place[None, :] + span, 0, 2 * span - 1)

    def relative_vectors(self) -> Array:
        """[P, D]: the table of relative positions."""
        return whole(self.relative.embedding)

    def shared(self, inputs: Inputs, embedded: Array) -> Shared:
        mask = keep_of(inputs.mask())
        if mask is not None and mask.shape[-2] == 1:
            # Padding attends to nothing either, so in PyTorch to everything alike.
            mask = mask & jnp.swapaxes(mask, -1, -2)  # [B, 1, T, S]
        relative = None
        if self.config.relative_attention:
            vectors = self.relative_vectors().astype(embedded.dtype)
            relative = vectors, self.relative_rows(inputs.length)
        return Shared(mask, 0, None, None, extra={"relative": relative})

    def pool(self, hidden: Array, inputs: Inputs) -> None:
        return None


PREFIX = "deberta."
FIXED = {
    "is_decoder": False, "add_cross_attention": False, "is_encoder_decoder": False,
    "padding_idx": 0, "z_steps": 0, "talking_head": False,
}  # fmt: skip
# Position tables that position_biased_input=false leaves unread, and pretraining's other heads.
IGNORED = (
    r"(^|\.)embeddings\.position_ids$",
    r"(^|\.)embeddings\.position_embeddings\.weight$",
    r"^mask_predictions\.",
    r"^(lm_predictions|cls)\.",
)


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell: which masked-LM head it is."""
    own = any(name.startswith("lm_predictions.") for name in names)
    first = any(name.startswith("cls.predictions.") for name in names)
    if own == first:
        return config
    return dataclasses.replace(config, legacy=first)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    layer, here = f"{body}encoder.layer.{{i}}.attention.self", "layers_{i}/attn"
    kernels = tuple(f"params/{here}/{name}/kernel" for name in ("query", "key", "value"))
    split = compose(fused_per_head(3, config.num_attention_heads), TRANSPOSE)
    table = [
        *body_rules(config, head),
        Rule(kernels, f"{layer}.in_proj.weight", split),
        Rule(f"params/{here}/query/bias", f"{layer}.q_bias"),
        Rule(f"params/{here}/value/bias", f"{layer}.v_bias"),
    ]
    if config.relative_attention and "c2p" in config.kinds:
        table += dense_rules(f"{here}/position_key", f"{layer}.pos_proj", bias=False)
    if config.relative_attention and "p2c" in config.kinds:
        table += dense_rules(f"{here}/position_query", f"{layer}.pos_q_proj")
    return table + head_rules(config, head)


def body_rules(config: Any, head: str) -> list[Rule]:
    """Everything but heads, and queries, keys and values."""
    table = bert.body_rules(
        config,
        head,
        tied="cls.predictions.decoder.weight",
        positions=config.position_biased_input,
        projections=False,
    )
    if config.relative_attention:
        rows = f"{bert.body_of(head)}encoder.rel_embeddings.weight"
        table.append(Rule("params/relative/embedding", rows))
    return renamed(table, {"bert": "deberta"})


def head_rules(config: Any, head: str) -> list[Rule]:
    """The heads, whose tensors have the same names in DeBERTa's second version."""
    if head == "masked_lm" and config.legacy:
        return vocabulary_rules(
            tied=config.tie_word_embeddings,
            dense="cls.predictions.transform.dense",
            norm="cls.predictions.transform.LayerNorm",
            decoder="cls.predictions.decoder",
            bias="cls.predictions.bias",
        )
    if head == "masked_lm":
        own = "lm_predictions.lm_head"
        return [
            *dense_rules("head/predictions/transform", f"{own}.dense"),
            *norm_rules("head/predictions/norm", f"{own}.LayerNorm"),
            Rule("params/head/predictions/bias", f"{own}.bias"),
        ]
    if head in ("sequence_classification", "multiple_choice"):
        table = dense_rules("head/dense", "pooler.dense")
        return table + dense_rules("head/classifier", "classifier")
    return bert.classifier_rules(head)
