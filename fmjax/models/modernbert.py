"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): pre-norm encoder with rotary positions, gated
feed-forward layers and attention that alternates between everything and a window. HF "modernbert".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import bert, config_alone
from fmjax.models.bert import inputs
from fmjax.nn.activation import ACTIVATIONS, activation
from fmjax.nn.attention import Attention
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.encoder import Encoder, Inputs
from fmjax.nn.heads import Unembedding
from fmjax.nn.linear import Dense
from fmjax.nn.mask import keep_of
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.position import inverse_frequencies, rotary_tables
from fmjax.nn.stack import LayerOutput, StackOutput
from fmjax.types import PyTree
from fmjax.weights import TRANSPOSE, Rule, compose, dense_rules, fused, norm_rules

__all__ = ["inputs"]

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under version 4's names and with its defaults."""

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    pad_token_id: int | None = 50283
    global_rope_theta: float = 160000.0
    local_rope_theta: float = 10000.0
    attention_bias: bool = False
    attention_dropout: float = 0.0
    # Every n-th layer attends to everything, unless layer_types (version 5) says it layer by layer.
    global_attn_every_n_layers: int = 3
    layer_types: tuple[str, ...] | None = None
    local_attention: int = 128
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0
    decoder_bias: bool = True
    classifier_pooling: str = "cls"
    classifier_dropout: float = 0.0
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    tie_word_embeddings: bool = True
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    # What the frame reads and ModernBERT lacks; these are no keys of config.json.
    is_decoder = add_cross_attention = False

    def __post_init__(self) -> None:
        problems = []
        if self.layer_types is not None:
            problems += self._one_form()
        for name in ("global_attn_every_n_layers", "local_attention"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be positive")
        for name in ("hidden_activation", "classifier_activation"):
            if getattr(self, name) not in ACTIVATIONS:
                problems.append(f"{name}={getattr(self, name)!r} is not known")
        if self.classifier_pooling not in ("cls", "mean"):
            problems.append(f"classifier_pooling={self.classifier_pooling!r} must be cls or mean")
        if self.hidden_size // self.num_attention_heads % 2:
            problems.append(
                f"hidden_size / num_attention_heads = {self.hidden_size}/{self.num_attention_heads}"
                " must be even: features rotate in pairs"
            )
        bert.check_config(self, problems)

    def _one_form(self) -> list[str]:
        """Says a regular ``layer_types`` as version 4 does; returns what is wrong with it."""
        types = self.layer_types or ()
        if len(types) != self.num_hidden_layers or not set(types) <= {FULL, SLIDING}:
            return [
                f"layer_types={types} must name {FULL!r} or {SLIDING!r} for each of the "
                f"{self.num_hidden_layers} layers"
            ]
        for every in (3, *range(1, self.num_hidden_layers + 1)):
            if types == _regular(self.num_hidden_layers, every):
                object.__setattr__(self, "layer_types", None)
                object.__setattr__(self, "global_attn_every_n_layers", every)
                break
        return []

    @property
    def types(self) -> tuple[str, ...]:
        """The kind of attention of each layer."""
        if self.layer_types is not None:
            return self.layer_types
        return _regular(self.num_hidden_layers, self.global_attn_every_n_layers)


def _regular(layers: int, every: int) -> tuple[str, ...]:
    return tuple(SLIDING if i % every else FULL for i in range(layers))


MODEL_TYPE = "modernbert"
HEADS = {
    "model": "ModernBertModel",
    "masked_lm": "ModernBertForMaskedLM",
    "sequence_classification": "ModernBertForSequenceClassification",
    "token_classification": "ModernBertForTokenClassification",
    "question_answering": "ModernBertForQuestionAnswering",
    "multiple_choice": "ModernBertForMultipleChoice",
}
# Marone et al. 2025, arXiv:2509.06888: mmBERT, which has Gemma 2's vocabulary.
_MULTILINGUAL: dict[str, Any] = {
    "vocab_size": 256000, "pad_token_id": 0, "local_rope_theta": 160000.0,
}  # fmt: skip
# Warner et al. 2024, appendix A, table 4 (base, large): 149 and 395 million parameters.
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=32, pad_token_id=0, local_attention=4,
        global_attn_every_n_layers=2, classifier_pooling="mean", embedding_dropout=0.1,
    ),
    "base": Config(),
    "large": Config(
        hidden_size=1024, intermediate_size=2624, num_hidden_layers=28, num_attention_heads=16
    ),
    "mmbert-small": Config(hidden_size=384, num_attention_heads=6, **_MULTILINGUAL),
    "mmbert-base": Config(**_MULTILINGUAL),
}  # fmt: skip


def initializer(config: Config, std: float) -> Callable[..., Array]:
    """A normal distribution cut off at a few of its standard deviations."""
    cut = config.initializer_cutoff_factor
    return nn.initializers.truncated_normal(std, lower=-cut, upper=cut)


