"""ConvNeXt (Liu et al. 2022, arXiv:2201.03545): blocks of a depthwise 7 x 7 convolution and a
feed-forward, layer-normalised, as a transformer's. HF "convnext".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.checks import refuse
from fmjax.nn.conv import Conv, average
from fmjax.nn.convnet import ConvNet, stage_problems
from fmjax.nn.dropout import DropPath
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.vision import PatchEmbed, grid_of, image_size_problems, pair
from fmjax.weights import Rule, also_named, conv_rules, dense_rules, norm_rules

EPSILON = 1e-6  # of every norm but the last one, whose epsilon is the config's


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    num_channels: int = 3
    patch_size: int | tuple[int, ...] = 4
    num_stages: int = 4
    hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    layer_scale_init_value: float = 1e-6
    drop_path_rate: float = 0.0
    image_size: int | tuple[int, ...] = 224
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        check_config(self)


def check_config(config: Any) -> None:
    """Refuses a Config that no ConvNeXt can have.

    Raises:
        ValueError: what is wrong with it.
    """
    problems = stage_problems(config) + image_size_problems(config)
    if config.num_stages != len(config.depths):
        problems.append(
            f"num_stages={config.num_stages} must be how many depths={config.depths} are"
        )
    refuse(config, problems)


MODEL_TYPE = "convnext"
HEADS = {"model": "ConvNextModel", "image_classification": "ConvNextForImageClassification"}
# Liu et al. 2022, section 3.
SIZES = {
    "tiny-224": (96, (3, 3, 9, 3)),
    "small-224": (96, (3, 3, 27, 3)),
    "base-224": (128, (3, 3, 27, 3)),
    "large-224": (192, (3, 3, 27, 3)),
    "xlarge-224": (256, (3, 3, 27, 3)),
}
VARIANTS = {
    "tiny": Config(
        image_size=16, patch_size=2, num_stages=2, hidden_sizes=(8, 12), depths=(2, 1),
        layer_scale_init_value=0.5,
    ),
    **{
        name: Config(hidden_sizes=tuple(width * 2**i for i in range(4)), depths=depths)
        for name, (width, depths) in SIZES.items()
    },
}  # fmt: skip


class Block(nn.Module):
    """Pixels mixed feature by feature, then features pixel by pixel, and the residual around."""

    config: Any
    drop: float
    train: bool

    @property
    def kernel_init(self) -> Callable[..., Array]:
        """Initializer of kernels."""
        return nn.initializers.normal(self.config.initializer_range)

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, C] -> [B, X, Y, C]
        width = x.shape[-1]
        conv = Conv(
            width, 7, kernel_init=self.kernel_init, use_bias=True, groups=width, name="conv"
        )
        y = self.feed_forward(LayerNorm(EPSILON, name="norm")(conv(x)))
        return x + DropPath(self.drop)(y, self.train)

    def feed_forward(self, x: Array) -> Array:
        """What the branch ends with: a module "mlp" and its scale; called in a compact method."""
        config, width = self.config, x.shape[-1]
        y = Mlp(4 * width, config.hidden_act, self.kernel_init, name="mlp")(x)
        if config.layer_scale_init_value > 0:
            init = nn.initializers.constant(config.layer_scale_init_value)
            y = y * parameter(self, "scale", init, (width,)).astype(y.dtype)
        return y


class Stage(nn.Module):
    """Blocks one after another; before them the image is halved, but for the first stage."""

    block: Callable[..., nn.Module]
    config: Any
    number: int
    drops: tuple[float, ...]
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        if self.number:
            x = LayerNorm(EPSILON, name="norm")(x)
            x = merge(self.config, x, self.config.hidden_sizes[self.number], (2, 2), "merge")
        for i, drop in enumerate(self.drops):
            x = self.block(self.config, drop, self.train, name=f"blocks_{i}")(x)
        return x


def drop_rates(config: Any) -> list[tuple[float, ...]]:
    """Of each stage's blocks: stochastic depth grows evenly from none to the config's."""
    rates = iter(np.linspace(0, config.drop_path_rate, sum(config.depths)).tolist())
    return [tuple(islice(rates, depth)) for depth in config.depths]


def merge(config: Any, x: Array, features: int, patch: tuple[int, int], name: str) -> Array:
    """Patches as pixels, by a linear map each: [B, X, Y, C] -> [B, X / P, Y / Q, O].

    Called in a compact method; `name` is the map's.
    """
    init = nn.initializers.normal(config.initializer_range)
    grid = grid_of((x.shape[1], x.shape[2]), patch)
    y = PatchEmbed(features, patch, init, name=name)(x)
    return y.reshape(x.shape[0], *grid, features)


class Model(ConvNet):
    """ConvNeXt with one head; see `fmjax.nn.convnet.ConvNet`.

    Hidden states are the patches' and each stage's.
    """

    heads = HEADS
    block: ClassVar[type[nn.Module]] = Block

    @property
    def least(self) -> tuple[int, int]:
        rows, columns = pair(self.config.patch_size)
        halved = 2 ** (self.config.num_stages - 1)
        return rows * halved, columns * halved

    def features(self, pixel_values: Array, train: bool) -> tuple[Array, Sequence[Array]]:
        config = self.config
        x = merge(config, pixel_values, config.hidden_sizes[0], pair(config.patch_size), "embed")
        x = LayerNorm(EPSILON, name="embed_norm")(x)
        states, block = [x], self.recomputed(self.block)
        for number, drops in enumerate(drop_rates(config)):
            x = Stage(block, config, number, drops, train, name=f"stages_{number}")(x)
            states.append(x)
        return x, states

    def pool(self, x: Array, train: bool) -> Array:
        return LayerNorm(self.config.layer_norm_eps, name="final_norm")(average(x))


def inputs(config: Any, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    return {"pixel_values": jnp.zeros((1, *pair(config.image_size), config.num_channels))}


PREFIX = "convnext."
# What a backbone would give to another model.
FIXED = {"out_features": ..., "out_indices": ..., "stage_names": ...}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head.

    The authors' names and timm's of the same tensors are read too.
    """
    table = body_rules(config, head, PREFIX)
    if config.layer_scale_init_value > 0:
        for param, ours, authors, timm in blocks(config, "" if head == "model" else PREFIX):
            names = f"{authors}.gamma", f"{timm}.gamma"
            scale = f"{ours}.layer_scale_parameter"
            table.append(Rule(f"params/{param}/scale", scale, aliases=names))
    return table


