"""SegFormer (Xie et al. 2021, arXiv:2105.15203): a transformer in stages, each over a coarser grid
of overlapping patches, and a decoder of linear layers. HF "segformer".

Nothing is tied to a size of image: positions are told by the zeros around the feed-forward's
convolutions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.activation import activation
from fmjax.nn.attention import Attention
from fmjax.nn.checks import check_head, refuse
from fmjax.nn.conv import Conv, average
from fmjax.nn.dropout import Dropout, DropPath
from fmjax.nn.linear import Dense
from fmjax.nn.norm import BatchNorm, LayerNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.product import matmul
from fmjax.nn.stack import LayerOutput, run_stack
from fmjax.nn.vision import PatchEmbed, check_pixels, resize
from fmjax.types import Output, Remat
from fmjax.weights import Rule, batch_norm_rules, conv_rules, dense_rules, norm_rules

EPSILON = 1e-5  # PyTorch's default of a LayerNorm: the config's layer_norm_eps is not read there
STAGES = ("depths", "sr_ratios", "hidden_sizes", "patch_sizes", "strides", "num_attention_heads")


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    num_channels: int = 3
    num_encoder_blocks: int = 4
    depths: tuple[int, ...] = (2, 2, 2, 2)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    hidden_sizes: tuple[int, ...] = (32, 64, 160, 256)
    patch_sizes: tuple[int, ...] = (7, 3, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2, 2)
    num_attention_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    drop_path_rate: float = 0.1
    decoder_hidden_size: int = 256
    semantic_loss_ignore_index: int = 255  # read by the task, as is problem_type
    reshape_last_stage: bool = True
    problem_type: str | None = None
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = []
        for name in (*STAGES, "mlp_ratios"):
            values = getattr(self, name)
            if len(values) != self.num_encoder_blocks or not values:
                problems.append(
                    f"{name}={values} must have one number for each of num_encoder_blocks="
                    f"{self.num_encoder_blocks} stages"
                )
            elif min(values) <= 0:
                problems.append(f"{name}={values} must be positive")
        if not problems:
            problems += [
                f"hidden_sizes={width} is not a multiple of num_attention_heads={heads}"
                for width, heads in zip(self.hidden_sizes, self.num_attention_heads, strict=True)
                if width % heads
            ]
        refuse(self, problems)


MODEL_TYPE = "segformer"
HEADS = {
    "model": "SegformerModel",
    "image_classification": "SegformerForImageClassification",
    "semantic_segmentation": "SegformerForSemanticSegmentation",
}


def _published(decoder: int, width: int, *depths: int) -> Config:
    widths = (32, 64, 160, 256) if width == 32 else (64, 128, 320, 512)
    return Config(hidden_sizes=widths, depths=depths, decoder_hidden_size=decoder)


VARIANTS = {
    "tiny": Config(
        num_encoder_blocks=2, depths=(2, 1), sr_ratios=(2, 1), hidden_sizes=(8, 16),
        patch_sizes=(7, 3), strides=(4, 2), num_attention_heads=(1, 2), mlp_ratios=(2, 2),
        decoder_hidden_size=8,
    ),
    # Xie et al. 2021, table 6 (MiT-B0 to B5, which the paper trains on ImageNet, and the widths of
    # the decoders put on them). Its feed-forward ratios of 8 are 4 in the published weights.
    "b0": _published(256, 32, 2, 2, 2, 2),
    "b1": _published(256, 64, 2, 2, 2, 2),
    "b2": _published(768, 64, 3, 4, 6, 3),
    "b3": _published(768, 64, 3, 4, 18, 3),
    "b4": _published(768, 64, 3, 8, 27, 3),
    "b5": _published(768, 64, 3, 6, 40, 3),
}  # fmt: skip


class Place(NamedTuple):
    """What is a stage's own.

    Args:
        width: D.
        depth: blocks.
        heads: H.
        reduction: by which rows and columns of keys and values are fewer than those of queries.
        patch, stride: of the convolution that the stage begins with.
        inner: F.
    """

    width: int
    depth: int
    heads: int
    reduction: int
    patch: int
    stride: int
    inner: int

    def length(self, pixels: int) -> int:
        """Rows of the stage's grid by those of what it is given, or columns."""
        return max(0, (pixels + 2 * (self.patch // 2) - self.patch) // self.stride + 1)


def places(config: Config) -> tuple[Place, ...]:
    """The stages, first to last."""
    return tuple(
        Place(
            config.hidden_sizes[i],
            config.depths[i],
            config.num_attention_heads[i],
            config.sr_ratios[i],
            config.patch_sizes[i],
            config.strides[i],
            int(config.hidden_sizes[i] * config.mlp_ratios[i]),
        )
        for i in range(config.num_encoder_blocks)
    )


def kernel_init(config: Config) -> Callable[..., Array]:
    """Initializer of kernels."""
    return nn.initializers.normal(config.initializer_range)


class Block(nn.Module):
    """Norm, attention to a coarser grid, residual; norm, feed-forward, residual."""

    config: Config
    place: Place
    train: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, cache: None, index: Array | int, shared: Array
    ) -> tuple[Array, LayerOutput]:  # [B, X, Y, D] -> [B, X, Y, D]
        """One block; `shared` [L] are the stage's rates of stochastic depth."""
        rate = shared[index] if self.config.drop_path_rate else 0.0
        x = LayerNorm(EPSILON, name="norm_1")(hidden)
        update, probabilities = self.attend(x)
        update = Dropout(self.config.hidden_dropout_prob)(update, self.train)
        hidden = hidden + DropPath(rate)(update, self.train)
        x = LayerNorm(EPSILON, name="norm_2")(hidden)
        update = MixMlp(self.config, self.place.inner, self.train, name="mlp")(x)
        hidden = hidden + DropPath(rate)(update, self.train)
        return hidden, LayerOutput(attentions=probabilities)

    def attend(self, x: Array) -> tuple[Array, Array | None]:
        """[B, X, Y, D] -> ([B, X, Y, D], [B, H, T, S] or None)."""
        config, place, init = self.config, self.place, kernel_init(self.config)
        others = None
        if place.reduction > 1:  # a convolution whose stride is its size
            patch = (place.reduction, place.reduction)
            others = PatchEmbed(place.width, patch, init, name="reduce")(x)  # [B, S, D]
            others = LayerNorm(EPSILON, name="reduce_norm")(others)
        update, probabilities, _ = Attention(
            place.heads,
            dropout_rate=config.attention_probs_dropout_prob,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            name="attn",
        )(x.reshape(x.shape[0], -1, place.width), mask=None, others=others)
        return update.reshape(x.shape), probabilities


class MixMlp(nn.Module):
    """A feed-forward with a convolution of each feature before its activation (equation 3).

    Args:
        config: the family's.
        width: F, the inner width.
        train: whether to drop.
    """

    config: Config
    width: int
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, D] -> [B, X, Y, D]
        config, init = self.config, kernel_init(self.config)
        dropout = Dropout(config.hidden_dropout_prob)
        y = Dense(self.width, kernel_init=init, name="up")(x)  # [B, X, Y, F]
        conv = Conv(self.width, 3, kernel_init=init, use_bias=True, groups=self.width, name="conv")
        y = conv(y)
        y = dropout(activation(config.hidden_act)(y), self.train)
        return dropout(Dense(x.shape[-1], kernel_init=init, name="down")(y), self.train)


class Stage(nn.Module):
    """A convolution onto a coarser grid, blocks over it, and a norm."""

    config: Config
    place: Place
    first: int
    train: bool
    output_attentions: bool
    scan: bool
    remat: Remat

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, tuple[LayerOutput, ...]]:
        """[B, X, Y, I] -> [B, X', Y', D]; `first` is the number of the first block."""
        config, place = self.config, self.place
        x = Conv(
            place.width,
            place.patch,
            place.stride,
            kernel_init(config),
            use_bias=True,
            name="embed",
        )(x)
        x = LayerNorm(EPSILON, name="embed_norm")(x)
        share = config.drop_path_rate / max(sum(config.depths) - 1, 1)
        x, layers, _ = run_stack(
            Block,
            {
                "config": config,
                "place": place,
                "train": self.train,
                "output_attentions": self.output_attentions,
            },
            x,
            share * jnp.arange(self.first, self.first + place.depth, dtype=jnp.float32),
            num_layers=place.depth,
            scan=self.scan,
            remat=self.remat,
        )
        return LayerNorm(EPSILON, name="final_norm")(x), layers