def out_std(config: Config) -> float:
    """Of what is added to the residual stream: smaller in deeper models."""
    return config.initializer_range / math.sqrt(2.0 * config.num_hidden_layers)


def norm(config: Config, **fields: Any) -> LayerNorm:
    """A norm by the config."""
    return LayerNorm(config.norm_eps, config.norm_bias, **fields)


class Block(nn.Module):
    """Attention, residual; norm, feed-forward, residual; and the next layer's first norm.

    The first layer has no norm before its attention, for the embeddings are normed; so that all
    layers are alike, each makes the norm of what comes after it, which for the last is the
    model's final one.
    """

    config: Config
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: tuple[Array, Array], cache: None, index: Array | int, shared: PyTree
    ) -> tuple[tuple[Array, Array], LayerOutput]:
        config = self.config
        init = initializer(config, config.initializer_range)
        out_init = initializer(config, out_std(config))
        x, normed = hidden  # [B, T, D] each
        sliding = shared["sliding"][index]
        full_mask, near_mask = shared["masks"]
        if full_mask is None:
            mask = near_mask | ~sliding
        else:
            mask = jnp.where(sliding, near_mask, full_mask)
        rotary = tuple(jnp.where(sliding, local, full) for full, local in shared["rotary"])
        update, probabilities, _ = Attention(
            config.num_attention_heads,
            dropout_rate=config.attention_dropout,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            out_init=out_init,
            use_bias=config.attention_bias,
            name="attn",
        )(normed, mask=mask, rotary=rotary)  # pyright: ignore[reportArgumentType]
        x = x + Dropout(config.attention_dropout)(update, self.train)
        x = x + Mlp(
            config.intermediate_size,
            config.hidden_activation,
            init,
            out_init,
            config.mlp_bias,
            gated=True,
            dropout_rate=config.mlp_dropout,
            train=self.train,
            name="mlp",
        )(norm(config, name="norm_2")(x))
        copy = x if self.output_hidden_states else None
        return (x, norm(config, name="norm_next")(x)), LayerOutput(None, copy, probabilities)


class Embeddings(nn.Module):
    """Word vectors, normed and dropped."""

    config: Config

    def setup(self) -> None:
        config = self.config
        init = initializer(config, config.initializer_range)
        self.word = Embed(config.vocab_size, config.hidden_size, init, config.pad_token_id)
        self.norm = norm(config)
        self.dropout = Dropout(config.embedding_dropout)

    def __call__(self, inputs: Inputs) -> Array:  # [B, T] -> [B, T, D]
        x = inputs.inputs_embeds
        if x is None:
            x = self.word(inputs.input_ids)  # pyright: ignore[reportArgumentType]
        return self.dropout(self.norm(x), inputs.train)


class Head(bert.Head):
    """Every head reads a transform of the hidden states."""

    vocabulary = ("masked_lm",)

    def setup(self) -> None:
        config = self.config
        if self.head == "model":
            return
        init = initializer(config, out_std(config))
        self.transform = Dense(config.hidden_size, config.classifier_bias, init)
        self.norm = norm(config)
        if self.head == "masked_lm":
            self.decoder = Unembedding(
                config.vocab_size, config.tie_word_embeddings, config.decoder_bias, init
            )

    def predictions(self, hidden: Array, word: Embed) -> Array:
        """[..., D] -> [..., V] float32."""
        return self.decoder(self.prepare(hidden), word)

    def prepare(self, hidden: Array) -> Array:
        """[..., D] -> [..., D]."""
        return self.norm(activation(self.config.classifier_activation)(self.transform(hidden)))

    def sequence(self, hidden: Array, pooled: Array | None, train: bool) -> Array:
        assert pooled is not None
        return self.drop(self.prepare(pooled), train)

    def tokens(self, hidden: Array, train: bool) -> Array:
        return self.drop(self.prepare(hidden), train)

    def answers(self, hidden: Array, inputs: Inputs) -> Array:
        return self.dense("classifier", 2, self.tokens(hidden, inputs.train))

    def dense(self, name: str, features: int, x: Array | None) -> Array:
        assert x is not None
        init = initializer(self.config, self.config.hidden_size**-0.5)
        return Dense(features, kernel_init=init, name=name)(x).astype(jnp.float32)


