"""DCGAN (Radford, Metz & Chintala 2016, arXiv:1511.06434): transposed convolutions that make images
of numbers, and strided ones that tell them from real images. PyTorch's Sequentials.

The two players are two heads, two models with weights of their own; see
`fmjax.tasks.adversarial_generation`. Pixels go from -1 to 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.checks import check_head, refuse
from fmjax.nn.conv import Around, Conv, ConvTranspose
from fmjax.nn.norm import BatchNorm, GroupNorm
from fmjax.nn.vision import check_pixels
from fmjax.types import Output, Remat
from fmjax.weights import Rule, batch_norm_rules, conv_rules, conv_transpose_rules, norm_rules

NORMS = ("batch_norm", "layer_norm", "none")
LEAK = 0.2
INIT = nn.initializers.normal(0.02)  # section 4
FIRST = 4  # rows and columns of the smallest feature map


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, our own.

    Attributes:
      num_channels: C of the images.
      latent_size: Z, numbers an image is made of.
      hidden_sizes: features of the discriminator's convolutions, each of which halves the image;
        the generator has them in reverse. An image is 4 * 2 ** len(hidden_sizes) pixels wide.
      kernel_size: of the convolutions, but for those of the 4 x 4 map.
      discriminator_norm: "batch_norm"; "layer_norm" of whole images or "none", with which a
        critic's examples do not depend on each other (Gulrajani et al. 2017, section 4).
    """

    num_channels: int = 3
    latent_size: int = 100
    hidden_sizes: tuple[int, ...] = (128, 256, 512, 1024)
    kernel_size: int = 5
    discriminator_norm: str = "batch_norm"

    def __post_init__(self) -> None:
        problems = []
        if not self.hidden_sizes or any(size < 1 for size in self.hidden_sizes):
            problems.append(f"hidden_sizes={self.hidden_sizes} must be positive, at least one")
        for name in ("num_channels", "latent_size"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be positive")
        if self.kernel_size not in (3, 4, 5):
            problems.append(f"kernel_size={self.kernel_size} must be 3, 4 or 5")
        if self.discriminator_norm not in NORMS:
            problems.append(f"discriminator_norm={self.discriminator_norm!r} is not one of {NORMS}")
        refuse(self, problems)

    @property
    def side(self) -> int:
        """Rows and columns of the images."""
        return FIRST * 2 ** len(self.hidden_sizes)


MODEL_TYPE = "dcgan"
HEADS = {
    "model": "DCGANModel",
    "image_discrimination": "DCGANDiscriminator",
    "image_generation": "DCGANGenerator",
}
VARIANTS = {
    "tiny": Config(num_channels=2, latent_size=6, hidden_sizes=(4, 6), kernel_size=4),
    "64": Config(),  # Radford et al. 2016, figure 1
    # The authors' program in Torch: windows that two strides divide, half as many features.
    "64-torch": Config(hidden_sizes=(64, 128, 256, 512), kernel_size=4),
}


class Model(nn.Module):
    """The discriminator, bare ("model") or with its score, or the generator.

    Args:
        config: the family's.
        head: a key of ``HEADS``.
        scan, remat: have no effect: layers differ in shape and are few.
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
        output_hidden_states: bool = False,
    ) -> Output:
        """Runs one player.

        Args:
            pixel_values: [B, X, Y, C] from -1 to 1, of the discriminator.
            latents: [B, Z], standard normal, of the generator.
            train: whether batch normalisation uses the batch's own statistics, which with
                ``mutable=["batch_stats"]`` move the running ones.
            output_hidden_states: whether the discriminator's ``hidden_states`` are returned, one a
                convolution: what the paper classifies images by (section 5.1).

        Returns:
            ``last_hidden_state`` [B, 4, 4, D] and ``pooler_output`` [B, D]; or ``logits`` [B, 1],
            high for real images; or ``images`` [B, X, Y, C].

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
        x, states = self.discriminate(pixel_values, train)
        kept = tuple(states) if output_hidden_states else None
        if self.head == "model":
            pooled = jnp.max(x, axis=(1, 2)).astype(jnp.float32)
            return Output(last_hidden_state=x, pooler_output=pooled, hidden_states=kept)
        nothing = ((0, 0), (0, 0))
        score = Conv(1, FIRST, kernel_init=INIT, around=nothing, name="head")(x)
        logits = score.reshape(len(x), 1).astype(jnp.float32)
        return Output(logits=logits, hidden_states=kept)

    def discriminate(self, pixel_values: Array, train: bool) -> tuple[Array, Sequence[Array]]:
        """The 4 x 4 map [B, 4, 4, D] and every convolution's output."""
        config = self.config
        check_pixels(pixel_values, config.num_channels)
        if pixel_values.shape[1:3] != (config.side, config.side):
            raise ValueError(
                f"images of {pixel_values.shape[1:3]} pixels; this model's are of "
                f"{config.side} x {config.side}: resize or pad them"
            )
        x, states = pixel_values, []
        for number, features in enumerate(config.hidden_sizes):
            x = Conv(
                features, config.kernel_size, 2, INIT, around=around(config.kernel_size),
                name=f"conv_{number}",
            )(x)  # fmt: skip
            if number > 0:  # not on what reads pixels: section 3
                x = self.norm(f"norm_{number}", train, x)
            x = jnp.where(x >= 0, x, LEAK * x)
            states.append(x)
        return x, states

    def norm(self, name: str, train: bool, x: Array) -> Array:
        """The discriminator's normalisation."""
        match self.config.discriminator_norm:
            case "batch_norm":
                return BatchNorm(train, name=name)(x)
            case "layer_norm":
                return GroupNorm(1, name=name)(x)
        return x

    def generate(self, latents: Array, train: bool) -> Array:
        """Images [B, X, Y, C] from -1 to 1."""
        config = self.config
        if latents.ndim != 2 or latents.shape[1] != config.latent_size:
            raise ValueError(
                f"latents have the shape {latents.shape}; they must be [B, {config.latent_size}]"
            )
        widths = tuple(reversed(config.hidden_sizes))
        x = latents[:, None, None]  # [B, 1, 1, Z]
        x = ConvTranspose(widths[0], FIRST, kernel_init=INIT, name="conv_0")(x)  # [B, 4, 4, D]
        size = config.kernel_size
        for number, features in enumerate((*widths[1:], config.num_channels), 1):
            x = nn.relu(BatchNorm(train, name=f"norm_{number - 1}")(x))
            x = ConvTranspose(
                features, size, 2, (size - 1) // 2, size % 2, INIT, name=f"conv_{number}"
            )(x)  # twice the size
        return jnp.tanh(x)


def around(size: int) -> Around:
    """Zeros by which a convolution of stride 2 halves an image of an even size."""
    zeros = (size - 1) // 2
    return (zeros, zeros), (zeros, zeros)


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    if head == "image_generation":
        return {"latents": jnp.zeros((1, config.latent_size))}
    return {"pixel_values": jnp.zeros((1, config.side, config.side, config.num_channels))}


PREFIX = ""
FIXED: dict[str, Any] = {}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are: Sequentials "main" of layers, normalisations
    and activations."""
    table: list[Rule] = []
    count = len(config.hidden_sizes)
    if head == "image_generation":
        for number in range(count + 1):
            table += conv_transpose_rules(f"conv_{number}", f"main.{3 * number}")
            if number < count:
                table += batch_norm_rules(f"norm_{number}", f"main.{3 * number + 1}")
        return table
    normed = config.discriminator_norm != "none"
    of_norm = batch_norm_rules if config.discriminator_norm == "batch_norm" else norm_rules
    place = 0
    for number in range(count):
        table += conv_rules(f"conv_{number}", f"main.{place}")
        if number > 0 and normed:
            table += of_norm(f"norm_{number}", f"main.{place + 1}")
        place += 3 if number > 0 and normed else 2
    return table if head == "model" else [*table, *conv_rules("head", f"main.{place}")]
