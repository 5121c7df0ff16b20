"""EfficientNet (Tan & Le 2019, arXiv:1905.11946): inverted bottlenecks, scaled in width, depth and
resolution together. HF "efficientnet".

Batch normalisation moves its running statistics as Keras does, where the weights are from: the
config's ``batch_norm_momentum`` of 0.99 keeps 0.99 of the old. (PyTorch takes it for the share of
the new.) Stochastic depth leaves out whole branches of examples, as in the paper and in Keras.
(PyTorch drops single features.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.checks import refuse
from fmjax.nn.conv import Around, ConvNorm, average, squeeze_excite
from fmjax.nn.convnet import ConvNet, divisible
from fmjax.nn.dropout import DropPath
from fmjax.weights import (
    Rule,
    conv_norm_rules,
    conv_rules,
    dense_rules,
    keras_conv_norm_rules,
    keras_dense_rules,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    num_channels: int = 3
    image_size: int | tuple[int, ...] = 600
    width_coefficient: float = 2.0
    depth_coefficient: float = 3.1
    depth_divisor: int = 8
    kernel_sizes: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    in_channels: tuple[int, ...] = (32, 16, 24, 40, 80, 112, 192)
    out_channels: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    # Blocks whose images have an odd size at the config's image_size, padded on both sides alike.
    depthwise_padding: tuple[int, ...] = ()
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    num_block_repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    expand_ratios: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    squeeze_expansion_ratio: float = 0.25
    hidden_act: str = "swish"
    hidden_dim: int = 2560
    pooling_type: str = "mean"
    initializer_range: float = 0.02
    batch_norm_eps: float = 0.001
    batch_norm_momentum: float = 0.99
    dropout_rate: float = 0.5
    drop_connect_rate: float = 0.2
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = []
        stages = {
            name: getattr(self, name)
            for name in (
                "kernel_sizes", "in_channels", "out_channels", "strides", "num_block_repeats",
                "expand_ratios",
            )
        }  # fmt: skip
        if len(set(map(len, stages.values()))) != 1:
            problems.append(f"{', '.join(stages)} must have one number a stage each")
        for name, values in stages.items():
            if not values or min(values) < 1:
                problems.append(f"{name}={values} must be positive")
        if self.pooling_type not in ("mean", "max"):
            problems.append(f"pooling_type={self.pooling_type!r} must be 'mean' or 'max'")
        if not problems and self.hidden_dim != self.top_width:
            problems.append(
                f"hidden_dim={self.hidden_dim} must be {self.top_width}, which "
                f"width_coefficient={self.width_coefficient} makes of 1280"
            )
        refuse(self, problems)

    def scaled(self, width: int) -> int:
        """Features by the width coefficient, a multiple of the divisor, at least 90 % of it."""
        return divisible(width * self.width_coefficient, self.depth_divisor, self.depth_divisor)

    @property
    def stem_width(self) -> int:
        """Features of the first convolution."""
        return self.scaled(32)

    @property
    def top_width(self) -> int:
        """Features of the last convolution."""
        return self.scaled(1280)

    def repeats(self, stage: int) -> int:
        """Blocks of a stage."""
        return math.ceil(self.depth_coefficient * self.num_block_repeats[stage])

    def padding(self, block: int, image: tuple[int, ...], size: int, stride: int) -> Around:
        """Zeros around the image before the depthwise convolution of a block.

        Args:
            block: its number; -1 for the first convolution of all.
            image: rows and columns.
            size, stride: of the convolution.
        """
        before, after = size // 2, size // 2
        if stride == 2 and block not in self.depthwise_padding:
            before -= 1
        return (before, after), (before, after)


MODEL_TYPE = "efficientnet"
HEADS = {"model": "EfficientNetModel", "image_classification": "EfficientNetForImageClassification"}


def _published(
    width: float, depth: float, image: int, dropout: float, hidden: int, odd: tuple[int, ...]
) -> Config:
    return Config(
        image_size=image,
        width_coefficient=width,
        depth_coefficient=depth,
        dropout_rate=dropout,
        hidden_dim=hidden,
        depthwise_padding=odd,
    )


VARIANTS = {
    "tiny": Config(
        image_size=32, width_coefficient=0.25, depth_coefficient=1.0, depth_divisor=4,
        kernel_sizes=(3, 5), in_channels=(32, 16), out_channels=(16, 24), strides=(1, 2),
        num_block_repeats=(1, 2), expand_ratios=(1, 3), hidden_dim=320,
    ),
    # Tan & Le 2019 and its code: width, depth, resolution, dropout. The last column follows from
    # the resolution.
    "b0": _published(1.0, 1.0, 224, 0.2, 1280, ()),
    "b1": _published(1.0, 1.1, 240, 0.2, 1280, (16,)),
    "b2": _published(1.1, 1.2, 260, 0.3, 1408, (5, 8, 16)),
    "b3": _published(1.2, 1.4, 300, 0.3, 1536, (5, 18)),
    "b4": _published(1.4, 1.8, 380, 0.4, 1792, (6,)),
    "b5": _published(1.6, 2.2, 456, 0.4, 2048, (13, 27)),
    "b6": _published(1.8, 2.6, 528, 0.5, 2304, (31,)),
    "b7": _published(2.0, 3.1, 600, 0.5, 2560, (18,)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block stands.

    Args:
        number: of the block.
        width: of what it is given.
        inner: features between its first and last convolution.
        features: O, at its end.
        size, stride: of the depthwise convolution.
        residual: whether what it is given is added at the end.
        drop: share of examples without the branch.
    """

    number: int
    width: int
    inner: int
    features: int
    size: int
    stride: int
    residual: bool
    drop: float


