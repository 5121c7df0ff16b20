"""GoogLeNet (Szegedy et al. 2014, arXiv:1409.4842), Inception v1: blocks of parallel convolutions
of several sizes. With batch normalisation, as torchvision has it, and its names of tensors.

What the paper has as 5 x 5 is 3 x 3 here: so the published weights were trained. They take pixels
from -1 to 1, (x / 255 - 0.5) / 0.5; torchvision's ``transform_input`` makes these of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.checks import refuse
from fmjax.nn.conv import ConvNorm, average_grid, last_window, max_pool
from fmjax.nn.convnet import ConvNet
from fmjax.nn.dropout import Dropout
from fmjax.nn.linear import Dense
from fmjax.types import Output
from fmjax.weights import Rule, conv_norm_rules, dense_rules

Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json; Hugging Face has no GoogLeNet, so they are our own.

    Attributes:
      stem_sizes: features of the three convolutions before the blocks.
      stages: the blocks between poolings; of each the features of its convolutions, in the columns
        of the paper's table 1: 1 x 1; 3 x 3 reduced, 3 x 3; 5 x 5 reduced, 5 x 5; after pooling.
      aux_logits: whether there are classifiers at blocks of the second stage, for training.
      auxiliary_blocks: after which blocks.
      auxiliary_sizes: features of their convolution and of their hidden layer.
      auxiliary_dropout: after it.
      auxiliary_weight: of each one's loss, when training (section 5).
      dropout: before the classifier.
    """

    num_channels: int = 3
    stem_sizes: tuple[int, ...] = (64, 64, 192)
    stages: tuple[tuple[Sizes, ...], ...] = (
        ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
        (
            (192, 96, 208, 16, 48, 64),
            (160, 112, 224, 24, 64, 64),
            (128, 128, 256, 24, 64, 64),
            (112, 144, 288, 32, 64, 64),
            (256, 160, 320, 32, 128, 128),
        ),
        ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
    )
    aux_logits: bool = True
    auxiliary_blocks: tuple[int, ...] = (0, 3)
    auxiliary_sizes: tuple[int, ...] = (128, 1024)
    auxiliary_dropout: float = 0.7
    auxiliary_weight: float = 0.3
    dropout: float = 0.2
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = []
        for name, count in (("stem_sizes", 3), ("auxiliary_sizes", 2), ("auxiliary_blocks", 2)):
            if len(getattr(self, name)) != count:
                problems.append(f"{name}={getattr(self, name)} must be {count} numbers")
        if len(self.stages) != 3 or not all(self.stages):
            problems.append(f"stages={self.stages} must be three, of at least one block each")
        elif any(not 0 <= block < len(self.stages[1]) for block in self.auxiliary_blocks):
            problems.append(f"auxiliary_blocks={self.auxiliary_blocks} are not in the second stage")
        blocks = [block for stage in self.stages for block in stage]
        if any(len(block) != 6 for block in blocks):
            problems.append(f"stages={self.stages} must have six numbers a block")
        for sizes in (self.stem_sizes, self.auxiliary_sizes, *blocks):
            if any(size < 1 for size in sizes):
                problems.append(f"the features {sizes} must be positive")
        if self.auxiliary_weight < 0:
            problems.append(f"auxiliary_weight={self.auxiliary_weight} must not be negative")
        refuse(self, problems)


MODEL_TYPE = "googlenet"
HEADS = {"model": "GoogLeNetModel", "image_classification": "GoogLeNetForImageClassification"}
VARIANTS = {
    "tiny": Config(
        stem_sizes=(4, 4, 6),
        stages=(((2, 3, 4, 2, 3, 2),), ((3, 2, 4, 2, 2, 2),), ((3, 2, 3, 2, 2, 2),)),
        auxiliary_blocks=(0, 0), auxiliary_sizes=(3, 5), auxiliary_dropout=0.0, dropout=0.0,
    ),
    "bn": Config(),  # Szegedy et al. 2014, table 1
}  # fmt: skip
INIT = nn.initializers.normal(0.01)


def conv_norm(features: int, size: int, train: bool, name: str, stride: int = 1) -> ConvNorm:
    """A convolution, its normalisation and activation."""
    return ConvNorm(features, size, stride, "relu", train, 1e-3, kernel_init=INIT, name=name)


def branches(sizes: Sizes) -> Iterator[tuple[tuple[str, int, int], ...]]:
    """(name, features, size) of the convolutions of each branch; the last one's come after a
    pooling.
    """
    yield (("branch_0_0", sizes[0], 1),)
    yield ("branch_1_0", sizes[1], 1), ("branch_1_1", sizes[2], 3)
    yield ("branch_2_0", sizes[3], 1), ("branch_2_1", sizes[4], 3)
    yield (("branch_3_0", sizes[5], 1),)


