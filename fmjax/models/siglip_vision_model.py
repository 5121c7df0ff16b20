"""SigLIP's image encoder (Zhai et al. 2023, arXiv:2303.15343): a ViT without class token, pooled by
attention. HF "siglip_vision_model".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import clip_text_model, clip_vision_model, config_alone
from fmjax.models.siglip_text_model import LARGE, SO400M, Block
from fmjax.models.vit import inputs
from fmjax.nn.attention import Attention
from fmjax.nn.checks import refuse
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.vision import ImageEmbeddings, VisionEncoder, image_size_problems, pair
from fmjax.types import Output
from fmjax.weights import TRANSPOSE, Rule, compose, conv_rules, dense_rules, fused, norm_rules

__all__ = ["inputs"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int | tuple[int, ...] = 224
    patch_size: int | tuple[int, ...] = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    vision_use_head: bool = True

    def __post_init__(self) -> None:
        refuse(self, [*image_size_problems(self), *clip_text_model.width_problems(self)])


MODEL_TYPE = "siglip_vision_model"
HEADS = {"model": "SiglipVisionModel"}
VARIANTS = {
    "tiny": Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, attention_dropout=0.1,
    ),
    **{f"base-{size}": Config(image_size=size) for size in (224, 256, 384, 512)},
    **{f"large-{size}": Config(**LARGE, image_size=size) for size in (256, 384)},
    "so400m-384": Config(**SO400M, image_size=384, patch_size=14),
}  # fmt: skip


class Pooler(nn.Module):
    """One learned query attends to all patches, and a feed-forward follows (Zhai et al. 2021,
    arXiv:2106.04560, section 3.1).

    Args:
        config: of the encoder.
    """

    config: Any

    @nn.compact
    def __call__(self, hidden: Array) -> Array:  # [B, T, D] -> [B, D]
        config, init = self.config, nn.initializers.xavier_uniform()
        probe = parameter(self, "probe", init, (1, 1, config.hidden_size)).astype(hidden.dtype)
        query = jnp.broadcast_to(probe, (hidden.shape[0], 1, config.hidden_size))
        attention = Attention(config.num_attention_heads, kernel_init=init, name="attn")
        x, _, _ = attention(query, mask=None, others=hidden)  # [B, 1, D]
        mlp = Mlp(config.intermediate_size, config.hidden_act, init, name="mlp")
        return (x + mlp(LayerNorm(config.layer_norm_eps, name="norm")(x)))[:, 0]


class Model(VisionEncoder):
    """The image encoder; see `fmjax.nn.vision.VisionEncoder`."""

    config: Any
    block = Block
    heads = HEADS

    @property
    def tokens(self) -> int:
        return 0

    def embed_images(self, pixel_values: Array, masked: Array | None, train: bool) -> Array:
        config = self.config
        return ImageEmbeddings(
            config.hidden_size,
            pair(config.image_size),
            pair(config.patch_size),
            nn.initializers.lecun_normal(),
            nn.initializers.normal(config.hidden_size**-0.5),
            tokens=(),
            name="embed",
        )(pixel_values, masked, train)

    def outputs(self, hidden: Array, grid: tuple[int, int]) -> Output:
        pooled = None
        if self.config.vision_use_head:
            pooled = Pooler(self.config, name="pooler")(hidden)
        return Output(last_hidden_state=hidden, pooler_output=pooled)


from_tensors = config_alone
PREFIX = "vision_model."
FIXED: dict[str, Any] = dict.fromkeys(
    ("tie_word_embeddings", "problem_type", "initializer_factor"), ...
)
IGNORED = clip_vision_model.IGNORED


def rules(config: Any, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    table = [
        *clip_vision_model.position_rules(""),
        *conv_rules("embed/patch", "embeddings.patch_embedding", bias=True),
        *clip_text_model.layer_rules(""),
        *norm_rules("final_norm", "post_layernorm"),
    ]
    if not config.vision_use_head:
        return table
    names = [f"params/pooler/attn/{name}" for name in ("query", "key", "value")]
    kernels, biases = (tuple(f"{name}/{leaf}" for name in names) for leaf in ("kernel", "bias"))
    return [
        *table,
        Rule("params/pooler/probe", "head.probe"),
        Rule(kernels, "head.attention.in_proj_weight", compose(fused(3), TRANSPOSE)),
        Rule(biases, "head.attention.in_proj_bias", fused(3)),
        *dense_rules("pooler/attn/out", "head.attention.out_proj"),
        *norm_rules("pooler/norm", "head.layernorm"),
        *dense_rules("pooler/mlp/up", "head.mlp.fc1"),
        *dense_rules("pooler/mlp/down", "head.mlp.fc2"),
    ]
