"""CLIP's image encoder (Radford et al. 2021, arXiv:2103.00020, section 2.4): a ViT with one more
norm before its blocks. HF "clip_vision_model".
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.models.clip_text_model import Block, layer_rules, projection, width_problems
from fmjax.models.vit import inputs
from fmjax.nn.checks import refuse
from fmjax.nn.norm import LayerNorm
from fmjax.nn.vision import ImageEmbeddings, VisionEncoder, image_size_problems, pair
from fmjax.types import Output
from fmjax.weights import Rule, compose, conv_rules, dense_rules, norm_rules, stacked

__all__ = ["inputs"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int | tuple[int, ...] = 224
    patch_size: int | tuple[int, ...] = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    def __post_init__(self) -> None:
        refuse(self, [*image_size_problems(self), *width_problems(self)])


MODEL_TYPE = "clip_vision_model"
HEADS = {"model": "CLIPVisionModel", "with_projection": "CLIPVisionModelWithProjection"}
_LARGE = Config(
    hidden_size=1024, intermediate_size=4096, projection_dim=768, num_hidden_layers=24,
    num_attention_heads=16, patch_size=14,
)  # fmt: skip
# Radford et al. 2021, tables 19 and 20.
VARIANTS = {
    "tiny": Config(
        hidden_size=16, intermediate_size=24, projection_dim=14, num_hidden_layers=2,
        num_attention_heads=2, image_size=8, patch_size=4, attention_dropout=0.1,
    ),
    "b32": Config(),
    "b16": Config(patch_size=16),
    "l14": _LARGE,
    "l14-336": dataclasses.replace(_LARGE, image_size=336),
}  # fmt: skip


class Model(VisionEncoder):
    """The image encoder with one head; see `fmjax.nn.vision.VisionEncoder`."""

    config: Any
    block = Block
    heads = HEADS

    def embed_images(self, pixel_values: Array, masked: Array | None, train: bool) -> Array:
        config = self.config
        normal, factor = nn.initializers.normal, config.initializer_factor
        x = ImageEmbeddings(
            config.hidden_size,
            pair(config.image_size),
            pair(config.patch_size),
            normal(config.initializer_range * factor),
            normal(config.hidden_size**-0.5 * factor),
            patch_bias=False,
            name="embed",
        )(pixel_values, masked, train)
        return LayerNorm(config.layer_norm_eps, name="embed_norm")(x)

    def finish(self, hidden: Array) -> Array:
        return hidden  # the last norm is of the class token alone

    def outputs(self, hidden: Array, grid: tuple[int, int]) -> Output:
        config = self.config
        pooled = LayerNorm(config.layer_norm_eps, name="final_norm")(hidden[:, 0])
        if self.head == "model":
            return Output(last_hidden_state=hidden, pooler_output=pooled)
        return Output(
            image_embeds=projection(config, config.projection_dim, "head")(pooled),
            last_hidden_state=hidden,
        )


from_tensors = config_alone
PREFIX = "vision_model."
FIXED: dict[str, Any] = {"dropout": 0.0, "tie_word_embeddings": ..., "problem_type": ...,
    "pad_token_id": ..., "is_decoder": False, "add_cross_attention": False,
}  # fmt: skip
IGNORED = (r"(^|\.)embeddings\.position_ids$",)


def rules(config: Any, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    if head == "model":
        return body_rules("")
    return body_rules(PREFIX) + dense_rules("head", "visual_projection", bias=False)


def body_rules(body: str) -> list[Rule]:
    """Embeddings, layers and norms; `body` stands before the tensors' names."""
    vector = compose(stacked(), stacked())  # [D] -> [1, 1, D]
    return [
        Rule("params/embed/cls", f"{body}embeddings.class_embedding", vector),
        *position_rules(body),
        *conv_rules("embed/patch", f"{body}embeddings.patch_embedding"),
        *norm_rules("embed_norm", f"{body}pre_layrnorm"),
        *layer_rules(body),
        *norm_rules("final_norm", f"{body}post_layernorm"),
    ]


def position_rules(body: str) -> list[Rule]:
    """Positions, which PyTorch has as a table [N, D]."""
    table = f"{body}embeddings.position_embedding.weight"
    return [Rule("params/embed/position", table, stacked())]
