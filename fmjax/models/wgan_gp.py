"""The residual players of WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028, appendix F, "CIFAR-10
ResNet architecture"): a generator with batch normalisation, and a critic without. Our own names.

Its smaller, plainer nets are `fmjax.models.dcgan` with another normalisation of the critic. Pixels
go from -1 to 1; the game is `fmjax.tasks.adversarial_generation.wasserstein`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.checks import check_head, refuse
from fmjax.nn.conv import Conv, average, average_pool, enlarged
from fmjax.nn.linear import Dense
from fmjax.nn.norm import BatchNorm, GroupNorm
from fmjax.nn.vision import check_pixels
from fmjax.types import Output, Remat
from fmjax.weights import Rule, batch_norm_rules, conv_rules, dense_rules, norm_rules

NORMS = ("none", "layer_norm")
INIT = nn.initializers.variance_scaling(2.0, "fan_in", "uniform")  # He et al. 2015, as the authors
FIRST = 4  # rows and columns that the generator begins with
CRITIC = ("down", "down", "same", "same")  # the critic's blocks


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, our own.

    Attributes:
      image_size: rows and columns, 4 doubled a few times.
      latent_size: Z, numbers an image is made of.
      generator_size, critic_size: features of every block.
      critic_norm: "none", as in the paper's table, or "layer_norm" of whole images, which it
        recommends in the place of batch normalisation (section 4).
    """

    image_size: int = 32
    num_channels: int = 3
    latent_size: int = 128
    generator_size: int = 128
    critic_size: int = 128
    critic_norm: str = "none"

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                problems.append(f"{field.name}={value} must be positive")
        times = self.image_size / FIRST
        if times < 2 or not math.log2(times).is_integer():
            problems.append(f"image_size={self.image_size} must be 8, 16, 32, ...")
        if self.critic_norm not in NORMS:
            problems.append(f"critic_norm={self.critic_norm!r} is not one of {NORMS}")
        refuse(self, problems)

    @property
    def doublings(self) -> int:
        """Blocks of the generator."""
        return int(math.log2(self.image_size // FIRST))


MODEL_TYPE = "wgan_gp"
HEADS = {
    "model": "WGANGPModel",
    "image_discrimination": "WGANGPCritic",
    "image_generation": "WGANGPGenerator",
}
VARIANTS = {
    "tiny": Config(
        image_size=8, num_channels=2, latent_size=5, generator_size=6, critic_size=4,
        critic_norm="layer_norm",
    ),
    "cifar-10": Config(),
}  # fmt: skip


class Block(nn.Module):
    """Two 3 x 3 convolutions, each behind a normalisation and a ReLU, beside the image itself.

    Args:
        features: O.
        way: "up" doubles the image before the second convolution, "down" halves it after, "same"
            leaves it.
        norm: "batch_norm", "layer_norm" or "none".
        train: of batch normalisation.
        first: whether it reads pixels, which are neither normalised nor cut at 0.
    """

    features: int
    way: str
    norm: str
    train: bool = False
    first: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        y = x if self.first else nn.relu(self.normed("norm_1", x))
        y = nn.relu(self.normed("norm_2", _conv(self.features, 3, "conv_1")(y)))
        y = _conv(self.features, 3, "conv_2")(enlarged(y) if self.way == "up" else y)
        if self.way == "up":
            return _conv(self.features, 1, "shortcut")(enlarged(x)) + y
        if self.way == "down":  # of a sum, the mean of both
            return average_pool(_conv(self.features, 1, "shortcut")(x) + y, 2, 2)
        return x + y

    def normed(self, name: str, x: Array) -> Array:
        """x by the normalisation of that name."""
        match self.norm:
            case "batch_norm":
                return BatchNorm(self.train, name=name)(x)
            case "layer_norm":
                return GroupNorm(1, name=name)(x)
        return x


def _conv(features: int, size: int, name: str) -> Conv:
    return Conv(features, size, kernel_init=INIT, use_bias=True, name=name)


class Model(nn.Module):
    """The critic, bare ("model") or with its score, or the generator.

    Args:
        config: the family's.
        head: a key of ``HEADS``.
        scan, remat: have no effect: blocks differ in shape and are few.
    """

    config: Config
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        pixel_values: Array | None = None,
        latents: Array | None = None,
        *,
        train: bool = False,
    ) -> Output:
        """Runs one player.

        Args:
            pixel_values: [B, X, Y, C] from -1 to 1, of the critic.
            latents: [B, Z], standard normal, of the generator.
            train: of the generator's batch normalisation.

        Returns:
            ``last_hidden_state`` [B, x, y, D] and ``pooler_output`` [B, D]; or ``logits`` [B, 1],
            the critic's score; or ``images`` [B, X, Y, C].

        Raises:
            ValueError: an unknown head, or the other player's input.
        """
        check_head(self, HEADS)
        if self.head == "image_generation":
            if latents is None or pixel_values is not None:
                raise ValueError("the generator makes images of latents: give them alone")
            return Output(images=self.generate(latents, train))
        if pixel_values is None or latents is not None:
            raise ValueError(f"the head {self.head!r} reads pixel_values: give them alone")
        config = self.config
        check_pixels(pixel_values, config.num_channels)
        if any(side % 4 for side in pixel_values.shape[1:3]):
            raise ValueError(f"images of {pixel_values.shape[1:3]}; sides must divide by 4")
        x = pixel_values
        for number, way in enumerate(CRITIC):
            x = Block(
                config.critic_size, way, config.critic_norm, first=number == 0,
                name=f"block_{number}",
            )(x)  # fmt: skip
        x = nn.relu(x)
        pooled = average(x)
        if self.head == "model":
            return Output(last_hidden_state=x, pooler_output=pooled)
        logits = Dense(1, kernel_init=INIT, name="head")(pooled)
        return Output(logits=logits.astype(jnp.float32))

    def generate(self, latents: Array, train: bool) -> Array:
        """Images [B, X, Y, C] from -1 to 1."""
        config, width = self.config, self.config.generator_size
        if latents.ndim != 2 or latents.shape[1] != config.latent_size:
            raise ValueError(
                f"latents have the shape {latents.shape}; they must be [B, {config.latent_size}]"
            )
        x = Dense(width * FIRST**2, kernel_init=INIT, name="project")(latents)
        x = jnp.moveaxis(x.reshape(len(x), width, FIRST, FIRST), 1, -1)  # [B, 4, 4, D]
        for number in range(config.doublings):
            x = Block(width, "up", "batch_norm", train, name=f"block_{number}")(x)
        x = nn.relu(BatchNorm(train, name="norm")(x))
        return jnp.tanh(_conv(config.num_channels, 3, "conv")(x))


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    if head == "image_generation":
        return {"latents": jnp.zeros((1, config.latent_size))}
    return {"pixel_values": jnp.zeros((1, 4, 4, config.num_channels))}


PREFIX = ""
FIXED: dict[str, Any] = {}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, under the same names."""
    generates = head == "image_generation"
    ways = ("up",) * config.doublings if generates else CRITIC
    table: list[Rule] = []
    for number, way in enumerate(ways):
        block = f"block_{number}"
        convs = ("conv_1", "conv_2") if way == "same" else ("conv_1", "conv_2", "shortcut")
        for name in convs:
            table += conv_rules(f"{block}/{name}", f"{block}.{name}", bias=True)
        # The critic's first block reads pixels.
        names = ("norm_1", "norm_2") if generates or number else ("norm_2",)
        for name in names:
            if generates:
                table += batch_norm_rules(f"{block}/{name}", f"{block}.{name}")
            elif config.critic_norm == "layer_norm":
                table += norm_rules(f"{block}/{name}", f"{block}.{name}")
    if generates:
        table += dense_rules("project", "project") + batch_norm_rules("norm", "norm")
        table += conv_rules("conv", "conv", bias=True)
    return [*table, *dense_rules("head", "head")] if head == "image_discrimination" else table
