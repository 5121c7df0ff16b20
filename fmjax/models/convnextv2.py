"""ConvNeXt V2 (Woo et al. 2023, arXiv:2301.00808): ConvNeXt with global response normalisation in
place of the scale at a block's end. HF "convnextv2".
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, convnext
from fmjax.models.convnext import FIXED, IGNORED, inputs
from fmjax.nn.activation import activation
from fmjax.nn.linear import Dense
from fmjax.nn.parameter import parameter
from fmjax.weights import Rule

__all__ = ["FIXED", "IGNORED", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    num_channels: int = 3
    patch_size: int | tuple[int, ...] = 4
    num_stages: int = 4
    hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    drop_path_rate: float = 0.0
    image_size: int | tuple[int, ...] = 224
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        convnext.check_config(self)


MODEL_TYPE = "convnextv2"
HEADS = {"model": "ConvNextV2Model", "image_classification": "ConvNextV2ForImageClassification"}
# Woo et al. 2023, appendix A.1 ("Configurations").
SIZES = {
    "atto-224": (40, (2, 2, 6, 2)),
    "femto-224": (48, (2, 2, 6, 2)),
    "pico-224": (64, (2, 2, 6, 2)),
    "nano-224": (80, (2, 2, 8, 2)),
    "tiny-224": (96, (3, 3, 9, 3)),
    "base-224": (128, (3, 3, 27, 3)),
    "large-224": (192, (3, 3, 27, 3)),
    "huge-224": (352, (3, 3, 27, 3)),
}
VARIANTS = {
    "tiny": Config(
        image_size=16, patch_size=2, num_stages=2, hidden_sizes=(8, 12), depths=(2, 1),
        drop_path_rate=0.1,
    ),
    **{
        name: Config(hidden_sizes=tuple(width * 2**i for i in range(4)), depths=depths)
        for name, (width, depths) in SIZES.items()
    },
}  # fmt: skip


class ResponseNorm(nn.Module):
    """Features weighed by how strongly each responds over the image, beside the others (section 3,
    algorithm 1). Scale and bias are [1, 1, 1, C], as in all files.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, C] -> [B, X, Y, C]
        shape = (1, 1, 1, x.shape[-1])
        scale = parameter(self, "scale", nn.initializers.zeros, shape).astype(jnp.float32)
        bias = parameter(self, "bias", nn.initializers.zeros, shape).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        square = jnp.sum(jnp.square(x32), axis=(1, 2), keepdims=True)
        # A feature that is 0 everywhere: the root has no gradient there.
        some = square > 0
        response = jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)
        response /= jnp.mean(response, axis=-1, keepdims=True) + 1e-6
        return (scale * (x32 * response) + bias + x32).astype(x.dtype)


class FeedForward(nn.Module):
    """Two dense layers with the response normalisation between them."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, C] -> [B, X, Y, C]
        width, init = x.shape[-1], nn.initializers.normal(self.config.initializer_range)
        y = Dense(4 * width, kernel_init=init, name="up")(x)
        y = ResponseNorm(name="norm")(activation(self.config.hidden_act)(y))
        return Dense(width, kernel_init=init, name="down")(y)


class Block(convnext.Block):
    """ConvNeXt's, with another feed-forward."""

    def feed_forward(self, x: Array) -> Array:
        return FeedForward(self.config, name="mlp")(x)


class Model(convnext.Model):
    """ConvNeXt V2 with one head; see `fmjax.models.convnext.Model`."""

    heads = HEADS
    block = Block


PREFIX = "convnextv2."
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head.

    The authors' names of the same tensors are read too, and timm's but for the response
    normalisation's, whose shape is another.
    """
    table = convnext.body_rules(config, head, PREFIX)
    for param, ours, authors, _ in convnext.blocks(config, "" if head == "model" else PREFIX):
        for name, leaf, other in (("scale", "weight", "gamma"), ("bias", "bias", "beta")):
            table.append(
                Rule(
                    f"params/{param}/mlp/norm/{name}",
                    f"{ours}.grn.{leaf}",
                    aliases=(f"{authors}.grn.{other}",),
                )
            )
    return table