class Block(nn.Module):
    """Four branches side by side."""

    sizes: Sizes
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X, Y, O]
        outputs = [x, x, x, max_pool(x, 3, 1, 1)]
        for number, branch in enumerate(branches(self.sizes)):
            for name, features, size in branch:
                outputs[number] = conv_norm(features, size, self.train, name)(outputs[number])
        return jnp.concatenate(outputs, axis=-1)


class Auxiliary(nn.Module):
    """A classifier at an earlier layer."""

    config: Config
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, C]
        config = self.config
        width, hidden = config.auxiliary_sizes
        y = conv_norm(width, 1, self.train, "conv")(average_grid(x, (4, 4)))
        y = jnp.moveaxis(y, -1, 1).reshape(y.shape[0], -1)  # [B, C * X * Y], as PyTorch flattens
        y = jax.nn.relu(Dense(hidden, kernel_init=INIT, name="dense")(y))
        y = Dropout(config.auxiliary_dropout)(y, self.train)
        return Dense(len(config.id2label), kernel_init=INIT, name="head")(y).astype(jnp.float32)


class Model(ConvNet):
    """GoogLeNet with one head; see `fmjax.nn.convnet.ConvNet`.

    Hidden states are the stem's output and each block's. In training the classifier returns
    ``auxiliary_logits``, whose losses the task adds.
    """

    heads = HEADS

    @property
    def kernel_init(self) -> Callable[..., Array]:
        return INIT

    @property
    def head_dropout(self) -> float:
        return self.config.dropout

    @property
    def least(self) -> tuple[int, int]:
        return 15, 15  # as torchvision says

    def features(self, pixel_values: Array, train: bool) -> tuple[Array, Sequence[Array]]:
        config, block = self.config, self.recomputed(Block)
        first, second, third = config.stem_sizes
        x = halved(conv_norm(first, 7, train, "embed_0", 2)(pixel_values), 3)
        x = conv_norm(second, 1, train, "embed_1")(x)
        x = halved(conv_norm(third, 3, train, "embed_2")(x), 3)
        states = [x]
        for stage, blocks in enumerate(config.stages):
            if stage:
                x = halved(x, 3 if stage == 1 else 2)
            for number, sizes in enumerate(blocks):
                x = block(sizes, train, name=f"stages_{stage}_blocks_{number}")(x)
                states.append(x)
        return x, states

    def outputs(self, x: Array, states: Sequence[Array], train: bool) -> Output:
        config, out = self.config, super().outputs(x, states, train)
        wanted = self.head == "image_classification" and config.aux_logits
        if not wanted or not (train or self.is_initializing()):
            return out
        second = states[1 + len(config.stages[0]) :]
        logits = [
            Auxiliary(config, train, name=f"auxiliary_{number}")(second[block])
            for number, block in enumerate(config.auxiliary_blocks)
        ]
        return dataclasses.replace(out, auxiliary_logits=tuple(logits))


def halved(x: Array, size: int) -> Array:
    """The largest values of windows that are two pixels apart."""
    return max_pool(x, size, 2, last_window(x.shape[1:3], size, 2))


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    return {"pixel_values": jnp.zeros((1, 32, 32, config.num_channels))}


PREFIX = ""
FIXED = {}
IGNORED = (r"^aux[12]\.",)  # without aux_logits
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""

    def layer(param: str, tensor: str) -> list[Rule]:
        return conv_norm_rules(param, f"{tensor}.conv", f"{tensor}.bn")

    table = [rule for i in range(3) for rule in layer(f"embed_{i}", f"conv{i + 1}")]
    for stage, blocks in enumerate(config.stages):
        for number, sizes in enumerate(blocks):
            here = f"stages_{stage}_blocks_{number}"
            there = f"inception{stage + 3}{chr(ord('a') + number)}"
            # In torchvision's Sequential of the last branch the pooling is number 0.
            names = ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1")
            ours = [name for branch in branches(sizes) for name, _, _ in branch]
            for param, name in zip(ours, names, strict=True):
                table += layer(f"{here}/{param}", f"{there}.{name}")
    if head == "model":
        return table
    if config.aux_logits:
        for number in range(len(config.auxiliary_blocks)):
            here, there = f"auxiliary_{number}", f"aux{number + 1}"
            table += layer(f"{here}/conv", f"{there}.conv")
            table += dense_rules(f"{here}/dense", f"{there}.fc1")
            table += dense_rules(f"{here}/head", f"{there}.fc2")
    return table + dense_rules("head", "fc")
