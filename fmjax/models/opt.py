"""OPT (Zhang et al. 2022, arXiv:2205.01068): causal decoder with learned positions, norms before
or (350m) after the layers, and perhaps narrower word vectors. HF "opt"; Galactica is the same
function.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, token_inputs
from fmjax.nn.attention import Attention, Cache
from fmjax.nn.decoder import Decoder, Inputs, config_problems
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.linear import Dense
from fmjax.nn.mask import Mask
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.stack import LayerOutput
from fmjax.weights import Rule, decoder_head_rules, dense_rules, norm_rules

EPSILON = 1e-5  # of PyTorch's norms; the config does not say
OFFSET = 2  # rows of the position table before that of position 0; padding reads the last of them


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False  # of models fine-tuned by an early version
    word_embed_proj_dim: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    num_attention_heads: int = 12
    activation_function: str = "relu"
    layerdrop: float = 0.0
    init_std: float = 0.02
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = config_problems(
            self, width="hidden_size", heads="num_attention_heads", act="activation_function"
        )
        if problems:
            raise ValueError("opt config: " + "; ".join(problems))

    @property
    def initializer_range(self) -> float:
        """Deviation of initial weights, under the name that other families have for it."""
        return self.init_std

    @property
    def word_width(self) -> int:
        """Width of the word vectors."""
        width = self.word_embed_proj_dim
        return self.hidden_size if width is None else width

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm follows the last block."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm


MODEL_TYPE = "opt"
HEADS = {
    "model": "OPTModel",
    "causal_lm": "OPTForCausalLM",
    "sequence_classification": "OPTForSequenceClassification",
    "question_answering": "OPTForQuestionAnswering",
}


def _sized(layers: int, width: int, heads: int) -> Config:
    return Config(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, ffn_dim=4 * width
    )


VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=24, num_hidden_layers=2, ffn_dim=40, num_attention_heads=3,
        max_position_embeddings=32, word_embed_proj_dim=16, attention_dropout=0.1, layerdrop=0.1,
    ),
    # Zhang et al. 2022, table 1; 350m is the one with norms after the layers.
    "125m": _sized(12, 768, 12),
    "350m": dataclasses.replace(
        _sized(24, 1024, 16), do_layer_norm_before=False, word_embed_proj_dim=512
    ),
    "1.3b": _sized(24, 2048, 32),
    "2.7b": _sized(32, 2560, 32),
    "6.7b": _sized(32, 4096, 32),
    "13b": _sized(40, 5120, 40),
    "30b": _sized(48, 7168, 56),
    "66b": _sized(64, 9216, 72),
    "175b": _sized(96, 12288, 96),
}  # fmt: skip


class Shared(NamedTuple):
    """What every block reads.

    Args:
        mask: bool [B | 1, 1, T, S].
        start: positions already in the cache.
    """

    mask: Mask
    start: Array | int


class Block(nn.Module):
    """Attention and feed-forward, each with a residual and a norm before or after it."""

    config: Config
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, cache: Cache | None, index: Array | int, shared: Shared
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config = self.config
        init = nn.initializers.normal(config.init_std)
        before, entered = config.do_layer_norm_before, hidden

        def norm(name: str, x: Array) -> Array:
            return _norm(config, name)(x)

        def drop(x: Array) -> Array:
            return Dropout(config.dropout)(x, self.train)

        update, probabilities, cache = Attention(
            config.num_attention_heads,
            dropout_rate=config.attention_dropout,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            use_bias=config.enable_bias,
            name="attn",
        )(
            norm("norm_1", hidden) if before else hidden,
            mask=shared.mask,
            cache=cache,
            start=shared.start,
        )
        hidden = hidden + drop(update)
        hidden = hidden if before else norm("norm_1", hidden)
        mlp = Mlp(
            config.ffn_dim,
            config.activation_function,
            init,
            use_bias=config.enable_bias,
            name="mlp",
        )
        hidden = hidden + drop(mlp(norm("norm_2", hidden) if before else hidden))
        hidden = hidden if before else norm("norm_2", hidden)
        if self.train and config.layerdrop > 0.0:  # Fan et al. 2019, arXiv:1909.11556
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - config.layerdrop)
            hidden = jnp.where(keep, hidden, entered)
        return hidden, LayerOutput(
            cache, hidden if self.output_hidden_states else None, probabilities
        )


def _norm(config: Config, name: str | None = None) -> LayerNorm:
    affine = config.layer_norm_elementwise_affine
    return LayerNorm(EPSILON, use_bias=affine, use_scale=affine, name=name)


class Embeddings(nn.Module):
    """Word vectors, widened where they are narrower than the model, and position vectors."""

    config: Config

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.init_std)
        width = config.hidden_size
        self.word = Embed(config.vocab_size, config.word_width, init, config.pad_token_id)
        self.position = Embed(config.max_position_embeddings + OFFSET, width, init)
        if config.word_width != width:
            self.project_in = Dense(width, False, init)

    def __call__(self, inputs: Inputs) -> Array:  # [B, T] -> [B, T, D]
        x = inputs.embedded(self.word)
        if self.config.word_width != self.config.hidden_size:
            x = self.project_in(x)
        return x + self.position(inputs.position_ids + OFFSET)


class Model(Decoder):
    """OPT with one head; see `fmjax.nn.decoder.Decoder`."""

    config: Config
    block = Block

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    @property
    def cache_shape(self) -> tuple[int, int]:
        heads = self.config.num_attention_heads
        return heads, self.config.hidden_size // heads

    def setup(self) -> None:
        config = self.config
        self.embed = Embeddings(config)
        if config.has_final_norm:
            self.final_norm = _norm(config)
        if config.word_width != config.hidden_size:
            init = nn.initializers.normal(config.init_std)
            self.project_out = Dense(config.word_width, False, init)
        super().setup()

    def default_positions(
        self, attention_mask: Array | None, start: Array | int, length: int
    ) -> Array:
        """Positions among the tokens that are not padding; padding's is -1."""
        if attention_mask is None or attention_mask.ndim != 2:
            return super().default_positions(attention_mask, start, length)
        mask = attention_mask.astype(jnp.int32)
        positions = jnp.cumsum(mask, axis=1) * mask - 1  # [B, S]
        return jax.lax.dynamic_slice_in_dim(positions, start, length, axis=1)

    def shared(self, inputs: Inputs, hidden: Array) -> Shared:
        return Shared(inputs.mask(), inputs.start)

    def finish(self, hidden: Array) -> Array:
        config = self.config
        if config.has_final_norm:
            hidden = self.final_norm(hidden)
        if config.word_width != config.hidden_size:
            hidden = self.project_out(hidden)
        return hidden


