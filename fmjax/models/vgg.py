"""VGG (Simonyan & Zisserman 2014, arXiv:1409.1556): stacks of 3 x 3 convolutions with pooling
between them, and dense layers. Torchvision's names of tensors, with batch normalisation or without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.activation import activation
from fmjax.nn.checks import refuse
from fmjax.nn.conv import Conv, average_grid, max_pool
from fmjax.nn.convnet import ConvNet, stage_problems
from fmjax.nn.dropout import Dropout
from fmjax.nn.linear import Dense
from fmjax.nn.norm import BatchNorm
from fmjax.nn.vision import pair
from fmjax.weights import (
    Rule,
    batch_norm_rules,
    channels_first,
    conv_rules,
    dense_rules,
    keras_dense_rules,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json; Hugging Face has no VGG, so they are our own.

    Attributes:
      image_size: what the model is traced on; images of other sizes are averaged to the same grid.
      hidden_sizes, depths: of each stage, the features and how many convolutions it has.
      batch_norm: whether each convolution is followed by batch normalisation.
      pooled_size: rows and columns of the grid that the dense layers read.
      dense_sizes: of the layers before the classifier; with none it reads the grid itself.
      dropout: after each of them.
    """

    num_channels: int = 3
    image_size: int | tuple[int, ...] = 224
    hidden_sizes: tuple[int, ...] = (64, 128, 256, 512, 512)
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    batch_norm: bool = False
    hidden_act: str = "relu"
    pooled_size: int | tuple[int, ...] = 7
    dense_sizes: tuple[int, ...] = (4096, 4096)
    dropout: float = 0.5
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = stage_problems(self)
        if any(size < 1 for size in self.dense_sizes):
            problems.append(f"dense_sizes={self.dense_sizes} must be positive")
        for name in ("image_size", "pooled_size"):
            value = getattr(self, name)
            if (len(value) if isinstance(value, tuple) else 2) != 2 or min(pair(value)) < 1:
                problems.append(f"{name}={value} must be one number, or rows and columns")
        refuse(self, problems)


MODEL_TYPE = "vgg"
HEADS = {"model": "VGGModel", "image_classification": "VGGForImageClassification"}
# Simonyan & Zisserman 2014, table 1, columns A, B, D, E; "-bn" is torchvision's.
DEPTHS = {
    "11": (1, 1, 2, 2, 2),
    "13": (2, 2, 2, 2, 2),
    "16": (2, 2, 3, 3, 3),
    "19": (2, 2, 4, 4, 4),
}
VARIANTS = {
    "tiny": Config(
        image_size=8, hidden_sizes=(4, 6), depths=(1, 2), batch_norm=True, pooled_size=2,
        dense_sizes=(10,),
    ),
    **{name: Config(depths=depths) for name, depths in DEPTHS.items()},
    **{f"{name}-bn": Config(depths=depths, batch_norm=True) for name, depths in DEPTHS.items()},
}  # fmt: skip


class Stage(nn.Module):
    """Convolutions, each with its activation, and a pooling by 2."""

    config: Config
    number: int
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X / 2, Y / 2, O]
        config = self.config
        for i in range(config.depths[self.number]):
            features = config.hidden_sizes[self.number]
            x = Conv(features, 3, use_bias=True, name=f"conv_{i}")(x)
            if config.batch_norm:
                x = BatchNorm(self.train, name=f"norm_{i}")(x)
            x = activation(config.hidden_act)(x)
        return max_pool(x, 2, 2)


class Model(ConvNet):
    """VGG with one head; see `fmjax.nn.convnet.ConvNet`.

    Hidden states are each stage's output, the pooler's that of the last dense layer.
    """

    heads = HEADS

    @property
    def kernel_init(self) -> Callable[..., Array]:
        return nn.initializers.normal(0.01)  # section 3.1

    @property
    def least(self) -> tuple[int, int]:
        size = 2 ** len(self.config.depths)
        return size, size

    def features(self, pixel_values: Array, train: bool) -> tuple[Array, Sequence[Array]]:
        x, states, stage = pixel_values, [], self.recomputed(Stage)
        for number in range(len(self.config.depths)):
            x = stage(self.config, number, train, name=f"stages_{number}")(x)
            states.append(x)
        return x, states

    def pool(self, x: Array, train: bool) -> Array:
        config = self.config
        y = average_grid(x, pair(config.pooled_size))
        y = jnp.moveaxis(y, -1, 1).reshape(y.shape[0], -1)  # [B, C * X * Y], as PyTorch flattens
        for number, width in enumerate(config.dense_sizes):
            y = Dense(width, kernel_init=self.kernel_init, name=f"dense_{number}")(y)
            y = Dropout(config.dropout)(activation(config.hidden_act)(y), train)
        return y


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    return {"pixel_values": jnp.zeros((1, *pair(config.image_size), config.num_channels))}


PREFIX = ""
FIXED = {}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    table: list[Rule] = []
    for param, place, kind in _features(config):
        make = batch_norm_rules(param, f"features.{place}")
        table += conv_rules(param, f"features.{place}", bias=True) if kind == "conv" else make
    names = [f"dense_{i}" for i in range(len(config.dense_sizes))]
    if head == "image_classification":
        names.append("head")
    for number, name in enumerate(names):
        # Each dense layer is followed by its activation and dropout.
        table += dense_rules(name, f"classifier.{3 * number}")
    return table


def _features(config: Config) -> Iterator[tuple[str, int, str]]:
    """(parameter, number in torchvision's Sequential, kind) of each layer with parameters."""
    place = 0
    for stage, depth in enumerate(config.depths):
        for i in range(depth):
            yield f"stages_{stage}/conv_{i}", place, "conv"
            if config.batch_norm:
                yield f"stages_{stage}/norm_{i}", place + 1, "norm"
            place += 2 + config.batch_norm  # the activation has a number too
        place += 1  # and the pooling


def keras_config(config: Config) -> Config:
    """The config of Keras' VGG: the same."""
    if config.batch_norm:
        raise ValueError(
            "keras.applications has no VGG with batch normalisation; take a variant without"
        )
    return config


def keras_rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the tensors they are in Keras' files.

    Keras flattens the last image pixel by pixel, PyTorch feature by feature. Keras' model takes
    images of one size alone, whose last grid must be ``pooled_size``.
    """
    table: list[Rule] = []
    for param, _, _ in _features(config):
        stage, conv = (part.rpartition("_")[2] for part in param.split("/"))
        table += keras_dense_rules(param, f"block{int(stage) + 1}_conv{int(conv) + 1}")
    layers = [f"fc{i + 1}" for i in range(len(config.dense_sizes))]
    names = [f"dense_{i}" for i in range(len(config.dense_sizes))]
    if head == "image_classification":
        names, layers = [*names, "head"], [*layers, "predictions"]
    for name, layer in zip(names, layers, strict=True):
        table += keras_dense_rules(name, layer)
    flat = f"params/{names[0]}/kernel" if names else None
    grid = channels_first(*pair(config.pooled_size))
    return [
        dataclasses.replace(rule, transform=grid) if rule.param == flat else rule for rule in table
    ]
