"""VQGAN (Esser, Rombach & Ommer 2021, arXiv:2012.09841): an autoencoder of images whose latents are
vectors of a codebook, so that an image is a grid of numbers. The names of the authors' files.

Pixels go from -1 to 1. The head "image_discrimination" is the patch discriminator it is trained
with (Isola et al. 2017, arXiv:1611.07004), which is in the same files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.attention import attend
from fmjax.nn.checks import check_head, refuse
from fmjax.nn.compact import whole
from fmjax.nn.conv import Conv, enlarged
from fmjax.nn.embed import Embed
from fmjax.nn.norm import BatchNorm, GroupNorm
from fmjax.nn.vision import check_pixels
from fmjax.types import Output, Remat
from fmjax.weights import Rule, batch_norm_rules, conv_rules, norm_rules

INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's own


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, our own; the authors' names of them in brackets.

    Attributes:
      image_size: of the images it was made for [resolution]; any other that the levels halve is
        taken too. Where attention is follows from it.
      base_channels: features of the first level [ch].
      channel_multipliers: of each level, each half the size of the one before [ch_mult].
      blocks_per_level: residual blocks of the encoder's levels [num_res_blocks].
      attention_sizes: rows of the levels that attend [attn_resolutions].
      latent_channels: of the encoder's grid [z_channels].
      embedding_size: of a code [embed_dim].
      num_embeddings: codes [n_embed].
      norm_groups: of the group normalisations.
      discriminator_channels, discriminator_layers: [disc_ndf, disc_num_layers].
    """

    image_size: int = 256
    num_channels: int = 3
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks_per_level: int = 2
    attention_sizes: tuple[int, ...] = (16,)
    latent_channels: int = 256
    embedding_size: int = 256
    num_embeddings: int = 1024
    norm_groups: int = 32
    discriminator_channels: int = 64
    discriminator_layers: int = 3

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = min(value, default=1) if isinstance(value, tuple) else value
            if least < 1:
                problems.append(f"{field.name}={value} must be positive")
        if not self.channel_multipliers:
            problems.append("channel_multipliers=() must have a number a level")
        elif self.image_size % self.reduction:
            problems.append(f"image_size={self.image_size} must divide by {self.reduction}")
        if self.norm_groups > 0 and self.base_channels % self.norm_groups:
            problems.append(
                f"base_channels={self.base_channels} is no multiple of "
                f"norm_groups={self.norm_groups}"
            )
        refuse(self, problems)

    @property
    def reduction(self) -> int:
        """Pixels of an image in a row or column of one code."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def levels(self) -> tuple[tuple[int, bool], ...]:
        """Of each level its features and whether it attends."""
        return tuple(
            (self.base_channels * times, self.image_size // 2**number in self.attention_sizes)
            for number, times in enumerate(self.channel_multipliers)
        )


MODEL_TYPE = "vqgan"
HEADS = {"model": "VQModel", "image_discrimination": "NLayerDiscriminator"}
VARIANTS = {
    "tiny": Config(
        image_size=8, num_channels=2, base_channels=4, channel_multipliers=(1, 2),
        blocks_per_level=1, attention_sizes=(4,), latent_channels=3, embedding_size=5,
        num_embeddings=7, norm_groups=2, discriminator_channels=3, discriminator_layers=2,
    ),
    # The authors' ImageNet models; f16 is how many pixels wide a code is.
    "f16-1024": Config(),
    "f16-16384": Config(num_embeddings=16384),
}  # fmt: skip


def _conv(features: int, size: int, name: str) -> Conv:
    return Conv(features, size, kernel_init=INIT, use_bias=True, name=name)


class ResBlock(nn.Module):
    """Norm, swish, convolution, twice, beside the image itself or a 1 x 1 convolution of it."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X, Y, O]
        y = x
        for number in (1, 2):
            y = nn.swish(GroupNorm(self.groups, 1e-6, name=f"norm_{number}")(y))
            y = _conv(self.features, 3, f"conv_{number}")(y)
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, "shortcut")(x)
        return x + y


class AttentionBlock(nn.Module):
    """One head of attention over all pixels, added to them."""

    groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, D] -> [B, X, Y, D]
        batch, rows, columns, width = x.shape
        y = GroupNorm(self.groups, 1e-6, name="norm")(x)
        query, key, value = (
            _conv(width, 1, name)(y).reshape(batch, -1, width) for name in ("query", "key", "value")
        )
        found, _ = attend(query[:, :, None], key[:, None], value[:, None])  # [B, N, 1, D]
        return x + _conv(width, 1, "out")(found.reshape(batch, rows, columns, width))


