"""ViT (Dosovitskiy et al. 2020, arXiv:2010.11929): a transformer over image patches. HF "vit"."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.activation import activation
from fmjax.nn.attention import Attention
from fmjax.nn.checks import refuse
from fmjax.nn.conv import Conv
from fmjax.nn.dropout import Dropout
from fmjax.nn.linear import Dense
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.stack import LayerOutput
from fmjax.nn.vision import (
    ImageEmbeddings,
    VisionEncoder,
    image_size_problems,
    pair,
    shuffle_pixels,
)
from fmjax.types import Output, PyTree
from fmjax.weights import Rule, conv_rules, dense_rules, norm_rules


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int | tuple[int, ...] = 224
    patch_size: int | tuple[int, ...] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    encoder_stride: int = 16
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    # Whether the head "model" has a pooler; the weights tell, Hugging Face's files do not.
    add_pooling_layer: bool = dataclasses.field(default=True, metadata={"saved": False})
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        if self.pooler_output_size is None:
            object.__setattr__(self, "pooler_output_size", self.hidden_size)
        check_config(self)


def check_config(config: Any, problems: Sequence[str] = ()) -> None:
    """Refuses values that no encoder of this kind can have.

    Args:
        config: with ViT's names.
        problems: what the family has found besides.

    Raises:
        ValueError: all that is wrong.
    """
    problems = [*problems, *image_size_problems(config)]
    if config.hidden_size % config.num_attention_heads:
        problems.append(
            f"hidden_size={config.hidden_size} is not a multiple of "
            f"num_attention_heads={config.num_attention_heads}"
        )
    refuse(config, problems)


MODEL_TYPE = "vit"
HEADS = {
    "model": "ViTModel",
    "masked_image_modeling": "ViTForMaskedImageModeling",
    "image_classification": "ViTForImageClassification",
}


def _published(width: int, layers: int, heads: int, patch: int = 16, **rest: Any) -> Config:
    return Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=rest.pop("intermediate_size", 4 * width),
        patch_size=patch,
        encoder_stride=patch,
        **rest,
    )


VARIANTS = {
    "tiny": _published(16, 2, 2, 4, image_size=8),
    # Steiner et al. 2021, arXiv:2106.10270, table 2 (Ti, S); Dosovitskiy et al. 2020, table 1 (B,
    # L, H); Zhai et al. 2021, arXiv:2106.04560, table 2 (g).
    "ti16": _published(192, 12, 3),
    "s16": _published(384, 12, 6),
    "s32": _published(384, 12, 6, 32),
    "b16": _published(768, 12, 12),
    "b32": _published(768, 12, 12, 32),
    "l16": _published(1024, 24, 16),
    "l32": _published(1024, 24, 16, 32),
    "h14": _published(1280, 32, 16, 14),
    "g14": _published(1408, 40, 16, 14, intermediate_size=6144),
}


class Block(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual (pre-norm)."""

    config: Any
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, cache: None, index: Array | int, shared: PyTree
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        update, probabilities, _ = Attention(
            config.num_attention_heads,
            dropout_rate=config.attention_probs_dropout_prob,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            use_bias=config.qkv_bias,
            out_bias=True,
            name="attn",
        )(LayerNorm(config.layer_norm_eps, name="norm_1")(hidden), mask=shared)
        hidden = self.leave(hidden, update, 1)
        update = self.feed_forward(LayerNorm(config.layer_norm_eps, name="norm_2")(hidden))
        hidden = self.leave(hidden, update, 2)
        copy = hidden if self.output_hidden_states else None
        return hidden, LayerOutput(hidden_state=copy, attentions=probabilities)

    def leave(self, hidden: Array, update: Array, sublayer: int) -> Array:
        """The hidden state after a sublayer, 1 or 2."""
        return hidden + Dropout(self.config.hidden_dropout_prob)(update, self.train)

    def feed_forward(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        return Mlp(config.intermediate_size, config.hidden_act, init, name="mlp")(x)


class Model(VisionEncoder):
    """ViT with one head; see `fmjax.nn.vision.VisionEncoder`."""

    config: Any
    block = Block
    heads = HEADS

    def embed_images(self, pixel_values: Array, masked: Array | None, train: bool) -> Array:
        return self.embeddings(("cls",))(pixel_values, masked, train)

    def embeddings(self, tokens: tuple[str, ...]) -> ImageEmbeddings:
        """The embeddings with these tokens before the patches."""
        config = self.config
        return ImageEmbeddings(
            config.hidden_size,
            pair(config.image_size),
            pair(config.patch_size),
            self.kernel_init,
            nn.initializers.truncated_normal(config.initializer_range),
            tokens,
            mask_shape=(1, 1) if self.head == "masked_image_modeling" else None,
            dropout_rate=config.hidden_dropout_prob,
            name="embed",
        )

    def outputs(self, hidden: Array, grid: tuple[int, int]) -> Output:
        config = self.config
        if self.head == "image_classification":
            return Output(logits=self.classify("head", hidden[:, 0]))
        if self.head == "masked_image_modeling":
            return Output(reconstruction=self.reconstruct(hidden, grid))
        pooled = None
        if config.add_pooling_layer:
            dense = Dense(config.pooler_output_size, kernel_init=self.kernel_init, name="pooler")
            pooled = activation(config.pooler_act)(dense(hidden[:, 0]))
        return Output(last_hidden_state=hidden, pooler_output=pooled)

    def classify(self, name: str, x: Array) -> Array:
        """Scores of the classes: [B, D] -> [B, C] float32."""
        labels = len(self.config.id2label)
        return Dense(labels, kernel_init=self.kernel_init, name=name)(x).astype(jnp.float32)

    def reconstruct(self, hidden: Array, grid: tuple[int, int]) -> Array:
        """Pixels from the patches' hidden states (SimMIM, Xie et al. 2021, arXiv:2111.09886).

        [B, T, D] -> [B, X, Y, C].
        """
        return draw_pixels(self.config, hidden[:, self.tokens :], grid)


def draw_pixels(config: Any, patches: Array, grid: tuple[int, int]) -> Array:
    """Each patch's pixels, of its hidden state: [B, N, D] -> [B, X, Y, C].

    Called in a compact method; the convolution is the module "head" there.

    Args:
        config: with ViT's names.
        patches: [B, N, D].
        grid: rows and columns of the patches.
    """
    init = nn.initializers.normal(config.initializer_range)
    features = config.encoder_stride**2 * config.num_channels
    x = patches.reshape(-1, *grid, patches.shape[-1])
    x = Conv(features, 1, kernel_init=init, use_bias=True, name="head")(x)
    return shuffle_pixels(x, config.encoder_stride)


def inputs(config: Any, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    return {"pixel_values": jnp.zeros((1, *pair(config.image_size), config.num_channels))}


PREFIX = "vit."
FIXED = {}
IGNORED = ()


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell: whether "model" has a pooler."""
    return told_pooler(config, head, names, PREFIX)


def told_pooler(config: Any, head: str, names: Collection[str], prefix: str) -> Any:
    """`config` with ``add_pooling_layer`` as the tensors' names have it."""
    pooler = any(name.removeprefix(prefix).startswith("pooler.") for name in names)
    return dataclasses.replace(config, add_pooling_layer=pooler or head != "model")


def rules(config: Any, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    return body_rules(config, head, body) + head_rules(config, head, body)


def body_rules(config: Any, head: str, body: str) -> list[Rule]:
    """Embeddings, layers and the last norm, for ViT and its relatives.

    Args:
        config: with ViT's names.
        head: the vector of masked patches is of one head only.
        body: what stands before the tensors' names.
    """
    table = [
        *embedding_rules(body),
        *layer_rules("layers_{i}", f"{body}encoder.layer.{{i}}", qkv_bias=config.qkv_bias),
        *norm_rules("final_norm", f"{body}layernorm"),
    ]
    if head == "masked_image_modeling":
        table.append(Rule("params/embed/mask", f"{body}embeddings.mask_token"))
    return table


def embedding_rules(body: str) -> list[Rule]:
    """Patches, the class token and positions."""
    return [
        Rule("params/embed/cls", f"{body}embeddings.cls_token"),
        Rule("params/embed/position", f"{body}embeddings.position_embeddings"),
        *conv_rules("embed/patch", f"{body}embeddings.patch_embeddings.projection", bias=True),
    ]


def attention_rules(param: str, tensor: str, *, qkv_bias: bool) -> list[Rule]:
    """The four projections of a block."""
    table = dense_rules(f"{param}/attn/out", f"{tensor}.attention.output.dense")
    for name in ("query", "key", "value"):
        table += dense_rules(
            f"{param}/attn/{name}", f"{tensor}.attention.attention.{name}", bias=qkv_bias
        )
    return table


def layer_rules(param: str, tensor: str, *, qkv_bias: bool) -> list[Rule]:
    """One block."""
    return [
        *attention_rules(param, tensor, qkv_bias=qkv_bias),
        *norm_rules(f"{param}/norm_1", f"{tensor}.layernorm_before"),
        *norm_rules(f"{param}/norm_2", f"{tensor}.layernorm_after"),
        *dense_rules(f"{param}/mlp/up", f"{tensor}.intermediate.dense"),
        *dense_rules(f"{param}/mlp/down", f"{tensor}.output.dense"),
    ]


def head_rules(config: Any, head: str, body: str) -> list[Rule]:
    """What stands after the last norm."""
    match head:
        case "image_classification":
            return dense_rules("head", "classifier")
        case "masked_image_modeling":
            return conv_rules("head", "decoder.0", bias=True)
    return dense_rules("pooler", f"{body}pooler.dense") if config.add_pooling_layer else []
