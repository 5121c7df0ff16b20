"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381): inverted bottlenecks with narrow, linear
ends; DeepLabV3+'s head (Chen et al. 2018, arXiv:1802.02611) for segmentation. HF "mobilenet_v2".

Batch normalisation keeps 0.997 of its running statistics at each step, as TensorFlow does, where
the weights are from. (PyTorch's class takes 0.997 for the share of the new.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.checks import refuse
from fmjax.nn.conv import Around, Conv, ConvNorm, average, half_a_window, same_padding, window
from fmjax.nn.convnet import ConvNet, divisible
from fmjax.nn.dropout import Dropout
from fmjax.types import Output
from fmjax.weights import (
    Rule,
    also_named,
    conv_norm_rules,
    conv_rules,
    dense_rules,
    keras_conv_norm_rules,
    keras_dense_rules,
)

# Sandler et al. 2018, table 2, of each block after the first: its features and its stride.
WIDTHS = (24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
SEGMENTATION_WIDTH = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    num_channels: int = 3
    image_size: int | tuple[int, ...] = 224
    depth_multiplier: float = 1.0
    depth_divisible_by: int = 8
    min_depth: int = 8
    expand_ratio: float = 6.0
    output_stride: int = 32
    first_layer_is_expansion: bool = True
    finegrained_output: bool = True
    hidden_act: str = "relu6"
    tf_padding: bool = True
    classifier_dropout_prob: float = 0.8
    initializer_range: float = 0.02
    layer_norm_eps: float = 0.001
    semantic_loss_ignore_index: int = 255  # read by the task, as the next
    problem_type: str | None = None
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value} must be positive"
            for name in ("depth_multiplier", "depth_divisible_by", "min_depth", "expand_ratio")
            if (value := getattr(self, name)) <= 0
        ]
        if self.output_stride not in (2, 4, 8, 16, 32):
            problems.append(f"output_stride={self.output_stride} must be 2, 4, 8, 16 or 32")
        refuse(self, problems)

    def scaled(self, width: int) -> int:
        """Features by the multiplier."""
        wanted = round(width * self.depth_multiplier)
        return divisible(wanted, self.depth_divisible_by, self.min_depth)

    def expanded(self, width: int) -> int:
        """Features inside a block that is given `width`."""
        wanted = round(width * self.expand_ratio)
        return divisible(wanted, self.depth_divisible_by, self.min_depth)

    @property
    def top_width(self) -> int:
        """Features of the last convolution."""
        fine = self.finegrained_output and self.depth_multiplier < 1
        return 1280 if fine else self.scaled(1280)

    def padding(self, image: tuple[int, ...], size: int, stride: int, dilation: int = 1) -> Around:
        """Zeros around an image before a convolution."""
        whole = window(size, dilation)
        return same_padding(image, whole, stride) if self.tf_padding else half_a_window(whole)