class Fuse(nn.Module):
    """A linear map of all stages' features side by side, at the size of the first.

    PyTorch enlarges each stage's features, puts them side by side and maps them. Enlarging is
    linear too: mapped first, the coarse grids cost next to nothing.

    Args:
        features: O.
        kernel_init: initializer of the kernel [1, 1, I, O]; the last stage's features come first.
    """

    features: int
    kernel_init: Callable[..., Array]

    @nn.compact
    def __call__(self, maps: Sequence[Array]) -> Array:  # [B, X_i, Y_i, I_i] -> [B, X_0, Y_0, O]
        widths = [x.shape[-1] for x in reversed(maps)]
        kernel = parameter(self, "kernel", self.kernel_init, (1, 1, sum(widths), self.features))
        parts = jnp.split(kernel[0, 0], np.cumsum(widths)[:-1])
        size = (maps[0].shape[1], maps[0].shape[2])
        total = jnp.zeros((), jnp.float32)
        for x, part in zip(reversed(maps), parts, strict=True):
            total = total + resize(matmul(x, part), size)
        return total.astype(maps[0].dtype)


class DecodeHead(nn.Module):
    """Classes of pixels from the features of all stages, by linear layers alone (section 3.2)."""

    config: Config
    train: bool

    @nn.compact
    def __call__(self, maps: Sequence[Array]) -> Array:  # [B, X_i, Y_i, D_i] -> [B, X_0, Y_0, C]
        config, init = self.config, kernel_init(self.config)
        width = config.decoder_hidden_size
        maps = [Dense(width, kernel_init=init, name=f"project_{i}")(x) for i, x in enumerate(maps)]
        x = Fuse(width, init, name="fuse")(maps)
        x = jax.nn.relu(BatchNorm(self.train, name="norm")(x))
        x = Dropout(config.classifier_dropout_prob)(x, self.train)
        labels = len(config.id2label)
        return Conv(labels, 1, kernel_init=init, use_bias=True, name="classifier")(x)


