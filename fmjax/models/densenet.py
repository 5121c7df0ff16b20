"""DenseNet (Huang et al. 2016, arXiv:1608.06993): every layer reads what all before it made, with
bottlenecks and compression ("DenseNet-BC"). Torchvision's names of tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.checks import refuse
from fmjax.nn.conv import Conv, ConvNorm, average_pool, max_pool
from fmjax.nn.convnet import ConvNet
from fmjax.nn.dropout import Dropout
from fmjax.nn.norm import BatchNorm
from fmjax.nn.remat import recomputed
from fmjax.types import Remat
from fmjax.weights import (
    Rule,
    also_named,
    batch_norm_rules,
    conv_norm_rules,
    conv_rules,
    dense_rules,
    keras_batch_norm_rules,
    keras_conv_norm_rules,
    keras_dense_rules,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json; Hugging Face has no DenseNet, so they are torchvision's arguments.

    Attributes:
      num_init_features: of the first convolution.
      block_config: how many layers each dense block has.
      growth_rate: features that a layer adds.
      bn_size: of a layer's bottleneck, in growth rates.
      drop_rate: dropout of what a layer adds.
    """

    num_channels: int = 3
    num_init_features: int = 64
    block_config: tuple[int, ...] = (6, 12, 24, 16)
    growth_rate: int = 32
    bn_size: int = 4
    drop_rate: float = 0.0
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = []
        if not self.block_config or min(self.block_config) < 1:
            problems.append(f"block_config={self.block_config} must be positive numbers")
        for name in ("num_init_features", "growth_rate", "bn_size"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be positive")
        refuse(self, problems)


MODEL_TYPE = "densenet"
HEADS = {"model": "DenseNetModel", "image_classification": "DenseNetForImageClassification"}
VARIANTS = {
    "tiny": Config(num_init_features=6, block_config=(2, 1), growth_rate=4, bn_size=2),
    # Huang et al. 2016, table 1; 161 is the authors' later one, which torchvision has.
    "121": Config(),
    "161": Config(num_init_features=96, block_config=(6, 12, 36, 24), growth_rate=48),
    "169": Config(block_config=(6, 12, 32, 32)),
    "201": Config(block_config=(6, 12, 48, 32)),
}


class Layer(nn.Module):
    """Two convolutions, each after its normalisation and activation, beside what they read."""

    config: Config
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X, Y, I + growth rate]
        config, y = self.config, x
        for number, (width, size) in enumerate(((config.bn_size, 1), (1, 3))):
            y = jax.nn.relu(BatchNorm(self.train, name=f"norm_{number}")(y))
            y = Conv(width * config.growth_rate, size, name=f"conv_{number}")(y)
        return jnp.concatenate([x, Dropout(config.drop_rate)(y, self.train)], axis=-1)


class DenseBlock(nn.Module):
    """Layers one after another."""

    config: Config
    depth: int
    train: bool
    remat: Remat

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layer = recomputed(Layer, self.remat)
        for number in range(self.depth):
            x = layer(self.config, self.train, name=f"blocks_{number}")(x)
        return x


class Transition(nn.Module):
    """Half of the features of an image of half the size."""

    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, C] -> [B, X / 2, Y / 2, C / 2]
        x = jax.nn.relu(BatchNorm(self.train, name="norm")(x))
        return average_pool(Conv(x.shape[-1] // 2, 1, name="conv")(x), 2, 2)


class Model(ConvNet):
    """DenseNet with one head; see `fmjax.nn.convnet.ConvNet`.

    Hidden states are the stem's output and each dense block's, the last one normalised.
    """

    heads = HEADS

    @property
    def kernel_init(self) -> Callable[..., Array]:
        # PyTorch's default of a Linear: uniform within 1 / sqrt(I).
        return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

    @property
    def least(self) -> tuple[int, int]:
        size = 2 ** (len(self.config.block_config) + 1)
        return size, size

    def features(self, pixel_values: Array, train: bool) -> tuple[Array, Sequence[Array]]:
        config = self.config
        x = ConvNorm(config.num_init_features, 7, 2, "relu", train, name="embed")(pixel_values)
        x = max_pool(x, 3, 2, 1)
        states = [x]
        for number, depth in enumerate(config.block_config):
            if number:
                x = Transition(train, name=f"transitions_{number - 1}")(x)
            x = DenseBlock(config, depth, train, self.remat, name=f"stages_{number}")(x)
            states.append(x)
        x = jax.nn.relu(BatchNorm(train, name="final_norm")(x))
        return x, [*states[:-1], x]


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    size = 2 ** (len(config.block_config) + 1)
    return {"pixel_values": jnp.zeros((1, size, size, config.num_channels))}


PREFIX = ""
FIXED = {}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head.

    In torchvision's older files a layer's names have one more dot, "norm.1".
    """
    table = conv_norm_rules("embed", "features.conv0", "features.norm0")
    for stage, depth in enumerate(config.block_config):
        for layer in range(depth):
            here = f"stages_{stage}/blocks_{layer}"
            there = f"features.denseblock{stage + 1}.denselayer{layer + 1}"
            for i in (0, 1):
                norm = batch_norm_rules(f"{here}/norm_{i}", f"{there}.norm{i + 1}")
                conv = conv_rules(f"{here}/conv_{i}", f"{there}.conv{i + 1}")
                table += also_named(norm, f"{there}.norm.{i + 1}")
                table += also_named(conv, f"{there}.conv.{i + 1}")
        if stage < len(config.block_config) - 1:
            here, there = f"transitions_{stage}", f"features.transition{stage + 1}"
            table += conv_norm_rules(here, f"{there}.conv", f"{there}.norm")
    # Torchvision counts on from "norm0", whatever the number of blocks.
    table += batch_norm_rules("final_norm", "features.norm5")
    return table + (dense_rules("head", "classifier") if head != "model" else [])


def keras_config(config: Config) -> Config:
    """The config of Keras' DenseNet: the same."""
    if len(config.block_config) != 4:
        raise ValueError(
            f"block_config={config.block_config}, but keras.applications' DenseNet has four blocks"
        )
    return config


def keras_rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the tensors they are in Keras' files."""
    epsilon = 0.001e-5  # Keras' is 1.001e-5, ours 1e-5

    def norm(param: str, layer: str) -> list[Rule]:
        return keras_batch_norm_rules(param, layer, epsilon=epsilon)

    def conv(param: str, layer: str) -> list[Rule]:
        return [Rule(f"params/{param}/kernel", f"{layer}/kernel")]

    table = keras_conv_norm_rules("embed", "conv1_conv", "conv1_bn", epsilon=epsilon)
    for stage, depth in enumerate(config.block_config):
        for layer in range(depth):
            here, there = f"stages_{stage}/blocks_{layer}", f"conv{stage + 2}_block{layer + 1}"
            for i in (0, 1):
                table += norm(f"{here}/norm_{i}", f"{there}_{i}_bn")
                table += conv(f"{here}/conv_{i}", f"{there}_{i + 1}_conv")
        if stage < len(config.block_config) - 1:
            here, there = f"transitions_{stage}", f"pool{stage + 2}"
            table += norm(f"{here}/norm", f"{there}_bn") + conv(f"{here}/conv", f"{there}_conv")
    table += norm("final_norm", "bn")
    return table + (keras_dense_rules("head", "predictions") if head != "model" else [])