MODEL_TYPE = "mobilenet_v2"
HEADS = {
    "model": "MobileNetV2Model",
    "image_classification": "MobileNetV2ForImageClassification",
    "semantic_segmentation": "MobileNetV2ForSemanticSegmentation",
}
VARIANTS = {
    "tiny": Config(
        image_size=32, depth_multiplier=0.125, depth_divisible_by=2, min_depth=4, expand_ratio=1.5,
        output_stride=16, finegrained_output=False, classifier_dropout_prob=0.0,
    ),
    # Width and resolution of the published checkpoints.
    "0.35-96": Config(depth_multiplier=0.35, image_size=96),
    "0.75-160": Config(depth_multiplier=0.75, image_size=160),
    "1.0-224": Config(),
    "1.4-224": Config(depth_multiplier=1.4),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block stands.

    Args:
        number: of the block.
        expand: whether it begins with a convolution of one pixel.
        inner: features of its depthwise convolution.
        features: O, at its end.
        stride, dilation: of the depthwise convolution.
        residual: whether what it is given is added at the end.
    """

    number: int
    expand: bool
    inner: int
    features: int
    stride: int
    dilation: int
    residual: bool


def places(config: Config) -> Iterator[Place]:
    """All blocks, from the first to the last."""
    inner, width = config.scaled(32), config.scaled(16)
    yield Place(0, not config.first_layer_is_expansion, inner, width, 1, 1, False)
    reached, dilation = 2, 1
    for i, (features, wanted) in enumerate(zip(map(config.scaled, WIDTHS), STRIDES, strict=True)):
        inner, here = config.expanded(width), dilation
        if reached == config.output_stride:
            # The image stays as large; what follows sees as far by gaps in its windows.
            stride, dilation = 1, dilation * wanted
        else:
            stride, reached = wanted, reached * wanted
        residual = stride == 1 and width == features
        yield Place(i + 1, True, inner, features, stride, here, residual)
        width = features


def layer(
    config: Config,
    x: Array,
    train: bool,
    features: int,
    size: int = 1,
    stride: int = 1,
    *,
    act: str | None,
    groups: int = 1,
    dilation: int = 1,
    epsilon: float | None = None,
    name: str,
) -> Array:
    """A convolution, its normalisation and activation; called in a compact method."""
    return ConvNorm(
        features,
        size,
        stride,
        act,
        train,
        config.layer_norm_eps if epsilon is None else epsilon,
        1 - 0.997,
        nn.initializers.normal(config.initializer_range),
        config.padding(x.shape[1:3], size, stride, dilation),
        groups,
        dilation,
        name=name,
    )(x)


class Block(nn.Module):
    """An inverted bottleneck: wide between two convolutions of one pixel, narrow outside."""

    config: Config
    place: Place
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        config, place, train = self.config, self.place, self.train
        act, y = config.hidden_act, x
        if place.expand:
            y = layer(config, y, train, place.inner, act=act, name="expand")
        y = layer(
            config, y, train, place.inner, 3, place.stride,
            act=act, groups=place.inner, dilation=place.dilation, name="depthwise",
        )  # fmt: skip
        y = layer(config, y, train, place.features, act=None, name="project")
        return x + y if place.residual else y


class Segmentation(nn.Module):
    """Labels of pixels, from each pixel and the mean over all."""

    config: Config
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X, Y, C]
        config, train = self.config, self.train

        def dense(x: Array, name: str) -> Array:
            options = {"act": "relu", "epsilon": 1e-5, "name": name}
            return layer(config, x, train, SEGMENTATION_WIDTH, **options)

        pooled = dense(average(x)[:, None, None], "pool")
        pixels = dense(x, "pixels")
        pooled = jnp.broadcast_to(pooled, pixels.shape)
        y = dense(jnp.concatenate([pooled, pixels], axis=-1), "project")
        # Whole features of an image are dropped.
        keep = jnp.ones((y.shape[0], 1, 1, y.shape[-1]), y.dtype)
        y = y * Dropout(config.classifier_dropout_prob)(keep, train)
        init = nn.initializers.normal(config.initializer_range)
        labels = len(config.id2label)
        return Conv(labels, 1, kernel_init=init, use_bias=True, name="out")(y)


class Model(ConvNet):
    """MobileNetV2 with one head; see `fmjax.nn.convnet.ConvNet`.

    Hidden states are each block's after the first. Logits of segmentation are [B, X', Y', C], of
    images smaller by the config's ``output_stride``.
    """

    heads = HEADS

    @property
    def head_dropout(self) -> float:
        return self.config.classifier_dropout_prob

    def features(self, pixel_values: Array, train: bool) -> tuple[Array, Sequence[Array]]:
        config, act = self.config, self.config.hidden_act
        x = layer(config, pixel_values, train, config.scaled(32), 3, 2, act=act, name="embed")
        states, block = [], self.recomputed(Block)
        for place in places(config):
            x = block(config, place, train, name=f"blocks_{place.number}")(x)
            states.append(x)
        return layer(config, x, train, config.top_width, act=act, name="top"), states[1:]

    def outputs(self, x: Array, states: Sequence[Array], train: bool) -> Output:
        if self.head != "semantic_segmentation":
            return super().outputs(x, states, train)
        # The last convolution is in its files, but not read here.
        logits = Segmentation(self.config, train, name="head")(states[-1])
        return Output(logits=logits.astype(jnp.float32))


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    return {"pixel_values": jnp.zeros((1, 32, 32, config.num_channels))}


PREFIX = "mobilenet_v2."
FIXED = {}
IGNORED = ()


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what torchvision's files differ in, where the names are its own."""
    if "features.0.0.weight" not in names:
        return config
    return dataclasses.replace(config, tf_padding=False, layer_norm_eps=1e-5)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head.

    Torchvision's names of the same tensors are read too.
    """
    body = "" if head == "model" else PREFIX

    def conv(param: str, here: str, *also: tuple[str, str]) -> list[Rule]:
        return conv_norm_rules(param, f"{here}.convolution", f"{here}.normalization", also=also)

    stem, end = f"{body}conv_stem", f"features.{len(WIDTHS) + 2}"
    table = conv("embed", f"{stem}.first_conv", ("features.0.0", "features.0.1"))
    for place in places(config):
        param, there = f"blocks_{place.number}", f"features.{place.number + 1}.conv"
        here = f"{body}layer.{place.number - 1}" if place.number else stem
        step = 0  # in torchvision's Sequential
        for name, module in (("expand", "expand_1x1"), ("depthwise", "conv_3x3")):
            if name == "depthwise" or place.expand:
                names = f"{there}.{step}.0", f"{there}.{step}.1"
                table += conv(f"{param}/{name}", f"{here}.{module}", names)
                step += 1
        names = f"{there}.{step}", f"{there}.{step + 1}"
        table += conv(f"{param}/project", f"{here}.reduce_1x1", names)
    table += conv("top", f"{body}conv_1x1", (f"{end}.0", f"{end}.1"))
    if head == "image_classification":
        table += also_named(dense_rules("head", "classifier"), "classifier.1")
    elif head == "semantic_segmentation":
        for name, module in (
            ("pool", "conv_pool"),
            ("pixels", "conv_aspp"),
            ("project", "conv_projection"),
        ):
            table += conv(f"head/{name}", f"segmentation_head.{module}")
        table += conv_rules("head/out", "segmentation_head.classifier.convolution", bias=True)
    return table


def keras_config(config: Config) -> Config:
    """The config of Keras' MobileNetV2: the same, where its first block adds nothing."""
    if config.scaled(32) == config.scaled(16):
        raise ValueError(
            f"depth_multiplier={config.depth_multiplier}: the first block has {config.scaled(16)} "
            "features before and after, which Keras' MobileNetV2 would add; it is another function"
        )
    return config


def keras_rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the tensors they are in Keras' files."""
    table = keras_conv_norm_rules("embed", "Conv1", "bn_Conv1")
    for place in places(config):
        here = f"blocks_{place.number}"
        there = f"block_{place.number}" if place.number else "expanded_conv"
        for name in ("expand", "depthwise", "project"):
            if name != "expand" or place.expand:
                table += keras_conv_norm_rules(
                    f"{here}/{name}", f"{there}_{name}", f"{there}_{name}_BN",
                    depthwise=name == "depthwise",
                )  # fmt: skip
    table += keras_conv_norm_rules("top", "Conv_1", "Conv_1_bn")
    dense = keras_dense_rules("head", "predictions")
    return table + (dense if head == "image_classification" else [])