def blocks(config: Any, body: str) -> list[tuple[str, str, str, str]]:
    """Of each block: its path, and its names in Hugging Face's, the authors' and timm's files."""
    return [
        (
            f"stages_{stage}/blocks_{i}",
            f"{body}encoder.stages.{stage}.layers.{i}",
            f"stages.{stage}.{i}",
            f"stages.{stage}.blocks.{i}",
        )
        for stage, depth in enumerate(config.depths)
        for i in range(depth)
    ]


def body_rules(config: Any, head: str, prefix: str) -> list[Rule]:
    """All but what scales a block's features; `prefix` is the family's."""
    body = "" if head == "model" else prefix
    embed = f"{body}embeddings"
    modules = [
        (
            conv_rules("embed", f"{embed}.patch_embeddings", bias=True),
            "downsample_layers.0.0",
            "stem.0",
        ),
        (norm_rules("embed_norm", f"{embed}.layernorm"), "downsample_layers.0.1", "stem.1"),
        (norm_rules("final_norm", f"{body}layernorm"), "norm", "head.norm"),
    ]
    for stage in range(1, config.num_stages):
        here, there = f"stages_{stage}", f"{body}encoder.stages.{stage}.downsampling_layer"
        authors, timm = f"downsample_layers.{stage}", f"stages.{stage}.downsample"
        modules += [
            (norm_rules(f"{here}/norm", f"{there}.0"), f"{authors}.0", f"{timm}.0"),
            (conv_rules(f"{here}/merge", f"{there}.1", bias=True), f"{authors}.1", f"{timm}.1"),
        ]
    for param, ours, authors, timm in blocks(config, body):
        conv, norm, up, down = (
            f"{param}/{name}" for name in ("conv", "norm", "mlp/up", "mlp/down")
        )
        modules += [
            (
                conv_rules(conv, f"{ours}.dwconv", bias=True),
                f"{authors}.dwconv",
                f"{timm}.conv_dw",
            ),
            (norm_rules(norm, f"{ours}.layernorm"), f"{authors}.norm", f"{timm}.norm"),
            (dense_rules(up, f"{ours}.pwconv1"), f"{authors}.pwconv1", f"{timm}.mlp.fc1"),
            (dense_rules(down, f"{ours}.pwconv2"), f"{authors}.pwconv2", f"{timm}.mlp.fc2"),
        ]
    if head == "image_classification":
        modules.append((dense_rules("head", "classifier"), "head", "head.fc"))
    return [rule for module, *names in modules for rule in also_named(module, *names)]


