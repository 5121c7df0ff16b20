"""Inception v3 (Szegedy et al. 2015, arXiv:1512.00567): blocks of parallel convolutions, large ones
factorised into rows and columns. Torchvision's names of tensors, and Keras'.

The published weights take pixels from -1 to 1, (x / 255 - 0.5) / 0.5; torchvision's
``transform_input`` makes these of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.checks import refuse
from fmjax.nn.conv import Around, ConvNorm, average, average_pool, max_pool
from fmjax.nn.convnet import ConvNet
from fmjax.nn.linear import Dense
from fmjax.types import Output
from fmjax.weights import (
    Rule,
    conv_norm_rules,
    dense_rules,
    keras_conv_norm_rules,
    keras_dense_rules,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json; Hugging Face has no Inception v3, so they are our own.

    Attributes:
      depth_multiplier, min_depth: features are the published ones times the first, and at least the
        second.
      pool_features: of each of the first blocks, features after its pooling.
      channels_7x7: of each of the second ones, features between its rows and columns of 7.
      num_last_blocks: how many of the third ones.
      count_include_pad: whether average pooling counts the zeros around images, as PyTorch does and
        TensorFlow does not.
      aux_logits: whether there is a classifier after the second blocks, for training.
      auxiliary_weight: of its loss, when training (the code of the paper).
      dropout: before the classifier.
    """

    num_channels: int = 3
    depth_multiplier: float = 1.0
    min_depth: int = 16
    pool_features: tuple[int, ...] = (32, 64, 64)
    channels_7x7: tuple[int, ...] = (128, 160, 160, 192)
    num_last_blocks: int = 2
    count_include_pad: bool = True
    aux_logits: bool = True
    auxiliary_weight: float = 0.4
    dropout: float = 0.5
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = []
        for name in ("depth_multiplier", "min_depth"):
            if getattr(self, name) <= 0:
                problems.append(f"{name}={getattr(self, name)} must be positive")
        for name in ("pool_features", "channels_7x7"):
            if not all(size > 0 for size in getattr(self, name)):
                problems.append(f"{name}={getattr(self, name)} must be positive")
        for name in ("num_last_blocks", "auxiliary_weight"):
            if getattr(self, name) < 0:
                problems.append(f"{name}={getattr(self, name)} must not be negative")
        refuse(self, problems)

    def scaled(self, width: int) -> int:
        """Features of a convolution whose published ones are given."""
        return max(int(width * self.depth_multiplier), self.min_depth)


MODEL_TYPE = "inception_v3"
HEADS = {"model": "InceptionV3Model", "image_classification": "InceptionV3ForImageClassification"}
VARIANTS = {
    "tiny": Config(
        depth_multiplier=1 / 64, min_depth=2, pool_features=(64,), channels_7x7=(128,),
        num_last_blocks=1, dropout=0.0,
    ),
    "v3": Config(),  # Szegedy et al. 2015, table 1
}  # fmt: skip


class Layer(NamedTuple):
    """A convolution with its normalisation and activation.

    Args:
        name: ours and torchvision's.
        features: the published ones.
        size: of its window, (rows, columns).
        stride: between windows.
        same: whether zeros keep the image's size; at a stride they never do.
    """

    name: str
    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True


THREE, FIVE, ROW, COLUMN = (3, 3), (5, 5), (1, 7), (7, 1)
STEM = (
    Layer("1a_3x3", 32, THREE, 2),
    Layer("2a_3x3", 32, THREE, same=False),
    Layer("2b_3x3", 64, THREE),  # and a pooling
    Layer("3b_1x1", 80),
    Layer("4a_3x3", 192, THREE, same=False),  # and a pooling
)
AUXILIARY = (Layer("conv0", 128), Layer("conv1", 768, FIVE, same=False))
Branch = tuple[tuple[Layer, ...], ...]
"""Layers one after the other; where there are two, both read what is before them."""


def branch(*layers: Layer | tuple[Layer, ...]) -> Branch:
    return tuple((layer,) if isinstance(layer, Layer) else layer for layer in layers)


