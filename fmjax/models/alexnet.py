"""AlexNet (Krizhevsky et al. 2012; Krizhevsky 2014, arXiv:1404.5997, the version with one column):
five convolutions, three poolings and dense layers. Torchvision's names of tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.activation import activation
from fmjax.nn.checks import refuse
from fmjax.nn.conv import Conv, average_grid, max_pool
from fmjax.nn.convnet import ConvNet
from fmjax.nn.dropout import Dropout
from fmjax.nn.linear import Dense
from fmjax.nn.vision import pair
from fmjax.weights import Rule, conv_rules, dense_rules


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json; Hugging Face has no AlexNet, so they are our own.

    Attributes:
      hidden_sizes: features of the five convolutions.
      pooled_size: rows and columns of the grid that the dense layers read.
      dense_sizes: of the layers before the classifier.
      dropout: before each of them.
    """

    num_channels: int = 3
    hidden_sizes: tuple[int, ...] = (64, 192, 384, 256, 256)
    hidden_act: str = "relu"
    pooled_size: int | tuple[int, ...] = 6
    dense_sizes: tuple[int, ...] = (4096, 4096)
    dropout: float = 0.5
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = []
        if len(self.hidden_sizes) != len(LAYERS):
            problems.append(f"hidden_sizes={self.hidden_sizes} must be {len(LAYERS)} numbers")
        for name in ("hidden_sizes", "dense_sizes"):
            if any(size < 1 for size in getattr(self, name)):
                problems.append(f"{name}={getattr(self, name)} must be positive")
        grid = self.pooled_size
        if (len(grid) if isinstance(grid, tuple) else 2) != 2 or min(pair(grid)) < 1:
            problems.append(f"pooled_size={grid} must be one number, or rows and columns")
        refuse(self, problems)


# Of each convolution: size and stride, zeros around the image, whether a pooling follows.
LAYERS = ((11, 4, 2, True), (5, 1, 2, True), (3, 1, 1, False), (3, 1, 1, False), (3, 1, 1, True))

MODEL_TYPE = "alexnet"
HEADS = {"model": "AlexNetModel", "image_classification": "AlexNetForImageClassification"}
VARIANTS = {
    "tiny": Config(hidden_sizes=(4, 6, 5, 4, 3), pooled_size=2, dense_sizes=(10,)),
    "one-column": Config(),  # Krizhevsky 2014; "One weird trick for parallelizing"
}


class Model(ConvNet):
    """AlexNet with one head; see `fmjax.nn.convnet.ConvNet`.

    Hidden states are each convolution's output, pooled where it is; the pooler's is that of the
    last dense layer. `remat` has no effect.
    """

    heads = HEADS

    @property
    def kernel_init(self) -> Callable[..., Array]:
        return nn.initializers.normal(0.01)  # Krizhevsky et al. 2012, section 5

    @property
    def least(self) -> tuple[int, int]:
        return 63, 63

    def features(self, pixel_values: Array, train: bool) -> tuple[Array, Sequence[Array]]:
        config, x, states = self.config, pixel_values, []
        for number, (size, stride, zeros, pooled) in enumerate(LAYERS):
            around = ((zeros, zeros), (zeros, zeros))
            x = Conv(
                config.hidden_sizes[number], size, stride, use_bias=True, around=around,
                name=f"conv_{number}",
            )(x)  # fmt: skip
            x = activation(config.hidden_act)(x)
            x = max_pool(x, 3, 2) if pooled else x
            states.append(x)
        return x, states

    def pool(self, x: Array, train: bool) -> Array:
        config = self.config
        y = average_grid(x, pair(config.pooled_size))
        y = jnp.moveaxis(y, -1, 1).reshape(y.shape[0], -1)  # [B, C * X * Y], as PyTorch flattens
        for number, width in enumerate(config.dense_sizes):
            y = Dropout(config.dropout)(y, train)
            y = Dense(width, kernel_init=self.kernel_init, name=f"dense_{number}")(y)
            y = activation(config.hidden_act)(y)
        return y


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    return {"pixel_values": jnp.zeros((1, 63, 63, config.num_channels))}


PREFIX = ""
FIXED = {}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    table: list[Rule] = []
    place = 0  # in torchvision's Sequential, where activations and poolings have numbers too
    for number, (_, _, _, pooled) in enumerate(LAYERS):
        table += conv_rules(f"conv_{number}", f"features.{place}", bias=True)
        place += 2 + pooled
    for number in range(len(config.dense_sizes)):
        table += dense_rules(f"dense_{number}", f"classifier.{3 * number + 1}")
    if head == "image_classification":
        table += dense_rules("head", f"classifier.{3 * len(config.dense_sizes)}")
    return table
