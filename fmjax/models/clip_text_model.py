"""CLIP's text encoder (Radford et al. 2021, arXiv:2103.00020, section 2.4): a causal pre-norm
transformer, read at the end token. HF "clip_text_model".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, token_inputs
from fmjax.nn.attention import Attention
from fmjax.nn.checks import refuse
from fmjax.nn.embed import Embed
from fmjax.nn.encoder import Encoder, Inputs, TextEmbeddings
from fmjax.nn.linear import Dense
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.stack import LayerOutput
from fmjax.types import Output, PyTree
from fmjax.weights import Rule, dense_rules, norm_rules


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    eos_token_id: int | None = 49407

    # What the frame reads; none of these are keys of config.json.
    is_decoder = add_cross_attention = False

    def __post_init__(self) -> None:
        refuse(self, width_problems(self))


def width_problems(config: Any) -> list[str]:
    """What is wrong with a config's width and heads."""
    if config.hidden_size % config.num_attention_heads == 0:
        return []
    return [
        f"hidden_size={config.hidden_size} is not a multiple of "
        f"num_attention_heads={config.num_attention_heads}"
    ]


MODEL_TYPE = "clip_text_model"
HEADS = {"model": "CLIPTextModel", "with_projection": "CLIPTextModelWithProjection"}
# Radford et al. 2021, tables 19 and 20.
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=24, intermediate_size=40, projection_dim=14, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=32, attention_dropout=0.1, eos_token_id=98,
    ),
    "b32": Config(),
    "l14": Config(
        hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12
    ),
}  # fmt: skip


class Inits(NamedTuple):
    """The initializers of a block's kernels."""

    attention: Callable[..., Array]
    out: Callable[..., Array]
    up: Callable[..., Array]
    down: Callable[..., Array]


def clip_inits(config: Any) -> Inits:
    """As the authors' code has them: what is added to the hidden state shrinks with the depth."""
    width, depth = config.hidden_size, config.num_hidden_layers
    normal = nn.initializers.normal
    inner = normal((width * 2 * depth) ** -0.5 * config.initializer_factor)
    return Inits(
        inner,
        normal(width**-0.5 * config.initializer_factor),
        normal((2 * width) ** -0.5 * config.initializer_factor),
        inner,
    )


class Block(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual (pre-norm), of either tower."""

    config: Any
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @property
    def inits(self) -> Inits:
        """The kernels' initializers."""
        return clip_inits(self.config)

    @nn.compact
    def __call__(
        self, hidden: Array, cache: None, index: Array | int, shared: PyTree
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config, inits = self.config, self.inits
        update, probabilities, _ = Attention(
            config.num_attention_heads,
            dropout_rate=config.attention_dropout,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=inits.attention,
            out_init=inits.out,
            name="attn",
        )(LayerNorm(config.layer_norm_eps, name="norm_1")(hidden), mask=shared)
        hidden = hidden + update
        mlp = Mlp(config.intermediate_size, config.hidden_act, inits.up, inits.down, name="mlp")
        hidden = hidden + mlp(LayerNorm(config.layer_norm_eps, name="norm_2")(hidden))
        copy = hidden if self.output_hidden_states else None
        return hidden, LayerOutput(hidden_state=copy, attentions=probabilities)


class Head(nn.Module):
    """The hidden states as they are, or the end token's in the space of pictures and texts."""

    config: Any
    head: str

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        pooled: Array | None,
        inputs: Inputs,
        word: Embed,
        *,
        output_logits: bool,
    ) -> Output:
        if self.head == "model":
            return Output(last_hidden_state=hidden, pooler_output=pooled)
        if pooled is None:
            raise ValueError("a text without input_ids has no end token to project; give the ids")
        return Output(
            text_embeds=projection(self.config, self.config.projection_dim)(pooled),
            last_hidden_state=hidden,
        )


def projection(config: Any, width: int, name: str | None = "projection") -> Dense:
    """The map into the space of pictures and texts; called in a compact method or ``setup``.

    Args:
        config: of the tower.
        width: of that space.
        name: of the module; None in ``setup``.
    """
    init = nn.initializers.normal(config.hidden_size**-0.5 * config.initializer_factor)
    return Dense(width, use_bias=False, kernel_init=init, name=name)


class Model(Encoder):
    """The text encoder with one head; see `fmjax.nn.encoder.Encoder`."""

    config: Any
    block = Block
    head_module = Head
    heads = HEADS

    def embeddings(self) -> TextEmbeddings:
        config = self.config
        return TextEmbeddings(
            config.vocab_size,
            config.hidden_size,
            config.layer_norm_eps,
            0.0,
            nn.initializers.normal(0.02 * config.initializer_factor),
            positions=config.max_position_embeddings,
            normed=False,
        )

    def shared(self, inputs: Inputs, embedded: Array) -> PyTree:
        return inputs.mask(causal=True)

    def finish(self, hidden: PyTree) -> Array:
        return LayerNorm(self.config.layer_norm_eps, name="final_norm")(hidden)

    def states(
        self, embedded: Array, layers: tuple[Array | None, ...], hidden: Array
    ) -> tuple[Array | None, ...]:
        return (embedded, *layers)  # before the last norm

    def pool(self, hidden: Array, inputs: Inputs) -> Array | None:
        if inputs.input_ids is None:
            return None
        # The first end token; each text has one. Configs from before that was looked for say 2,
        # whatever their tokenizer's is: it is then the largest number of a text.
        eos, ids = self.config.eos_token_id, inputs.input_ids
        place = jnp.argmax(ids if eos == 2 else ids == eos, axis=-1)  # [B]
        return jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]


inputs = token_inputs
from_tensors = config_alone
PREFIX = "text_model."
# Of no effect: padding comes after the end token, which does not see it.
FIXED: dict[str, Any] = {
    "pad_token_id": ..., "tie_word_embeddings": ..., "problem_type": ..., "dropout": 0.0,
    "is_decoder": False, "add_cross_attention": False,
}  # fmt: skip
IGNORED = (r"(^|\.)embeddings\.position_ids$",)


def rules(config: Any, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    if head == "model":
        return body_rules("")
    return body_rules(PREFIX) + dense_rules("head/projection", "text_projection", bias=False)


def body_rules(body: str) -> list[Rule]:
    """Embeddings, layers and the last norm; `body` stands before the tensors' names."""
    return [
        *(
            Rule(f"params/embed/{name}/embedding", f"{body}embeddings.{tensor}_embedding.weight")
            for name, tensor in (("word", "token"), ("position", "position"))
        ),
        *layer_rules(body),
        *norm_rules("final_norm", f"{body}final_layer_norm"),
    ]


def layer_rules(body: str) -> list[Rule]:
    """The blocks of either tower; `body` stands before the tensors' names."""
    param, tensor = "layers_{i}", f"{body}encoder.layers.{{i}}"
    table = []
    for name, short in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
        table += dense_rules(f"{param}/attn/{name}", f"{tensor}.self_attn.{short}_proj")
    for number in (1, 2):
        table += norm_rules(f"{param}/norm_{number}", f"{tensor}.layer_norm{number}")
    for name, short in (("up", "fc1"), ("down", "fc2")):
        table += dense_rules(f"{param}/mlp/{name}", f"{tensor}.mlp.{short}")
    return table
