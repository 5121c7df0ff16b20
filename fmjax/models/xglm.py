"""XGLM (Lin et al. 2021, arXiv:2112.10668): multilingual causal pre-norm decoder with sinusoidal
positions. HF "xglm".
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.models.gpt2 import Shared
from fmjax.nn.attention import Attention
from fmjax.nn.decoder import Decoder, Inputs, config_problems
from fmjax.nn.dropout import Dropout
from fmjax.nn.embed import Embed
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.position import sinusoids_of
from fmjax.nn.sides import cross_attention, own_cache
from fmjax.nn.stack import LayerOutput
from fmjax.types import Output, PyTree
from fmjax.weights import Rule, decoder_head_rules, dense_rules, norm_rules

EPSILON = 1e-5  # of PyTorch's norms; the config does not say
OFFSET = 2  # what is added to a position before its sinusoids are taken


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 256008
    max_position_embeddings: int = 2048  # of the training; positions are computed, without end
    d_model: int = dataclasses.field(default=1024, metadata={"also": ("hidden_size",)})
    ffn_dim: int = 4096
    num_layers: int = dataclasses.field(default=24, metadata={"also": ("num_hidden_layers",)})
    attention_heads: int = dataclasses.field(
        default=16, metadata={"also": ("num_attention_heads",)}
    )
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    layerdrop: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = True
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        problems = config_problems(
            self, width="d_model", heads="attention_heads", act="activation_function"
        )
        if self.d_model < 4:
            problems.append(f"d_model={self.d_model} must be at least 4 for two sinusoids")
        if problems:
            raise ValueError("xglm config: " + "; ".join(problems))

    @property
    def num_hidden_layers(self) -> int:
        """L, under the name that other families have for it."""
        return self.num_layers

    @property
    def initializer_range(self) -> float:
        """Deviation of initial weights, under the name that other families have for it."""
        return self.init_std


MODEL_TYPE = "xglm"
HEADS = {"model": "XGLMModel", "causal_lm": "XGLMForCausalLM"}


def _sized(layers: int, width: int, heads: int, inner: int) -> Config:
    return Config(num_layers=layers, d_model=width, attention_heads=heads, ffn_dim=inner)


VARIANTS = {
    "tiny": Config(
        vocab_size=99, d_model=24, ffn_dim=40, num_layers=2, attention_heads=3,
        activation_dropout=0.1, layerdrop=0.1,
    ),
    # Lin et al. 2021, table 2; 4.5B is of section 2.2's other data and has a wider feed-forward.
    "564m": _sized(24, 1024, 16, 4096),
    "1.7b": _sized(24, 2048, 16, 8192),
    "2.9b": _sized(48, 2048, 16, 8192),
    "4.5b": _sized(48, 2048, 16, 16384),
    "7.5b": _sized(32, 4096, 32, 16384),
}  # fmt: skip


class Block(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual (pre-norm)."""

    config: Config
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, cache: Any, index: Array | int, shared: Shared
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config = self.config
        init = nn.initializers.normal(config.init_std)
        entered = hidden

        def attention(name: str) -> Attention:
            return Attention(
                config.attention_heads,
                dropout_rate=config.attention_dropout,
                train=self.train,
                with_probabilities=self.output_attentions,
                kernel_init=init,
                name=name,
            )

        def norm(name: str, x: Array) -> Array:
            return LayerNorm(EPSILON, name=name)(x)

        def drop(x: Array) -> Array:
            return Dropout(config.dropout)(x, self.train)

        update, probabilities, new_cache = attention("attn")(
            norm("norm_1", hidden), mask=shared.mask, cache=own_cache(cache), start=shared.start
        )
        hidden = hidden + drop(update)
        crossed = None
        if config.add_cross_attention and (shared.encoder is not None or isinstance(cache, dict)):
            update, crossed, kept = cross_attention(
                attention("cross_attn"), norm("norm_cross", hidden), shared, cache
            )
            hidden = hidden + drop(update)
            if isinstance(cache, dict):
                new_cache = {"self": new_cache, "cross": kept}
        update = Mlp(
            config.ffn_dim,
            config.activation_function,
            init,
            dropout_rate=config.activation_dropout,
            train=self.train,
            name="mlp",
        )(norm("norm_2", hidden))
        hidden = hidden + drop(update)
        if self.train and config.layerdrop > 0.0:  # Fan et al. 2019, arXiv:1909.11556
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - config.layerdrop)
            hidden = jnp.where(keep, hidden, entered)
        copy = hidden if self.output_hidden_states else None
        return hidden, LayerOutput(new_cache, copy, probabilities, crossed)


