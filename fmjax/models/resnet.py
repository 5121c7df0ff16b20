"""ResNet (He et al. 2015, arXiv:1512.03385): residual stages of convolutions. HF "resnet".

The stride of a bottleneck is in its 3 x 3 convolution ("v1.5", as torchvision and Hugging Face have
it), or in the first one as published, with ``downsample_in_bottleneck``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.checks import refuse
from fmjax.nn.conv import ConvNorm, max_pool
from fmjax.nn.convnet import ConvNet, stage_problems
from fmjax.nn.mlp import activation
from fmjax.weights import (
    Rule,
    also_named,
    conv_norm_rules,
    dense_rules,
    keras_conv_norm_rules,
    keras_dense_rules,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = stage_problems(self)
        if self.layer_type not in ("basic", "bottleneck"):
            problems.append(f"layer_type={self.layer_type!r} must be 'basic' or 'bottleneck'")
        if self.layer_type == "bottleneck" and any(size % 4 for size in self.hidden_sizes):
            problems.append(f"hidden_sizes={self.hidden_sizes} of bottlenecks must divide by 4")
        refuse(self, problems)


MODEL_TYPE = "resnet"
HEADS = {"model": "ResNetModel", "image_classification": "ResNetForImageClassification"}


def _published(layer_type: str, *depths: int) -> Config:
    widths = (64, 128, 256, 512) if layer_type == "basic" else (256, 512, 1024, 2048)
    return Config(hidden_sizes=widths, depths=depths, layer_type=layer_type)


VARIANTS = {
    "tiny": Config(embedding_size=8, hidden_sizes=(8, 16), depths=(2, 2)),
    # He et al. 2015, table 1; "26" is timm's, which Hugging Face has too.
    "18": _published("basic", 2, 2, 2, 2),
    "26": _published("bottleneck", 2, 2, 2, 2),
    "34": _published("basic", 3, 4, 6, 3),
    "50": _published("bottleneck", 3, 4, 6, 3),
    "101": _published("bottleneck", 3, 4, 23, 3),
    "152": _published("bottleneck", 3, 8, 36, 3),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block stands.

    Args:
        features: O, at its end.
        stride: by which it makes the image smaller.
        shortcut: whether the residual is a convolution too.
    """

    features: int
    stride: int
    shortcut: bool