class Model(Encoder):
    """ModernBERT with one head; see `fmjax.nn.encoder.Encoder`."""

    config: Config
    block = Block
    head_module = Head
    heads = HEADS

    @property
    def max_positions(self) -> None:
        return None  # positions are computed

    def embeddings(self) -> Embeddings:
        return Embeddings(self.config)

    def shared(self, inputs: Inputs, embedded: Array) -> PyTree:
        config = self.config
        size = config.hidden_size // config.num_attention_heads

        def tables(theta: float) -> tuple[Array, Array]:
            return rotary_tables(inputs.position_ids, jnp.asarray(inverse_frequencies(size, theta)))

        full, local = tables(config.global_rope_theta), tables(config.local_rope_theta)
        # The window is as wide on both sides, and includes its ends.
        near = inputs.mask(window=config.local_attention // 2 + 1)
        return {
            "sliding": jnp.array([kind == SLIDING for kind in config.types]),
            "masks": (keep_of(inputs.mask()), keep_of(near)),
            "rotary": tuple(zip(full, local, strict=True)),
        }

    def run_blocks(
        self, hidden: Array, shared: PyTree, cache: PyTree, fields: dict[str, Any]
    ) -> StackOutput:
        both: Any = (hidden, hidden)  # the residual stream, and what the first attention reads
        return super().run_blocks(both, shared, cache, fields)

    def finish(self, hidden: PyTree) -> Array:
        return hidden[1]

    def pool(self, hidden: Array, inputs: Inputs) -> Array | None:
        if self.head not in ("sequence_classification", "multiple_choice"):
            return None
        mask = inputs.attention_mask
        mask = jnp.ones(hidden.shape[:2], bool) if mask is None else mask.astype(bool)
        if mask.ndim != 2:
            raise ValueError(
                f"{self.head} takes an attention_mask [B, T]; it got one of shape {mask.shape}"
            )
        if self.config.classifier_pooling == "mean":
            weight = mask[..., None].astype(hidden.dtype)  # [B, T, 1]
            return (hidden * weight).sum(axis=1) / weight.sum(axis=1)
        # PyTorch skips padding on the left for choices only.
        first = jnp.argmax(mask, axis=1) if self.head == "multiple_choice" else 0
        return hidden[jnp.arange(hidden.shape[0]), first]


PREFIX = "model."
# What changes nothing, whatever it is: kernels, training options, keys that no code reads.
FIXED = {
    "is_decoder": False, "add_cross_attention": False, "is_encoder_decoder": False,
    **dict.fromkeys(
        ("reference_compile", "deterministic_flash_attn", "repad_logits_with_grad",
         "sparse_prediction", "sparse_pred_ignore_index", "cls_token_id", "layer_norm_eps",
         "position_embedding_type"),
        ...,
    ),
}  # fmt: skip
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    layer, here = f"{body}layers.{{i}}", "layers_{i}"
    tied = ("decoder.weight",) if config.tie_word_embeddings else ()
    three = [f"params/{here}/attn/{name}" for name in ("query", "key", "value")]
    kernels = tuple(f"{path}/kernel" for path in three)
    table = [
        Rule(
            "params/embed/word/embedding", f"{body}embeddings.tok_embeddings.weight", aliases=tied
        ),
        *norm_rules("embed/norm", f"{body}embeddings.norm", bias=config.norm_bias),
        Rule(kernels, f"{layer}.attn.Wqkv.weight", compose(fused(3), TRANSPOSE)),
        *dense_rules(f"{here}/attn/out", f"{layer}.attn.Wo", bias=config.attention_bias),
        Rule(
            (f"params/{here}/mlp/gate/kernel", f"params/{here}/mlp/up/kernel"),
            f"{layer}.mlp.Wi.weight",
            compose(fused(2), TRANSPOSE),
        ),
        *dense_rules(f"{here}/mlp/down", f"{layer}.mlp.Wo", bias=config.mlp_bias),
        *norm_rules(f"{here}/norm_2", f"{layer}.mlp_norm", bias=config.norm_bias),
    ]
    if config.attention_bias:
        biases = tuple(f"{path}/bias" for path in three)
        table.append(Rule(biases, f"{layer}.attn.Wqkv.bias", fused(3)))
    if config.mlp_bias:
        biases = (f"params/{here}/mlp/gate/bias", f"params/{here}/mlp/up/bias")
        table.append(Rule(biases, f"{layer}.mlp.Wi.bias", fused(2)))
    for i in range(config.num_hidden_layers):
        last = i == config.num_hidden_layers - 1
        after = "final_norm" if last else f"layers.{i + 1}.attn_norm"
        table += norm_rules(f"layers_{i}/norm_next", f"{body}{after}", bias=config.norm_bias)
    if head == "model":
        return table
    table += dense_rules("head/transform", "head.dense", bias=config.classifier_bias)
    table += norm_rules("head/norm", "head.norm", bias=config.norm_bias)
    if head != "masked_lm":
        return table + dense_rules("head/classifier", "classifier")
    if config.decoder_bias:
        table.append(Rule("params/head/decoder/bias", "decoder.bias"))
    if not config.tie_word_embeddings:
        table.append(Rule("params/head/decoder/kernel", "decoder.weight", TRANSPOSE))
    return table