def places(config: Any) -> Iterator[Place]:
    """All blocks, from the first to the last."""
    number, width = 0, config.stem_width
    total = sum(config.repeats(stage) for stage in range(len(config.strides)))
    for stage, stride in enumerate(config.strides):
        features = config.scaled(config.out_channels[stage])
        for block in range(config.repeats(stage)):
            yield Place(
                number,
                width,
                width * config.expand_ratios[stage],
                features,
                config.kernel_sizes[stage],
                1 if block else stride,
                block > 0,
                config.drop_connect_rate * number / total,
            )
            number, width = number + 1, features


class Block(nn.Module):
    """An inverted bottleneck: wide between two convolutions of one pixel, narrow outside."""

    config: Any
    place: Place
    train: bool
    squeezed: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        config, place = self.config, self.place
        act, y = config.hidden_act, x
        if place.inner != place.width:
            y = conv_norm(config, self.train, place.inner, 1, act=act, name="expand")(y)
        around = config.padding(place.number, y.shape[1:3], place.size, place.stride)
        y = conv_norm(
            config, self.train, place.inner, place.size, place.stride, act,
            around=around, groups=place.inner, name="depthwise",
        )(y)  # fmt: skip
        if self.squeezed:
            init = nn.initializers.normal(config.initializer_range)
            width = max(1, int(place.width * config.squeeze_expansion_ratio))
            y = squeeze_excite(y, width, act, init)
        y = conv_norm(config, self.train, place.features, 1, name="project")(y)
        return x + DropPath(place.drop)(y, self.train) if place.residual else y


def conv_norm(
    config: Any,
    train: bool,
    features: int,
    size: int,
    stride: int = 1,
    act: str | None = None,
    *,
    around: Around | None = None,
    groups: int = 1,
    name: str,
) -> ConvNorm:
    """A convolution and its normalisation, by the config."""
    return ConvNorm(
        features,
        size,
        stride,
        act,
        train,
        config.batch_norm_eps,
        1 - config.batch_norm_momentum,
        nn.initializers.normal(config.initializer_range),
        around,
        groups,
        name=name,
    )