# What keras.applications calls its models, and with it their layers.
KERAS_NAMES = (
    "convnext",
    *(f"convnext_{size}" for size in ("tiny", "small", "base", "large", "xlarge")),
)


def keras_config(config: Config) -> Config:
    """The config of Keras' ConvNeXt: every norm has one epsilon.

    Raises:
        ValueError: Keras has no such model.
    """
    if config.num_stages != 4 or pair(config.patch_size) != (4, 4) or config.hidden_act != "gelu":
        raise ValueError(
            f"num_stages={config.num_stages}, patch_size={config.patch_size}, hidden_act="
            f"{config.hidden_act!r}, but keras.applications' ConvNeXt has 4 stages, patches of 4 "
            "and gelu"
        )
    return replace(config, layer_norm_eps=EPSILON)


def keras_rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the tensors they are in Keras' files."""

    def layer(param: str, name: str, weights: dict[str, str]) -> list[Rule]:
        """Rules of a layer, whose weights are by the parameters' names."""
        return [
            Rule(
                f"params/{param}/{ours}",
                f"{KERAS_NAMES[0]}_{name}/{theirs}",
                aliases=tuple(f"{model}_{name}/{theirs}" for model in KERAS_NAMES[1:]),
            )
            for ours, theirs in weights.items()
        ]

    def part(param: str, name: str, inner: str, kind: str, weights: dict[str, str]) -> list[Rule]:
        """Rules of a layer inside a Sequential, for which each version of Keras has other names."""
        return [
            Rule(
                f"params/{param}/{ours}",
                f"{KERAS_NAMES[0]}_{name}/{KERAS_NAMES[0]}_{name}/{KERAS_NAMES[0]}_{inner}/{theirs}",
                aliases=tuple(
                    alias
                    for model in KERAS_NAMES
                    for alias in (
                        f"{model}_{name}/{model}_{name}/{model}_{inner}/{theirs}",
                        f"{model}_{name}/{model}_{inner}/{theirs}",
                        f"{model}_{name}/layers/{kind}/vars/{number}",
                    )
                ),
            )
            for number, (ours, theirs) in enumerate(weights.items())
        ]

    dense = {"kernel": "kernel", "bias": "bias"}
    norm = {"scale": "gamma", "bias": "beta"}
    table = part("embed", "stem", "stem_conv", "conv2d", dense)
    table += part("embed_norm", "stem", "stem_layernorm", "layer_normalization", norm)
    for stage, depth in enumerate(config.depths):
        here = f"stages_{stage}"
        if stage:
            outer, number = f"downsampling_block_{stage - 1}", stage - 1
            inner = f"downsampling_layernorm_{number}"
            table += part(f"{here}/norm", outer, inner, "layer_normalization", norm)
            inner = f"downsampling_conv_{number}"
            table += part(f"{here}/merge", outer, inner, "conv2d", dense)
        for i in range(depth):
            param, block = f"{here}/blocks_{i}", f"stage_{stage}_block_{i}"
            table += layer(f"{param}/conv", f"{block}_depthwise_conv", dense)
            table += layer(f"{param}/norm", f"{block}_layernorm", norm)
            table += layer(f"{param}/mlp/up", f"{block}_pointwise_conv_1", dense)
            table += layer(f"{param}/mlp/down", f"{block}_pointwise_conv_2", dense)
            if config.layer_scale_init_value > 0:
                table += layer(param, f"{block}_layer_scale", {"scale": "vars/0"})
    table += [
        # Without a classifier this norm has no name.
        replace(rule, aliases=(*rule.aliases, f"layer_normalization_0/{theirs}"))
        for rule, theirs in zip(
            layer("final_norm", "head_layernorm", norm), norm.values(), strict=True
        )
    ]
    if head == "image_classification":
        table += layer("head", "head_dense", dense)
    return table
