"""ResNet (He et al. 2015, arXiv:1512.03385): residual stages of convolutions. HF "resnet".

Also what other families need that have one as their backbone.

The stride of a bottleneck is in its 3 x 3 convolution ("v1.5", as torchvision and Hugging Face have
it), or in the first one as published, with ``downsample_in_bottleneck``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.config import config_to_json, parse_config
from fmjax.models import config_alone
from fmjax.nn.activation import activation
from fmjax.nn.checks import refuse
from fmjax.nn.conv import ConvNorm, max_pool
from fmjax.nn.convnet import ConvNet, stage_problems
from fmjax.nn.norm import BatchNorm
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
        dilation: of its 3 x 3 convolutions.
    """

    features: int
    stride: int
    shortcut: bool
    dilation: int = 1


def places(config: Any, dilated: bool = False) -> Iterator[tuple[Place, ...]]:
    """The blocks of each stage.

    Args:
        config: the sizes.
        dilated: whether the last stage keeps the image's size: what would be its stride is the
            dilation of the blocks behind its first.
    """
    width = config.embedding_size
    for stage, (features, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        stride = 2 if stage or config.downsample_in_first_stage else 1
        wide = dilated and stage == len(config.depths) - 1
        yield tuple(
            Place(
                features,
                1 if block or wide else stride,
                not block and (stride != 1 or width != features),
                stride if block and wide else 1,
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
    norm: Callable[..., nn.Module] = BatchNorm

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        config, place = self.config, self.place
        layers = convolutions(config, place)
        options = {"train": self.train, "norm": self.norm}
        y = x
        for number, (features, size, stride) in enumerate(layers):
            act = "relu" if number < len(layers) - 1 else None  # whatever hidden_act, as in PyTorch
            dilation = place.dilation if size > 1 else 1
            y = ConvNorm(
                features, size, stride, act, dilation=dilation, name=f"conv_{number}", **options
            )(y)
        if place.shortcut:
            x = ConvNorm(place.features, 1, place.stride, name="shortcut", **options)(x)
        return activation(config.hidden_act)(x + y)


class Stage(nn.Module):
    """Blocks one after another, of which the first may make the image smaller."""

    block: Callable[..., nn.Module]
    config: Any
    places: tuple[Place, ...]
    train: bool
    norm: Callable[..., nn.Module] = BatchNorm

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        for number, place in enumerate(self.places):
            x = self.block(self.config, place, self.train, self.norm, name=f"blocks_{number}")(x)
        return x


class Model(ConvNet):
    """ResNet with one head; see `fmjax.nn.convnet.ConvNet`.

    Hidden states are the stem's output and each stage's.

    Args:
        norm: makes the normalisations; see `ConvNorm`. Backbones have others.
        dilated: see `places`.
    """

    norm: Callable[..., nn.Module] = BatchNorm
    dilated: bool = False

    heads = HEADS
    block: ClassVar[type[nn.Module]] = Block

    @property
    def kernel_init(self) -> Callable[..., Array]:
        # PyTorch's default of a Linear: uniform within 1 / sqrt(I).
        return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

    def stem(self, pixel_values: Array, train: bool) -> Array:
        """[B, X, Y, C] -> [B, X', Y', O]; called in a compact method, a module named "embed"."""
        config = self.config
        stem = ConvNorm(
            config.embedding_size, 7, 2, config.hidden_act, train, norm=self.norm, name="embed"
        )
        return max_pool(stem(pixel_values), 3, 2, 1)

    def features(self, pixel_values: Array, train: bool) -> tuple[Array, Sequence[Array]]:
        x = self.stem(pixel_values, train)
        states, block = [x], self.recomputed(self.block)
        for number, blocks in enumerate(places(self.config, self.dilated)):
            stage = Stage(block, self.config, blocks, train, self.norm, name=f"stages_{number}")
            x = stage(x)
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


TIMM = {f"resnet{depth}": depth for depth in ("18", "26", "34", "50", "101", "152")}
"""timm's names of backbones, as keys of `VARIANTS`."""
FEATURES_ONLY = {
    "model_type": "timm_backbone",
    "features_only": True,
    "out_indices": [1, 2, 3, 4],
}


@dataclasses.dataclass(frozen=True)
class TimmBackbone:
    """A ResNet under timm's names, as most published checkpoints have it.

    Args:
        backbone: a key of `TIMM`.
        num_channels: of the images.
        output_stride: 16 for a last stage that is dilated instead of strided; None for 32.
    """

    backbone: str = "resnet50"
    num_channels: int = 3
    output_stride: int | None = None


def read_backbone(data: Any) -> TimmBackbone | Config | None:
    """A config of a backbone, by its ``model_type``.

    Raises:
        ValueError: it is none of ours, or its features are not those of the last stage.
    """
    if data is None:
        return None
    kind = data.get("model_type") if isinstance(data, Mapping) else None
    if kind == "timm_backbone":
        fixed = dict.fromkeys(
            ("use_pretrained_backbone", "freeze_batch_norm_2d", "problem_type"), ...
        )
        fixed |= {"out_features": None, "id2label": ..., **FEATURES_ONLY}
        return parse_config(TimmBackbone, data, fixed)
    if kind != "resnet":
        raise ValueError('must be an object with model_type "resnet" or "timm_backbone"')
    config = parse_config(Config, data, FIXED)
    last = len(config.depths)
    named = data.get("out_features") or [f"stage{last}"]
    numbered = data.get("out_indices") or [last]
    if named[-1] != f"stage{last}" or numbered[-1] not in (last, -1):
        raise ValueError(f"must have the features of the last stage, stage{last}, as its last ones")
    return config


def write_backbone(config: TimmBackbone | Config) -> dict[str, Any]:
    """The inverse of `read_backbone`."""
    if isinstance(config, TimmBackbone):
        return {**dataclasses.asdict(config), **FEATURES_ONLY, "use_pretrained_backbone": False}
    stages = [f"stage{stage + 1}" for stage in range(len(config.depths))]
    return config_to_json(config, {"model_type": "resnet", "out_features": stages})


def backbone_problems(config: Any, dilated: bool) -> list[str]:
    """What is wrong with a config's ``backbone_config``, beside a ``dilation`` of its own."""
    if isinstance(config, Config):
        return ["dilation=True needs a timm backbone"] if dilated else []
    if not isinstance(config, TimmBackbone):
        return [f"backbone_config={config!r} must be a resnet.Config or a resnet.TimmBackbone"]
    problems = []
    if config.backbone not in TIMM:
        problems.append(f"backbone={config.backbone!r} must be one of {list(TIMM)}")
    if config.output_stride not in ((16,) if dilated else (None, 32)):
        problems.append(
            f"output_stride={config.output_stride} must be 16 with dilation=True and else 32"
        )
    return problems


def sizes_of(config: TimmBackbone | Config) -> Config:
    """A backbone's sizes."""
    if isinstance(config, Config):
        return config
    return dataclasses.replace(VARIANTS[TIMM[config.backbone]], num_channels=config.num_channels)


def backbone_rules(config: TimmBackbone | Config) -> list[Rule]:
    """The rules of a backbone with `fmjax.nn.norm.FrozenBatchNorm`.

    A file of either library's names is read; the one that the config is of is written.
    """
    table = []
    for rule in rules(sizes_of(config), "model"):
        (param,), names = rule.params, (*rule.tensors, *rule.aliases)
        if param.endswith("/count"):
            continue
        if param.endswith(("/scale", "/bias")):
            param = param.replace("params/", "batch_stats/", 1)
        first, *rest = reversed(names) if isinstance(config, TimmBackbone) else names
        table.append(dataclasses.replace(rule, param=param, tensor=first, aliases=tuple(rest)))
    return table