inputs = token_inputs
from_tensors = config_alone
PREFIX = "model."
FIXED = {
    "is_encoder_decoder": False,
    "activation_dropout": 0.0,
    "learned_embeddings": True,
    "scale_embeddings": False,
}
IGNORED = (r"(^|\.)decoder\.version$",)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = ("" if head == "model" else PREFIX) + "decoder."
    layer, here = f"{body}layers.{{i}}", "layers_{i}"
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    table = [
        Rule("params/embed/word/embedding", f"{body}embed_tokens.weight", aliases=tied),
        Rule("params/embed/position/embedding", f"{body}embed_positions.weight"),
        *decoder_head_rules(head, tied=config.tie_word_embeddings),
    ]
    for name, tensor in (
        ("attn/query", "self_attn.q_proj"),
        ("attn/key", "self_attn.k_proj"),
        ("attn/value", "self_attn.v_proj"),
        ("attn/out", "self_attn.out_proj"),
        ("mlp/up", "fc1"),
        ("mlp/down", "fc2"),
    ):
        table += dense_rules(f"{here}/{name}", f"{layer}.{tensor}", bias=config.enable_bias)
    if config.layer_norm_elementwise_affine:
        table += norm_rules(f"{here}/norm_1", f"{layer}.self_attn_layer_norm")
        table += norm_rules(f"{here}/norm_2", f"{layer}.final_layer_norm")
        if config.has_final_norm:
            table += norm_rules("final_norm", f"{body}final_layer_norm")
    if config.word_width != config.hidden_size:
        table += dense_rules("embed/project_in", f"{body}project_in", bias=False)
        table += dense_rules("project_out", f"{body}project_out", bias=False)
    return table