class Model(ConvNet):
    """EfficientNet with one head; see `fmjax.nn.convnet.ConvNet`.

    Hidden states are the stem's output and each block's.
    """

    heads = HEADS
    squeezed: ClassVar[bool] = True

    @property
    def head_dropout(self) -> float:
        return self.config.dropout_rate

    def features(self, pixel_values: Array, train: bool) -> tuple[Array, Sequence[Array]]:
        config = self.config
        around = config.padding(-1, pixel_values.shape[1:3], 3, 2)
        act = config.hidden_act
        x = conv_norm(config, train, config.stem_width, 3, 2, act, around=around, name="embed")(
            pixel_values
        )
        states, block = [x], self.recomputed(Block)
        for place in places(config):
            x = block(config, place, train, self.squeezed, name=f"blocks_{place.number}")(x)
            states.append(x)
        return conv_norm(config, train, config.top_width, 1, act=act, name="top")(x), states

    def pool(self, x: Array, train: bool) -> Array:
        if self.config.pooling_type == "mean":
            return average(x)
        # By place: the gradient of a maximum looks for equal numbers, of which a compiler that
        # computes them twice may find none.
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        place = jnp.argmax(jax.lax.stop_gradient(flat), axis=1, keepdims=True)
        return jnp.take_along_axis(flat, place, axis=1)[:, 0]


def inputs(config: Any, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    return {"pixel_values": jnp.zeros((1, 32, 32, config.num_channels))}


PREFIX = "efficientnet."
FIXED = {"num_hidden_layers": ...}  # which Hugging Face computes and nothing reads
IGNORED = (r"^normalization_0/",)  # in Keras' files, of pixels, which ours are given normalised
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body, layer = "" if head == "model" else PREFIX, conv_norm_rules
    table = layer("embed", f"{body}embeddings.convolution", f"{body}embeddings.batchnorm")
    for place in places(config):
        here, there = f"blocks_{place.number}", f"{body}encoder.blocks.{place.number}"
        if place.inner != place.width:
            expansion = f"{there}.expansion.expand"
            table += layer(f"{here}/expand", f"{expansion}_conv", f"{expansion}_bn")
        depthwise = f"{there}.depthwise_conv.depthwise"
        table += layer(f"{here}/depthwise", f"{depthwise}_conv", f"{depthwise}_norm")
        excite = f"{there}.squeeze_excite"
        table += conv_rules(f"{here}/squeeze", f"{excite}.reduce", bias=True)
        table += conv_rules(f"{here}/excite", f"{excite}.expand", bias=True)
        projection = f"{there}.projection.project"
        table += layer(f"{here}/project", f"{projection}_conv", f"{projection}_bn")
    table += layer("top", f"{body}encoder.top_conv", f"{body}encoder.top_bn")
    return table + (dense_rules("head", "classifier") if head != "model" else [])


def keras_config(config: Config) -> Config:
    """The config of Keras' EfficientNet (not V2): the same."""
    for place in places(config):
        if place.stride == 1 and not place.residual and place.width == place.features:
            raise ValueError(
                f"block {place.number} has {place.width} features before and after, which Keras' "
                "EfficientNet would add; it is another function"
            )
    return config


def keras_rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the tensors they are in Keras' files.

    Keras' model normalises pixels itself, by the means and variances of its first layers.
    """
    layer = keras_conv_norm_rules
    table = layer("embed", "stem_conv", "stem_bn")
    names = [
        f"block{stage + 1}{chr(ord('a') + block)}"
        for stage in range(len(config.strides))
        for block in range(config.repeats(stage))
    ]
    for place, there in zip(places(config), names, strict=True):
        here = f"blocks_{place.number}"
        if place.inner != place.width:
            table += layer(f"{here}/expand", f"{there}_expand_conv", f"{there}_expand_bn")
        table += layer(f"{here}/depthwise", f"{there}_dwconv", f"{there}_bn", depthwise=True)
        table += keras_dense_rules(f"{here}/squeeze", f"{there}_se_reduce")
        table += keras_dense_rules(f"{here}/excite", f"{there}_se_expand")
        table += layer(f"{here}/project", f"{there}_project_conv", f"{there}_project_bn")
    table += layer("top", "top_conv", "top_bn")
    return table + (keras_dense_rules("head", "predictions") if head != "model" else [])
