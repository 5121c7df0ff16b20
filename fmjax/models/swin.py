"""Swin (Liu et al. 2021, arXiv:2103.14030): attention within windows, which every second block
shifts, over patches that are merged from stage to stage. HF "swin".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.models.vit import draw_pixels, inputs, layer_rules
from fmjax.nn.attention import Attention
from fmjax.nn.checks import check_head, refuse
from fmjax.nn.dropout import Dropout, DropPath, layer_rate
from fmjax.nn.embed import Embed
from fmjax.nn.linear import Dense
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.stack import LayerOutput, run_stack
from fmjax.nn.vision import (
    Grid,
    PatchEmbed,
    check_mask,
    check_pixels,
    grid_of,
    grid_offsets,
    image_size_problems,
    pair,
    patchify,
    resize_grid,
    unpatchify,
)
from fmjax.types import Output, Remat
from fmjax.weights import Rule, conv_rules, dense_rules, norm_rules, renamed

__all__ = ["inputs"]

INNER_EPSILON = 1e-5  # of the norms that layer_norm_eps says nothing about, PyTorch's default


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    image_size: int | tuple[int, ...] = 224
    patch_size: int | tuple[int, ...] = 4
    num_channels: int = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    hidden_act: str = "gelu"
    use_absolute_embeddings: bool = False
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    encoder_stride: int = 32
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = image_size_problems(self)
        if not self.depths or len(self.depths) != len(self.num_heads):
            problems.append(
                f"depths={self.depths} and num_heads={self.num_heads} must have one number a stage"
            )
        elif min(self.depths) < 1:
            problems.append(f"depths={self.depths} must be positive")
        for stage, heads in enumerate(self.num_heads):
            if heads < 1 or self.width(stage) % heads:
                problems.append(
                    f"num_heads={self.num_heads}: {heads} does not divide the {self.width(stage)} "
                    f"features of stage {stage}"
                )
        if self.window_size < 1:
            problems.append(f"window_size={self.window_size} must be positive")
        refuse(self, problems)

    def width(self, stage: int) -> int:
        """D of a stage's blocks."""
        return self.embed_dim * 2**stage

    @property
    def hidden_size(self) -> int:
        """D of the last stage."""
        return self.width(len(self.depths) - 1)


MODEL_TYPE = "swin"
HEADS = {
    "model": "SwinModel",
    "masked_image_modeling": "SwinForMaskedImageModeling",
    "image_classification": "SwinForImageClassification",
}


def _published(width: int, heads: int, depth: int, window: int = 7) -> Config:
    return Config(
        image_size=32 * window,
        embed_dim=width,
        depths=(2, 2, depth, 2),
        num_heads=(heads, 2 * heads, 4 * heads, 8 * heads),
        window_size=window,
    )


VARIANTS = {
    "tiny": Config(
        image_size=16, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=3,
        mlp_ratio=2.0, use_absolute_embeddings=True, encoder_stride=4,
    ),
    # Liu et al. 2021, section 3.3, each head of 32 features; windows of 12 are for images of 384.
    "t4-w7": _published(96, 3, 6),
    "s4-w7": _published(96, 3, 18),
    "b4-w7": _published(128, 4, 18),
    "b4-w12": _published(128, 4, 18, 12),
    "l4-w7": _published(192, 6, 18),
    "l4-w12": _published(192, 6, 18, 12),
}  # fmt: skip


def windows_of(grid: tuple[int, int], window: int) -> tuple[int, bool]:
    """(side of the windows, whether every second block shifts them) for a grid of patches.

    A grid that no window fits into more than once has one of its shorter side, which never moves.
    """
    side = min(*grid, window)
    return side, side < min(grid)