def places(config: Any) -> Iterator[tuple[Place, ...]]:
    """The blocks of each stage."""
    width = config.embedding_size
    for stage, (features, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        stride = 2 if stage or config.downsample_in_first_stage else 1
        yield tuple(
            Place(
                features,
                1 if block else stride,
                not block and (stride != 1 or width != features),
            )
            for block in range(depth)
        )
        width = features


def convolutions(config: Config, place: Place) -> tuple[tuple[int, int, int], ...]:
    """(features, size, stride) of a block's convolutions."""
    if config.layer_type == "basic":
        return (place.features, 3, place.stride), (place.features, 3, 1)
    inner = place.features // 4
    first, second = (place.stride, 1) if config.downsample_in_bottleneck else (1, place.stride)
    return (inner, 1, first), (inner, 3, second), (place.features, 1, 1)


class Block(nn.Module):
    """Two or three convolutions and the residual around them."""

    config: Config
    place: Place
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        config, place = self.config, self.place
        layers = convolutions(config, place)
        y = x
        for number, layer in enumerate(layers):
            act = "relu" if number < len(layers) - 1 else None  # whatever hidden_act, as in PyTorch
            y = ConvNorm(*layer, act, self.train, name=f"conv_{number}")(y)
        if place.shortcut:
            x = ConvNorm(place.features, 1, place.stride, train=self.train, name="shortcut")(x)
        return activation(config.hidden_act)(x + y)


class Stage(nn.Module):
    """Blocks one after another, of which the first may make the image smaller."""

    block: Callable[..., nn.Module]
    config: Any
    places: tuple[Place, ...]
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        for number, place in enumerate(self.places):
            x = self.block(self.config, place, self.train, name=f"blocks_{number}")(x)
        return x


class Model(ConvNet):
    """ResNet with one head; see `fmjax.nn.convnet.ConvNet`.

    Hidden states are the stem's output and each stage's.
    """

    heads = HEADS
    block: ClassVar[type[nn.Module]] = Block

    @property
    def kernel_init(self) -> Callable[..., Array]:
        # PyTorch's default of a Linear: uniform within 1 / sqrt(I).
        return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

    def stem(self, pixel_values: Array, train: bool) -> Array:
        """[B, X, Y, C] -> [B, X', Y', O]; called in a compact method, a module named "embed"."""
        config = self.config
        x = ConvNorm(config.embedding_size, 7, 2, config.hidden_act, train, name="embed")(
            pixel_values
        )
        return max_pool(x, 3, 2, 1)

    def features(self, pixel_values: Array, train: bool) -> tuple[Array, Sequence[Array]]:
        x = self.stem(pixel_values, train)
        states, block = [x], self.recomputed(self.block)
        for number, blocks in enumerate(places(self.config)):
            x = Stage(block, self.config, blocks, train, name=f"stages_{number}")(x)
            states.append(x)
        return x, states


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    return {"pixel_values": jnp.zeros((1, 32, 32, config.num_channels))}


PREFIX = "resnet."
# What a backbone would give to another model.
FIXED = {"out_features": ..., "out_indices": ..., "stage_names": ...}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head.

    Torchvision's and timm's names of the same tensors are read too.
    """
    body = "" if head == "model" else PREFIX

    def layer(param: str, here: str, conv: str, norm: str) -> list[Rule]:
        names = f"{here}.convolution", f"{here}.normalization"
        return conv_norm_rules(param, *names, also=[(conv, norm)])

    table = layer("embed", f"{body}embedder.embedder", "conv1", "bn1")
    for stage, blocks in enumerate(places(config)):
        for block, place in enumerate(blocks):
            param = f"stages_{stage}/blocks_{block}"
            here = f"{body}encoder.stages.{stage}.layers.{block}"
            there = f"layer{stage + 1}.{block}"
            for i in range(len(convolutions(config, place))):
                names = f"{there}.conv{i + 1}", f"{there}.bn{i + 1}"
                table += layer(f"{param}/conv_{i}", f"{here}.layer.{i}", *names)
            if place.shortcut:
                names = f"{there}.downsample.0", f"{there}.downsample.1"
                table += layer(f"{param}/shortcut", f"{here}.shortcut", *names)
    if head == "image_classification":
        table += also_named(dense_rules("head", "classifier.1"), "fc")
    return table


def keras_config(config: Config) -> Config:
    """The config of Keras' ResNet (not V2): the stride is in the first convolution."""
    if config.layer_type != "bottleneck" or config.downsample_in_first_stage:
        raise ValueError("keras.applications has no such ResNet; it has 50, 101 and 152")
    return dataclasses.replace(config, downsample_in_bottleneck=True)


def keras_rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the tensors they are in Keras' files; there convolutions have biases."""

    def layer(param: str, name: str) -> list[Rule]:
        # Keras' epsilon is 1.001e-5, ours 1e-5.
        return keras_conv_norm_rules(
            param, f"{name}_conv", f"{name}_bn", bias=True, epsilon=0.001e-5
        )

    table = layer("embed", "conv1")
    for stage, blocks in enumerate(places(config)):
        for block, place in enumerate(blocks):
            here, there = f"stages_{stage}/blocks_{block}", f"conv{stage + 2}_block{block + 1}"
            for i in range(3):
                table += layer(f"{here}/conv_{i}", f"{there}_{i + 1}")
            if place.shortcut:
                table += layer(f"{here}/shortcut", f"{there}_0")
    return table + (keras_dense_rules("head", "predictions") if head != "model" else [])