class Embeddings(nn.Module):
    """Word vectors, scaled, and sinusoids of the positions."""

    config: Config

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.init_std)
        self.word = Embed(config.vocab_size, config.d_model, init, config.pad_token_id)
        self.dropout = Dropout(config.dropout)

    def __call__(self, inputs: Inputs) -> Array:  # [B, T] -> [B, T, D]
        config = self.config
        x = inputs.embedded(self.word)
        if config.scale_embedding and inputs.inputs_embeds is None:
            x = x * math.sqrt(config.d_model)
        rows = inputs.position_ids + OFFSET
        positions = sinusoids_of(rows, config.d_model)
        if config.pad_token_id is not None:
            positions = jnp.where((rows == config.pad_token_id)[..., None], 0.0, positions)
        return self.dropout(x + positions.astype(x.dtype), inputs.train)


class Model(Decoder):
    """XGLM with one head; see `fmjax.nn.decoder.Decoder`."""

    config: Config
    block = Block

    @property
    def cache_shape(self) -> tuple[int, int]:
        return self.config.attention_heads, self.config.d_model // self.config.attention_heads

    def setup(self) -> None:
        self.embed = Embeddings(self.config)
        self.final_norm = LayerNorm(EPSILON)
        super().setup()

    def shared(self, inputs: Inputs, hidden: Array) -> Shared:
        encoder_mask = inputs.extra["encoder_attention_mask"]
        if encoder_mask is not None:
            encoder_mask = encoder_mask.astype(bool)[:, None, None, :]  # [B, 1, 1, S]
        encoder = inputs.extra["encoder_hidden_states"]
        return Shared(inputs.mask(), inputs.start, encoder, encoder_mask)

    @nn.compact
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        encoder_hidden_states: Array | None = None,
        encoder_attention_mask: Array | None = None,
        cache: PyTree = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
    ) -> Output:
        """Runs the model; beside the arguments of `fmjax.nn.decoder.Decoder`:

        Args:
            encoder_hidden_states: [B, S, D], for cross-attention. With a cache made for them they
                are needed in the first call only.
            encoder_attention_mask: [B, S].

        Raises:
            ValueError: inputs that contradict each other or the config.
        """
        if encoder_hidden_states is not None and not self.config.add_cross_attention:
            raise ValueError("encoder_hidden_states needs add_cross_attention=True in the config")
        inputs = self.check(input_ids, attention_mask, position_ids, inputs_embeds, cache, train)
        extra = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        return self.run(
            inputs._replace(extra=extra),
            cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_logits=output_logits,
        )


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    tokens = {"input_ids": jnp.zeros((1, 1), jnp.int32)}
    if not config.add_cross_attention:
        return tokens
    return tokens | {"encoder_hidden_states": jnp.zeros((1, 1, config.d_model))}


PREFIX = "model."
FIXED = {"problem_type": None}
IGNORED = (r"(^|\.)embed_positions\.weights$",)
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    layer, here = f"{body}layers.{{i}}", "layers_{i}"
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()

    def attention(param: str, tensor: str, norm: str) -> list[Rule]:
        table = norm_rules(f"{here}/{norm}", f"{layer}.{tensor}_layer_norm")
        for name in ("query", "key", "value", "out"):
            short = "out" if name == "out" else name[0]
            table += dense_rules(f"{here}/{param}/{name}", f"{layer}.{tensor}.{short}_proj")
        return table

    table = [
        Rule("params/embed/word/embedding", f"{body}embed_tokens.weight", aliases=tied),
        *norm_rules("final_norm", f"{body}layer_norm"),
        *attention("attn", "self_attn", "norm_1"),
        *dense_rules(f"{here}/mlp/up", f"{layer}.fc1"),
        *dense_rules(f"{here}/mlp/down", f"{layer}.fc2"),
        *norm_rules(f"{here}/norm_2", f"{layer}.final_layer_norm"),
        *decoder_head_rules(head, tied=config.tie_word_embeddings),
    ]
    if config.add_cross_attention:
        table += attention("cross_attn", "encoder_attn", "norm_cross")
    return table