def first_block(pool_features: int) -> tuple[Branch, ...]:
    """Figure 5; the last branch of each block reads a pooling of the image."""
    return (
        branch(Layer("branch1x1", 64)),
        branch(Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, FIVE)),
        branch(
            Layer("branch3x3dbl_1", 64),
            Layer("branch3x3dbl_2", 96, THREE),
            Layer("branch3x3dbl_3", 96, THREE),
        ),
        branch(Layer("branch_pool", pool_features)),
    )


def second_block(inner: int) -> tuple[Branch, ...]:
    """Figure 6."""
    return (
        branch(Layer("branch1x1", 192)),
        branch(
            Layer("branch7x7_1", inner),
            Layer("branch7x7_2", inner, ROW),
            Layer("branch7x7_3", 192, COLUMN),
        ),
        branch(
            Layer("branch7x7dbl_1", inner),
            Layer("branch7x7dbl_2", inner, COLUMN),
            Layer("branch7x7dbl_3", inner, ROW),
            Layer("branch7x7dbl_4", inner, COLUMN),
            Layer("branch7x7dbl_5", 192, ROW),
        ),
        branch(Layer("branch_pool", 192)),
    )


# Figure 10: the image becomes smaller.
SHRINKING = (
    (),
    (
        branch(Layer("branch3x3", 384, THREE, 2)),
        branch(
            Layer("branch3x3dbl_1", 64),
            Layer("branch3x3dbl_2", 96, THREE),
            Layer("branch3x3dbl_3", 96, THREE, 2),
        ),
        branch(),
    ),
    (
        branch(Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, THREE, 2)),
        branch(
            Layer("branch7x7x3_1", 192),
            Layer("branch7x7x3_2", 192, ROW),
            Layer("branch7x7x3_3", 192, COLUMN),
            Layer("branch7x7x3_4", 192, THREE, 2),
        ),
        branch(),
    ),
)
# Figure 7.
LAST_BLOCK = (
    branch(Layer("branch1x1", 320)),
    branch(
        Layer("branch3x3_1", 384),
        (Layer("branch3x3_2a", 384, (1, 3)), Layer("branch3x3_2b", 384, (3, 1))),
    ),
    branch(
        Layer("branch3x3dbl_1", 448),
        Layer("branch3x3dbl_2", 384, THREE),
        (Layer("branch3x3dbl_3a", 384, (1, 3)), Layer("branch3x3dbl_3b", 384, (3, 1))),
    ),
    branch(Layer("branch_pool", 192)),
)


class Place(NamedTuple):
    """A block: our name, torchvision's, its branches, and whether the image becomes smaller."""

    name: str
    tensor: str
    branches: tuple[Branch, ...]
    shrinks: bool


def places(config: Config) -> Iterator[Place]:
    """All blocks, from the first to the last."""
    kept = (
        [first_block(features) for features in config.pool_features],
        [second_block(inner) for inner in config.channels_7x7],
        [LAST_BLOCK] * config.num_last_blocks,
    )
    for stage, (shrinking, blocks) in enumerate(zip(SHRINKING, kept, strict=True)):
        for number, branches in enumerate([shrinking, *blocks] if shrinking else blocks):
            shrinks = branches is shrinking
            letter = chr(ord("a" if shrinking else "b") + number)
            yield Place(
                f"stages_{stage}_blocks_{number}", f"Mixed_{stage + 5}{letter}", branches, shrinks
            )


def layer_module(config: Config, layer: Layer, train: bool, name: str) -> ConvNorm:
    """The module of a layer."""
    around: Around | None = None if layer.same and layer.stride == 1 else ((0, 0), (0, 0))
    return ConvNorm(
        config.scaled(layer.features), layer.size, layer.stride, "relu", train, 1e-3,
        kernel_init=nn.initializers.normal(0.1), around=around, name=name,
    )  # fmt: skip


class Block(nn.Module):
    """Branches side by side."""

    config: Config
    place: Place
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        config, outputs = self.config, []
        for number, layers in enumerate(self.place.branches):
            y = x
            if number == len(self.place.branches) - 1:
                y = (
                    max_pool(x, 3, 2)
                    if self.place.shrinks
                    else average_pool(x, 3, 1, 1, count_padding=config.count_include_pad)
                )
            for beside in layers:
                ends = [layer_module(config, each, self.train, each.name)(y) for each in beside]
                y = jnp.concatenate(ends, axis=-1)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=-1)