class Middle(nn.Module):
    """Block, attention, block, at the smallest size."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ResBlock(self.features, self.groups, name="block_1")(x)
        x = AttentionBlock(self.groups, name="attn_1")(x)
        return ResBlock(self.features, self.groups, name="block_2")(x)


class Level(nn.Module):
    """Blocks of one size, each with attention after it or not."""

    features: int
    blocks: int
    attends: bool
    groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for number in range(self.blocks):
            x = ResBlock(self.features, self.groups, name=f"block_{number}")(x)
            if self.attends:
                x = AttentionBlock(self.groups, name=f"attn_{number}")(x)
        return x


class Encoder(nn.Module):
    """Pixels -> a grid of latents."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, C] -> [B, x, y, Z]
        config, groups = self.config, self.config.norm_groups
        x = _conv(config.base_channels, 3, "conv_in")(x)
        for number, (features, attends) in enumerate(config.levels):
            x = Level(features, config.blocks_per_level, attends, groups, name=f"down_{number}")(x)
            if number < len(config.levels) - 1:
                end = ((0, 1), (0, 1))  # zeros at the end alone
                x = Conv(
                    features, 3, 2, INIT, True, around=end, name=f"downsample_{number}"
                )(x)  # fmt: skip
        x = Middle(config.levels[-1][0], groups, name="middle")(x)
        x = nn.swish(GroupNorm(groups, 1e-6, name="norm_out")(x))
        return _conv(config.latent_channels, 3, "conv_out")(x)


class Decoder(nn.Module):
    """A grid of latents -> pixels."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, x, y, Z] -> [B, X, Y, C]
        config, groups = self.config, self.config.norm_groups
        x = _conv(config.levels[-1][0], 3, "conv_in")(x)
        x = Middle(config.levels[-1][0], groups, name="middle")(x)
        for number, (features, attends) in reversed(list(enumerate(config.levels))):
            blocks = config.blocks_per_level + 1
            x = Level(features, blocks, attends, groups, name=f"up_{number}")(x)
            if number > 0:
                x = _conv(features, 3, f"upsample_{number}")(enlarged(x))
        x = nn.swish(GroupNorm(groups, 1e-6, name="norm_out")(x))
        return _conv(config.num_channels, 3, "conv_out")(x)


class PatchDiscriminator(nn.Module):
    """A score for each part of an image, that sees no more of it."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:  # [B, X, Y, C] -> [B, x, y, 1]
        config, init = self.config, nn.initializers.normal(0.02)
        count = config.discriminator_layers
        for number in range(count + 1):
            features = config.discriminator_channels * min(2**number, 8)
            stride = 1 if number == count else 2
            x = Conv(
                features, 4, stride, init, number == 0, ((1, 1), (1, 1)), name=f"conv_{number}"
            )(x)  # fmt: skip
            if number > 0:
                x = BatchNorm(train, name=f"norm_{number}")(x)
            x = jnp.where(x >= 0, x, 0.2 * x)
        return Conv(1, 4, 1, init, True, ((1, 1), (1, 1)), name="head")(x)