class Model(nn.Module):
    """SegFormer with one head.

    Args:
        config: the sizes.
        head: a key of `HEADS`.
        scan: weights stacked over a stage's blocks, and one compiled block a stage.
        remat: what the backward pass recomputes, as `fmjax.types.Remat` says.
    """

    config: Config
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        pixel_values: Array,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """Runs the model.

        Args:
            pixel_values: [B, X, Y, C], normalised.
            train: whether dropout and stochastic depth are on, which need
                ``rngs={"dropout": key}``, and the decoder's batch normalisation uses the batch's
                own statistics and moves the running ones, which needs ``mutable=["batch_stats"]``.
            output_hidden_states: whether ``hidden_states`` is returned: each stage's output.
            output_attentions: whether ``attentions`` is returned: each block's [B, H, T, S].

        Returns:
            ``logits`` [B, C] of images, or [B, X', Y', C] of pixels, at the size of the first
            stage's grid; ``last_hidden_state`` [B, X', Y', D], or [B, T, D] where the config says
            ``reshape_last_stage=False``.

        Raises:
            ValueError: an unknown head, or images of the wrong shape.
        """
        config = self.config
        check_head(self, HEADS)
        check_images(config, pixel_values)
        x, first, maps, layers = pixel_values, 0, [], ()
        for i, place in enumerate(places(config)):
            x, own = Stage(
                config,
                place,
                first,
                train,
                output_attentions,
                self.scan,
                self.remat,
                name=f"stages_{i}",
            )(x)
            first += place.depth
            maps.append(x)
            layers += own
        last = x if config.reshape_last_stage else x.reshape(x.shape[0], -1, x.shape[-1])
        out = Output(hidden_states=(*maps[:-1], last) if output_hidden_states else None)
        if output_attentions:
            out = dataclasses.replace(out, attentions=tuple(layer.attentions for layer in layers))
        if self.head == "model":
            return dataclasses.replace(out, last_hidden_state=last)
        if self.head == "semantic_segmentation":
            logits = DecodeHead(config, train, name="head")(maps)
        else:
            pooled = average(x)  # [B, D]
            dense = Dense(len(config.id2label), kernel_init=kernel_init(config), name="head")
            logits = dense(pooled)
        return dataclasses.replace(out, logits=logits.astype(jnp.float32))


