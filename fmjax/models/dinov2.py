"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193): ViT with layer scale, and a gated feed-forward in
its largest size. HF "dinov2".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, vit
from fmjax.models.vit import IGNORED, inputs
from fmjax.nn.dropout import DropPath
from fmjax.nn.mlp import Mlp
from fmjax.nn.parameter import parameter
from fmjax.nn.vision import ImageEmbeddings, pair
from fmjax.types import Output
from fmjax.weights import Rule, dense_rules, fused, joined_rules, norm_rules

__all__ = ["IGNORED", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | tuple[int, ...] = 224
    patch_size: int | tuple[int, ...] = 14
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        vit.check_config(self)

    @property
    def intermediate_size(self) -> int:
        """F; of the gated feed-forward two thirds of it, rounded up to a multiple of 8."""
        width = int(self.hidden_size * self.mlp_ratio)
        return -(-int(width * 2 / 3) // 8) * 8 if self.use_swiglu_ffn else width


MODEL_TYPE = "dinov2"
HEADS = {"model": "Dinov2Model", "image_classification": "Dinov2ForImageClassification"}
# Oquab et al. 2023, table 17 (L, g), the smaller ones distilled into ViT's sizes; positions are for
# the resolution that training ended with.
SIZES = {
    "tiny": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    },
    "s14": {"hidden_size": 384, "num_attention_heads": 6},
    "b14": {},
    "l14": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "g14": {
        "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24,
        "use_swiglu_ffn": True,
    },
}  # fmt: skip
VARIANTS = {
    name: Config(**({"image_size": 518, "patch_size": 14} | size)) for name, size in SIZES.items()
}


class Block(vit.Block):
    """ViT's, where a learned scale a feature stands before each residual sum."""

    def leave(self, hidden: Array, update: Array, sublayer: int) -> Array:
        config = self.config
        init = nn.initializers.constant(config.layerscale_value)
        scale = parameter(self, f"scale_{sublayer}", init, (config.hidden_size,))
        update = update * scale.astype(update.dtype)
        return hidden + DropPath(config.drop_path_rate)(update, self.train)

    def feed_forward(self, x: Array) -> Array:
        config = self.config
        return Mlp(
            config.intermediate_size,
            "silu" if config.use_swiglu_ffn else config.hidden_act,
            nn.initializers.truncated_normal(config.initializer_range),
            gated=config.use_swiglu_ffn,
            name="mlp",
        )(x)


class Model(vit.Model):
    """DINOv2 with one head; see `fmjax.nn.vision.VisionEncoder`."""

    block = Block
    heads = HEADS

    def embed_images(self, pixel_values: Array, masked: Array | None, train: bool) -> Array:
        shape = (1,) if self.config.use_mask_token else None
        return self.embeddings_with(mask_shape=shape)(pixel_values, masked, train)

    def embeddings_with(self, **fields: Any) -> ImageEmbeddings:
        """The embeddings; `fields` are further ones."""
        config = self.config
        return ImageEmbeddings(
            config.hidden_size,
            pair(config.image_size),
            pair(config.patch_size),
            nn.initializers.truncated_normal(config.initializer_range),
            nn.initializers.truncated_normal(config.initializer_range),
            dropout_rate=config.hidden_dropout_prob,
            name="embed",
            **fields,
        )

    def outputs(self, hidden: Array, grid: tuple[int, int]) -> Output:
        first = hidden[:, 0]
        if self.head == "model":
            return Output(last_hidden_state=hidden, pooler_output=first)
        patches = jnp.mean(hidden[:, self.tokens :].astype(jnp.float32), axis=1)
        both = jnp.concatenate([first, patches.astype(first.dtype)], axis=-1)  # [B, 2 D]
        return Output(logits=self.classify("head", both))


PREFIX = "dinov2."
# What a backbone would give to another model.
BACKBONE = ("apply_layernorm", "out_features", "out_indices", "reshape_hidden_states")
FIXED = dict.fromkeys((*BACKBONE, "stage_names"), ...)
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    table = body_rules(config, head, body)
    if config.use_mask_token:
        table.append(Rule("params/embed/mask", f"{body}embeddings.mask_token"))
    return table


def body_rules(config: Any, head: str, body: str) -> list[Rule]:
    """All but the vector of masked patches; `body` stands before the tensors' names."""
    layer, here = f"{body}encoder.layer.{{i}}", "layers_{i}"
    gated = config.use_swiglu_ffn
    table = [
        *vit.embedding_rules(body),
        *vit.attention_rules(here, layer, qkv_bias=config.qkv_bias),
        *norm_rules("final_norm", f"{body}layernorm"),
    ]
    if gated:
        table += joined_rules(f"{here}/mlp", ("gate", "up"), f"{layer}.mlp.weights_in", fused(2))
    else:
        table += dense_rules(f"{here}/mlp/up", f"{layer}.mlp.fc1")
    table += dense_rules(f"{here}/mlp/down", f"{layer}.mlp.{'weights_out' if gated else 'fc2'}")
    for number in (1, 2):
        table += norm_rules(f"{here}/norm_{number}", f"{layer}.norm{number}")
        table.append(Rule(f"params/{here}/scale_{number}", f"{layer}.layer_scale{number}.lambda1"))
    return table + (dense_rules("head", "classifier") if head != "model" else [])