def covering(size: tuple[int, int], part: tuple[int, int]) -> tuple[int, int]:
    """How many parts cover a size, (rows, columns), the last ones perhaps not filled."""
    return -(-size[0] // part[0]), -(-size[1] // part[1])


def filled(x: Array, part: tuple[int, int]) -> Array:
    """Zeros below and to the right, up to whole parts: [B, X, Y, C] -> [B, X', Y', C]."""
    rows, columns = -x.shape[1] % part[0], -x.shape[2] % part[1]
    return jnp.pad(x, ((0, 0), (0, rows), (0, columns), (0, 0)))


class Block(nn.Module):
    """Norm, attention within windows, residual; norm, feed-forward, residual.

    Args:
        config: the model's.
        stage: whose block it is.
        train: whether dropout is on.
        output_attentions: whether the probabilities are returned.
    """

    config: Config
    stage: int
    train: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, cache: None, index: Array | int, shared: Grid
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config, grid = self.config, shared.size
        init = nn.initializers.normal(config.initializer_range)
        batch, length, width = hidden.shape
        side, shifts = windows_of(grid, config.window_size)
        window = (side, side)
        shift = index % 2 * (config.window_size // 2) if shifts else 0
        x = LayerNorm(config.layer_norm_eps, name="norm_1")(hidden)
        x = filled(x.reshape(batch, *grid, width), window)
        size = (x.shape[1], x.shape[2])
        x = patchify(self.roll(x, -shift), window)  # [B, windows, S * S * D]
        count = x.shape[1]
        update, probabilities, _ = Attention(
            config.num_heads[self.stage],
            dropout_rate=config.attention_probs_dropout_prob,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            use_bias=config.qkv_bias,
            out_bias=True,
            name="attn",
        )(
            x.reshape(batch * count, side * side, width),
            mask=self.neighbours(size, side, shift, batch),
            bias=self.bias(side),
        )
        update = Dropout(config.hidden_dropout_prob)(update, self.train)
        update = unpatchify(update.reshape(batch, count, -1), covering(grid, window), window)
        update = self.roll(update, shift)[:, : grid[0], : grid[1]]
        # Only this branch is ever left out; the paper's code leaves out the other one too.
        rate = layer_rate(
            config.drop_path_rate, sum(config.depths[: self.stage]) + index, sum(config.depths)
        )
        hidden = hidden + DropPath(rate)(update.reshape(batch, length, width), self.train)
        x = LayerNorm(config.layer_norm_eps, name="norm_2")(hidden)
        x = Mlp(int(config.mlp_ratio * width), config.hidden_act, init, name="mlp")(x)
        hidden = hidden + Dropout(config.hidden_dropout_prob)(x, self.train)
        return hidden, LayerOutput(attentions=probabilities)

    def roll(self, x: Array, shift: Array | int) -> Array:
        """Rows and columns moved round, [B, X, Y, D]."""
        if isinstance(shift, int) and shift == 0:
            return x
        return jnp.roll(jnp.roll(x, shift, 1), shift, 2)

    def bias(self, side: int) -> Array:
        """A number a head for each offset within a window: [1, H, T, T].

        Smaller windows than the config's have the smaller offsets, which PyTorch does not run.
        """
        window, heads = self.config.window_size, self.config.num_heads[self.stage]
        table = Embed((2 * window - 1) ** 2, heads, nn.initializers.zeros, name="relative_bias")
        offsets = jnp.asarray(grid_offsets((side, side), (window, window)))
        return table(offsets).transpose(2, 0, 1)[None]

    def neighbours(
        self, size: tuple[int, int], side: int, shift: Array | int, batch: int
    ) -> Array | None:
        """Which patches of a window lay side by side before the shift: bool [B', 1, T, T].

        The last window of a row has what was moved out on its other end: the last `shift`.
        """
        if isinstance(shift, int) and shift == 0:
            return None
        rows, columns = ((jnp.arange(n) >= n - shift).astype(jnp.int32) for n in size)
        region = 2 * rows[:, None] + columns[None, :]  # [X, Y]
        region = patchify(region[None, :, :, None], (side, side))[0]  # [windows, T]
        keep = region[:, None, :, None] == region[:, None, None, :]
        return jnp.tile(keep, (batch, 1, 1, 1))


class Stage(nn.Module):
    """Blocks over one grid of patches, which are then merged, four to one.

    Args:
        config: the model's.
        stage: its number; the last one merges nothing.
        scan, remat: as the model's.
        train, output_attentions: of the blocks.
    """

    config: Config
    stage: int
    scan: bool
    remat: Remat
    train: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, grid: tuple[int, int]
    ) -> tuple[Array, Array | None]:  # [B, T, D] -> [B, T', D'], the last block's probabilities
        config = self.config
        hidden, layers, _ = run_stack(
            Block,
            {
                "config": config,
                "stage": self.stage,
                "train": self.train,
                "output_attentions": self.output_attentions,
            },
            hidden,
            Grid(grid),
            num_layers=config.depths[self.stage],
            scan=self.scan,
            remat=self.remat,
        )
        if self.stage < len(config.depths) - 1:
            batch, _, width = hidden.shape
            x = filled(hidden.reshape(batch, *grid, width), (2, 2))
            x = patchify(x, (2, 2)).reshape(batch, -1, 2, 2, width)
            x = jnp.swapaxes(x, 2, 3).reshape(batch, -1, 4 * width)  # column by column
            x = LayerNorm(INNER_EPSILON, name="merge_norm")(x)
            init = nn.initializers.normal(config.initializer_range)
            hidden = Dense(2 * width, use_bias=False, kernel_init=init, name="merge")(x)
        return hidden, layers[-1].attentions


class Embeddings(nn.Module):
    """Patches, normed, and their positions if there are any: [B, X, Y, C] -> [B, N, D].

    Args:
        config: the model's.
        maskable: whether there is a vector that stands for masked patches.
        train: whether dropout is on.
    """

    config: Config
    maskable: bool
    train: bool

    @nn.compact
    def __call__(self, pixel_values: Array, masked: Array | None, grid: tuple[int, int]) -> Array:
        config, width = self.config, self.config.embed_dim
        patch = pair(config.patch_size)
        init = nn.initializers.normal(config.initializer_range)
        x = PatchEmbed(width, patch, init, name="patch")(filled(pixel_values, patch))
        x = LayerNorm(INNER_EPSILON, name="norm")(x)
        if self.maskable:
            mask = parameter(self, "mask", nn.initializers.zeros, (1, 1, width))
            if masked is not None:
                x = jnp.where(masked.astype(bool)[:, :, None], mask.astype(x.dtype), x)
        if config.use_absolute_embeddings:
            old = grid_of(pair(config.image_size), patch)
            shape = (1, old[0] * old[1], width)
            table = parameter(self, "position", nn.initializers.zeros, shape)
            x = x + resize_grid(table, old, grid).astype(x.dtype)
        return Dropout(config.hidden_dropout_prob)(x, self.train)


class Model(nn.Module):
    """Swin with one head.

    Args:
        config: the sizes.
        head: a key of `HEADS`.
        scan: weights stacked over the layers of each stage (``stages_{i}/layers/...`` [L, ...]) and
            one compiled block a stage.
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
        bool_masked_pos: Array | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """Runs the model.

        Args:
            pixel_values: [B, X, Y, C], normalised; of any size: sides are filled up with zeros to
                whole patches, and absolute positions resampled.
            bool_masked_pos: [B, N], 1 for patches that the model does not see.
            train: whether dropout is on; it needs ``rngs={"dropout": key}``.
            output_hidden_states: whether ``hidden_states`` [B, T, D] and ``reshaped_hidden_states``
                [B, X, Y, D] are returned: the embeddings and what each stage hands on.
            output_attentions: whether ``attentions`` is returned: of each stage's last block, its
                windows one after another, [B * windows, H, T, T].

        Raises:
            ValueError: an unknown head, images or masks of the wrong shape, or a mask for a model
                that has no vector for masked patches.
        """
        config, maskable = self.config, self.head == "masked_image_modeling"
        check_head(self, HEADS)
        check_pixels(pixel_values, config.num_channels)
        size = (pixel_values.shape[1], pixel_values.shape[2])
        grid = covering(size, pair(config.patch_size))
        check_mask(bool_masked_pos, pixel_values.shape[0], grid)
        if bool_masked_pos is not None and not maskable:
            raise ValueError("bool_masked_pos needs the head 'masked_image_modeling'")
        x = Embeddings(config, maskable, train, name="embed")(pixel_values, bool_masked_pos, grid)
        states, images, attentions = [x], [x.reshape(x.shape[0], *grid, -1)], []
        for i in range(len(config.depths)):
            stage = Stage(
                config, i, self.scan, self.remat, train, output_attentions, name=f"stages_{i}"
            )
            x, probabilities = stage(x, grid)
            if i < len(config.depths) - 1:
                grid = covering(grid, (2, 2))
            states.append(x)
            images.append(x.reshape(x.shape[0], *grid, -1))
            attentions.append(probabilities)
        x = LayerNorm(config.layer_norm_eps, name="final_norm")(x)
        out = self.outputs(x, grid)
        return dataclasses.replace(
            out,
            hidden_states=tuple(states) if output_hidden_states else None,
            reshaped_hidden_states=tuple(images) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def outputs(self, hidden: Array, grid: tuple[int, int]) -> Output:
        """What the head makes of the last hidden states [B, T, D]."""
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        if self.head == "masked_image_modeling":
            return Output(reconstruction=draw_pixels(config, hidden, grid))
        pooled = jnp.mean(hidden.astype(jnp.float32), axis=1).astype(hidden.dtype)
        if self.head == "model":
            return Output(last_hidden_state=hidden, pooler_output=pooled)
        logits = Dense(len(config.id2label), kernel_init=init, name="head")(pooled)
        return Output(logits=logits.astype(jnp.float32))


PREFIX = "swin."
# What is computed from the others, or what a backbone would give to another model.
FIXED: dict[str, Any] = dict.fromkeys(
    ("hidden_size", "num_layers", "out_features", "out_indices", "stage_names"), ...
) | {"path_norm": ...}
# Constants that version 4 saved.
IGNORED = (r"relative_position_index$",)
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    embed = f"{body}embeddings"
    table = [
        *conv_rules("embed/patch", f"{embed}.patch_embeddings.projection", bias=True),
        *norm_rules("embed/norm", f"{embed}.norm"),
        *norm_rules("final_norm", f"{body}layernorm"),
    ]
    if config.use_absolute_embeddings:
        table.append(Rule("params/embed/position", f"{embed}.position_embeddings"))
    here, layer = "stages_{s}/layers_{i}", f"{body}encoder.layers.{{s}}.blocks.{{i}}"
    blocks = layer_rules(here, layer, qkv_bias=config.qkv_bias)
    table += renamed(blocks, {"attention.attention": "attention.self"})
    table.append(
        Rule(
            f"params/{here}/relative_bias/embedding",
            f"{layer}.attention.self.relative_position_bias_table",
        )
    )
    if len(config.depths) > 1:
        merge = f"{body}encoder.layers.{{s}}.downsample"
        table += norm_rules("stages_{s}/merge_norm", f"{merge}.norm")
        table += dense_rules("stages_{s}/merge", f"{merge}.reduction", bias=False)
    match head:
        case "masked_image_modeling":
            table.append(Rule("params/embed/mask", f"{embed}.mask_token"))
            table += conv_rules("head", "decoder.0", bias=True)
        case "image_classification":
            table += dense_rules("head", "classifier")
    return table