def check_images(config: Config, pixel_values: Array) -> None:
    """Refuses anything but images [B, X, Y, C] that reach the last stage.

    Raises:
        ValueError: another shape, or images too small.
    """
    check_pixels(pixel_values, config.num_channels)
    size = (pixel_values.shape[1], pixel_values.shape[2])
    grid, problems = size, []
    for i, place in enumerate(places(config)):
        grid = (place.length(grid[0]), place.length(grid[1]))
        if min(grid) < place.reduction:
            problems.append(f"the grid {grid} of stage {i} is smaller than {place.reduction}")
    if problems:
        raise ValueError(
            f"images of {size} are too small: {'; '.join(problems)}, by which sr_ratios="
            f"{config.sr_ratios} reduces keys; use larger ones"
        )


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    side = 1
    for place in reversed(places(config)):
        side = place.stride * max(side, place.reduction)
    return {"pixel_values": jnp.zeros((1, side, side, config.num_channels))}


PREFIX = "segformer."
# Hugging Face's files have them and nothing reads them.
FIXED = {"layer_norm_eps": ..., "image_size": ..., "downsampling_rates": ...}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = f"{'' if head == 'model' else PREFIX}encoder"
    table = []
    for i, place in enumerate(places(config)):
        stage, layer = f"stages_{i}", f"stages_{i}/layers_{{i}}"
        embed, block = f"{body}.patch_embeddings.{i}", f"{body}.block.{i}.{{i}}"
        table += conv_rules(f"{stage}/embed", f"{embed}.proj", bias=True)
        table += norm_rules(f"{stage}/embed_norm", f"{embed}.layer_norm")
        table += norm_rules(f"{stage}/final_norm", f"{body}.layer_norm.{i}")
        for number in (1, 2):
            table += norm_rules(f"{layer}/norm_{number}", f"{block}.layer_norm_{number}")
        for name in ("query", "key", "value"):
            table += dense_rules(f"{layer}/attn/{name}", f"{block}.attention.self.{name}")
        table += dense_rules(f"{layer}/attn/out", f"{block}.attention.output.dense")
        if place.reduction > 1:
            table += conv_rules(f"{layer}/reduce", f"{block}.attention.self.sr", bias=True)
            table += norm_rules(f"{layer}/reduce_norm", f"{block}.attention.self.layer_norm")
        table += dense_rules(f"{layer}/mlp/up", f"{block}.mlp.dense1")
        table += conv_rules(f"{layer}/mlp/conv", f"{block}.mlp.dwconv.dwconv", bias=True)
        table += dense_rules(f"{layer}/mlp/down", f"{block}.mlp.dense2")
    match head:
        case "image_classification":
            table += dense_rules("head", "classifier")
        case "semantic_segmentation":
            for i in range(config.num_encoder_blocks):
                table += dense_rules(f"head/project_{i}", f"decode_head.linear_c.{i}.proj")
            table += conv_rules("head/fuse", "decode_head.linear_fuse")
            table += batch_norm_rules("head/norm", "decode_head.batch_norm")
            table += conv_rules("head/classifier", "decode_head.classifier", bias=True)
    return table
