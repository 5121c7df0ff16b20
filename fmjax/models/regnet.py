"""RegNet (Radosavovic et al. 2020, arXiv:2003.13678): ResNet's stages of bottlenecks that do not
narrow, with grouped convolutions; "y" with squeeze-and-excitation. HF "regnet".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, resnet
from fmjax.models.resnet import IGNORED, Place, inputs, places
from fmjax.nn.activation import activation
from fmjax.nn.checks import refuse
from fmjax.nn.conv import KAIMING, ConvNorm, squeeze_excite
from fmjax.nn.convnet import stage_problems
from fmjax.nn.norm import BatchNorm
from fmjax.weights import Rule, also_named, conv_norm_rules, conv_rules, dense_rules

__all__ = ["IGNORED", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    num_channels: int = 3
    embedding_size: int = 32
    hidden_sizes: tuple[int, ...] = (128, 192, 512, 1088)
    depths: tuple[int, ...] = (2, 6, 12, 2)
    groups_width: int = 64
    layer_type: str = "y"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = True
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = stage_problems(self)
        if self.layer_type not in ("x", "y"):
            problems.append(f"layer_type={self.layer_type!r} must be 'x' or 'y'")
        if self.groups_width < 1:
            problems.append(f"groups_width={self.groups_width} must be positive")
        elif any(size % self.groups(size) for size in self.hidden_sizes):
            problems.append(
                f"hidden_sizes={self.hidden_sizes} must each divide into as many groups as "
                f"groups_width={self.groups_width} fits into it"
            )
        refuse(self, problems)

    def groups(self, features: int) -> int:
        """Of the convolution in a block."""
        return max(1, features // self.groups_width)


MODEL_TYPE = "regnet"
HEADS = {"model": "RegNetModel", "image_classification": "RegNetForImageClassification"}
# Radosavovic et al. 2020, figures 16 and 17 (blocks, widths, width of a group), by the billions of
# operations in the name.
SIZES = {
    "x-002": ((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "x-004": ((1, 2, 7, 12), (32, 64, 160, 384), 16),
    "x-006": ((1, 3, 5, 7), (48, 96, 240, 528), 24),
    "x-008": ((1, 3, 7, 5), (64, 128, 288, 672), 16),
    "x-016": ((2, 4, 10, 2), (72, 168, 408, 912), 24),
    "x-032": ((2, 6, 15, 2), (96, 192, 432, 1008), 48),
    "x-040": ((2, 5, 14, 2), (80, 240, 560, 1360), 40),
    "x-064": ((2, 4, 10, 1), (168, 392, 784, 1624), 56),
    "x-080": ((2, 5, 15, 1), (80, 240, 720, 1920), 120),
    "x-120": ((2, 5, 11, 1), (224, 448, 896, 2240), 112),
    "x-160": ((2, 6, 13, 1), (256, 512, 896, 2048), 128),
    "x-320": ((2, 7, 13, 1), (336, 672, 1344, 2520), 168),
    "y-002": ((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "y-004": ((1, 3, 6, 6), (48, 104, 208, 440), 8),
    "y-006": ((1, 3, 7, 4), (48, 112, 256, 608), 16),
    "y-008": ((1, 3, 8, 2), (64, 128, 320, 768), 16),
    "y-016": ((2, 6, 17, 2), (48, 120, 336, 888), 24),
    "y-032": ((2, 5, 13, 1), (72, 216, 576, 1512), 24),
    "y-040": ((2, 6, 12, 2), (128, 192, 512, 1088), 64),
    "y-064": ((2, 7, 14, 2), (144, 288, 576, 1296), 72),
    "y-080": ((2, 4, 10, 1), (168, 448, 896, 2016), 56),
    "y-120": ((2, 5, 11, 1), (224, 448, 896, 2240), 112),
    "y-160": ((2, 4, 11, 1), (224, 448, 1232, 3024), 112),
    "y-320": ((2, 5, 12, 1), (232, 696, 1392, 3712), 232),
}
VARIANTS = {
    "tiny": Config(embedding_size=6, hidden_sizes=(8, 12), depths=(1, 2), groups_width=4),
    **{
        name: Config(depths=depths, hidden_sizes=widths, groups_width=group, layer_type=name[0])
        for name, (depths, widths, group) in SIZES.items()
    },
}


class Block(nn.Module):
    """Three convolutions, the second in groups, and the residual around them."""

    config: Config
    place: Place
    train: bool
    norm: Callable[..., nn.Module] = BatchNorm

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        config, train = self.config, self.train
        features, stride, act = self.place.features, self.place.stride, config.hidden_act
        conv_norm = partial(ConvNorm, train=train, norm=self.norm)
        y = conv_norm(features, 1, 1, act, name="conv_0")(x)
        groups = config.groups(features)
        y = conv_norm(features, 3, stride, act, groups=groups, name="conv_1")(y)
        if config.layer_type == "y":
            y = squeeze_excite(y, max(1, round(x.shape[-1] / 4)), "relu", KAIMING)
        y = conv_norm(features, 1, name="conv_2")(y)
        if self.place.shortcut:
            x = conv_norm(features, 1, stride, name="shortcut")(x)
        return activation(act)(x + y)


class Model(resnet.Model):
    """RegNet with one head; see `fmjax.models.resnet.Model`."""

    heads = HEADS
    block = Block

    def stem(self, pixel_values: Array, train: bool) -> Array:
        config = self.config
        stem = ConvNorm(
            config.embedding_size, 3, 2, config.hidden_act, train, norm=self.norm, name="embed"
        )
        return stem(pixel_values)


PREFIX = "regnet."
FIXED = {}
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head.

    Torchvision's and timm's names of the same tensors are read too.
    """
    body = "" if head == "model" else PREFIX

    def layer(param: str, here: str, vision: str, timm: str) -> list[Rule]:
        names = f"{here}.convolution", f"{here}.normalization"
        also = [(f"{vision}.0", f"{vision}.1"), (f"{timm}.conv", f"{timm}.bn")]
        return conv_norm_rules(param, *names, also=also)

    table = layer("embed", f"{body}embedder.embedder", "stem", "stem")
    for stage, blocks in enumerate(places(config)):
        for block, place in enumerate(blocks):
            param = f"stages_{stage}/blocks_{block}"
            here = f"{body}encoder.stages.{stage}.layers.{block}"
            vision = f"trunk_output.block{stage + 1}.block{stage + 1}-{block}"
            timm = f"s{stage + 1}.b{block + 1}"
            numbers = (0, 1, 3) if config.layer_type == "y" else (0, 1, 2)
            for i, (number, letter) in enumerate(zip(numbers, "abc", strict=True)):
                names = f"{vision}.f.{letter}", f"{timm}.conv{i + 1}"
                table += layer(f"{param}/conv_{i}", f"{here}.layer.{number}", *names)
            if config.layer_type == "y":
                for name, number, other in (("squeeze", 0, "fc1"), ("excite", 2, "fc2")):
                    excite = conv_rules(
                        f"{param}/{name}", f"{here}.layer.2.attention.{number}", bias=True
                    )
                    table += also_named(excite, f"{vision}.f.se.{other}", f"{timm}.se.{other}")
            if place.shortcut:
                names = f"{vision}.proj", f"{timm}.downsample"
                table += layer(f"{param}/shortcut", f"{here}.shortcut", *names)
    if head == "image_classification":
        table += also_named(dense_rules("head", "classifier.1"), "fc", "head.fc")
    return table