def _codebook_init(rng: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(rng, shape, dtype, -1, 1) / shape[0]


class Model(nn.Module):
    """The autoencoder, or the discriminator.

    Args:
        config: the family's.
        head: a key of ``HEADS``.
        scan: has no effect: blocks differ in shape.
        remat: has no effect.
    """

    config: Config
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    pixel_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    @property
    def num_codes(self) -> int:
        """V."""
        return self.config.num_embeddings

    def setup(self) -> None:
        check_head(self, HEADS)
        config = self.config
        if self.head == "image_discrimination":
            self.discriminator = PatchDiscriminator(config)
            return
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.codebook = Embed(config.num_embeddings, config.embedding_size, _codebook_init)
        self.quant_conv = Conv(config.embedding_size, 1, kernel_init=INIT, use_bias=True)
        self.post_quant_conv = Conv(config.latent_channels, 1, kernel_init=INIT, use_bias=True)

    def __call__(self, pixel_values: Array, *, train: bool = False) -> Output:
        """Encodes, quantises and decodes; gradients pass the codebook straight through.

        Args:
            pixel_values: [B, X, Y, C] from -1 to 1.
            train: of the discriminator's batch normalisation.

        Returns:
            ``latents``, ``quantised`` [B, x, y, D], ``codes`` [B, x, y] and ``images`` like the
            pixels, not clipped; or ``logits`` [B, x, y, 1], high where an image looks real.

        Raises:
            ValueError: an unknown head, or images of the wrong shape.
        """
        check_pixels(pixel_values, self.config.num_channels)
        if self.head == "image_discrimination":
            return Output(logits=self.discriminator(pixel_values, train).astype(jnp.float32))
        out = self.encode(pixel_values)
        assert out.latents is not None
        assert out.quantised is not None
        # van den Oord et al. 2017, section 3.2: the gradient is copied from one to the other.
        through = out.latents + jax.lax.stop_gradient(out.quantised - out.latents)
        return dataclasses.replace(out, images=self.decode(through))

    def encode(self, pixel_values: Array) -> Output:
        """``latents``, their nearest codes' vectors ``quantised``, and ``codes``."""
        sides = pixel_values.shape[1:3]
        if any(side % self.config.reduction for side in sides):
            raise ValueError(
                f"images of {sides} pixels; rows and columns must divide by {self.config.reduction}"
            )
        latents = self.quant_conv(self.encoder(pixel_values))  # [B, x, y, D]
        table = whole(self.codebook.embedding).astype(jnp.float32)  # [V, D]
        # |z - e|^2 but for |z|^2, which is the same for all codes.
        distances = jnp.square(table).sum(axis=-1) - 2 * self.codebook.attend(latents)
        codes = jnp.argmin(distances, axis=-1)
        return Output(latents=latents, quantised=self.codebook(codes), codes=codes)

    def decode(self, quantised: Array) -> Array:
        """Vectors of the codebook [B, x, y, D] into images [B, X, Y, C]."""
        return self.decoder(self.post_quant_conv(quantised))

    def decode_codes(self, codes: Array) -> Array:
        """Codes int [B, x, y] into images [B, X, Y, C] from about -1 to 1."""
        return self.decode(self.codebook(codes))


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    side = config.image_size
    if head == "image_discrimination":  # three windows of 4 and no zeros left over
        side = 2 ** (config.discriminator_layers + 2)
    return {"pixel_values": jnp.zeros((1, side, side, config.num_channels))}


PREFIX = ""
FIXED: dict[str, Any] = {}
# Of the losses in the authors' files: the perceptual net, and what the other head reads.
IGNORED = (r"^loss\.",)
from_tensors = config_alone


def _block_rules(param: str, tensor: str, shortcut: bool) -> Iterator[Rule]:
    for number in (1, 2):
        yield from norm_rules(f"{param}/norm_{number}", f"{tensor}.norm{number}")
        yield from conv_rules(f"{param}/conv_{number}", f"{tensor}.conv{number}", bias=True)
    if shortcut:
        yield from conv_rules(f"{param}/shortcut", f"{tensor}.nin_shortcut", bias=True)


def _attention_rules(param: str, tensor: str) -> Iterator[Rule]:
    yield from norm_rules(f"{param}/norm", f"{tensor}.norm")
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "proj_out")):
        yield from conv_rules(f"{param}/{ours}", f"{tensor}.{theirs}", bias=True)


def _middle_rules(side: str) -> Iterator[Rule]:
    yield from _block_rules(f"{side}/middle/block_1", f"{side}.mid.block_1", False)
    yield from _attention_rules(f"{side}/middle/attn_1", f"{side}.mid.attn_1")
    yield from _block_rules(f"{side}/middle/block_2", f"{side}.mid.block_2", False)
    yield from conv_rules(f"{side}/conv_in", f"{side}.conv_in", bias=True)
    yield from norm_rules(f"{side}/norm_out", f"{side}.norm_out")
    yield from conv_rules(f"{side}/conv_out", f"{side}.conv_out", bias=True)


def _level_rules(config: Config) -> Iterator[Rule]:
    last = len(config.levels) - 1
    sides = (
        ("encoder", "down", list(enumerate(config.levels)), config.blocks_per_level),
        ("decoder", "up", list(enumerate(config.levels))[::-1], config.blocks_per_level + 1),
    )
    for side, way, levels, blocks in sides:
        width = config.base_channels if side == "encoder" else levels[0][1][0]
        for number, (features, attends) in levels:
            param, tensor = f"{side}/{way}_{number}", f"{side}.{way}.{number}"
            for i in range(blocks):
                block = f"{tensor}.block.{i}"
                yield from _block_rules(f"{param}/block_{i}", block, width != features)
                if attends:
                    yield from _attention_rules(f"{param}/attn_{i}", f"{tensor}.attn.{i}")
                width = features
            if number != (last if side == "encoder" else 0):
                kind = f"{way}sample"
                place = f"{side}/{kind}_{number}"
                yield from conv_rules(place, f"{tensor}.{kind}.conv", bias=True)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the tensors of the authors' files that they are."""
    if head == "image_discrimination":
        place = "loss.discriminator.main"
        table = conv_rules("discriminator/conv_0", f"{place}.0", bias=True)
        for number in range(1, config.discriminator_layers + 1):
            first = 3 * number - 1
            table += conv_rules(f"discriminator/conv_{number}", f"{place}.{first}")
            table += batch_norm_rules(f"discriminator/norm_{number}", f"{place}.{first + 1}")
        end = 3 * config.discriminator_layers + 2
        return [*table, *conv_rules("discriminator/head", f"{place}.{end}", bias=True)]
    return [
        *_middle_rules("encoder"),
        *_middle_rules("decoder"),
        *_level_rules(config),
        Rule("params/codebook/embedding", "quantize.embedding.weight"),
        *conv_rules("quant_conv", "quant_conv", bias=True),
        *conv_rules("post_quant_conv", "post_quant_conv", bias=True),
    ]