class Auxiliary(nn.Module):
    """A classifier at an earlier layer."""

    config: Config
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, C]
        if min(x.shape[1:3]) < 17:
            raise ValueError(
                f"images are too small for the auxiliary classifier, which reads {x.shape[1:3]} "
                "of them and needs 17 rows and columns: train on 299, or with aux_logits=False"
            )
        x = average_pool(x, 5, 3)
        for layer in AUXILIARY:
            x = layer_module(self.config, layer, self.train, layer.name)(x)
        init = nn.initializers.normal(0.001)
        logits = Dense(len(self.config.id2label), kernel_init=init, name="head")(average(x))
        return logits.astype(jnp.float32)


class Model(ConvNet):
    """Inception v3 with one head; see `fmjax.nn.convnet.ConvNet`.

    Hidden states are the stem's output and each block's. In training the classifier returns
    ``auxiliary_logits``, whose loss the task adds.
    """

    heads = HEADS

    @property
    def kernel_init(self) -> Callable[..., Array]:
        return nn.initializers.normal(0.1)

    @property
    def head_dropout(self) -> float:
        return self.config.dropout

    @property
    def least(self) -> tuple[int, int]:
        return 75, 75

    def features(self, pixel_values: Array, train: bool) -> tuple[Array, Sequence[Array]]:
        x, block = pixel_values, self.recomputed(Block)
        for number, layer in enumerate(STEM):
            x = layer_module(self.config, layer, train, f"embed_{number}")(x)
            if number in (2, 4):
                x = max_pool(x, 3, 2)
        states = [x]
        for place in places(self.config):
            x = block(self.config, place, train, name=place.name)(x)
            states.append(x)
        return x, states

    def outputs(self, x: Array, states: Sequence[Array], train: bool) -> Output:
        config, out = self.config, super().outputs(x, states, train)
        wanted = self.head == "image_classification" and config.aux_logits
        if not wanted or not (train or self.is_initializing()):
            return out
        before = len(config.pool_features) + 1 + len(config.channels_7x7)
        logits = Auxiliary(config, train, name="auxiliary")(states[before])
        return dataclasses.replace(out, auxiliary_logits=(logits,))


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    size = 299 if config.aux_logits and head == "image_classification" else 75
    return {"pixel_values": jnp.zeros((1, size, size, config.num_channels))}


PREFIX = ""
FIXED = {}
IGNORED = (r"^AuxLogits\.",)  # without aux_logits
from_tensors = config_alone


def _layers(place: Place) -> list[Layer]:
    return [layer for layers in place.branches for beside in layers for layer in beside]


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""

    def layer(param: str, tensor: str) -> list[Rule]:
        return conv_norm_rules(param, f"{tensor}.conv", f"{tensor}.bn")

    table: list[Rule] = []
    for number, (name, *_) in enumerate(STEM):
        table += layer(f"embed_{number}", f"Conv2d_{name}")
    for place in places(config):
        for name, *_ in _layers(place):
            table += layer(f"{place.name}/{name}", f"{place.tensor}.{name}")
    if head == "model":
        return table
    if config.aux_logits:
        for name, *_ in AUXILIARY:
            table += layer(f"auxiliary/{name}", f"AuxLogits.{name}")
        table += dense_rules("auxiliary/head", "AuxLogits.fc")
    return table + dense_rules("head", "fc")


def keras_config(config: Config) -> Config:
    """The config of Keras' Inception v3: another average at the borders, one classifier."""
    return dataclasses.replace(config, count_include_pad=False, aux_logits=False)


def keras_rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the tensors they are in Keras' files, whose layers have numbers alone."""
    params = [f"embed_{number}" for number in range(len(STEM))]
    params += [f"{place.name}/{name}" for place in places(config) for name, *_ in _layers(place)]
    table = [
        rule
        for number, param in enumerate(params)
        for rule in keras_conv_norm_rules(
            param, f"conv2d_{number}", f"batch_normalization_{number}", scale=False
        )
    ]
    return table + (keras_dense_rules("head", "predictions") if head != "model" else [])
