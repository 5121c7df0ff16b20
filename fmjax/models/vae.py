"""The variational autoencoder (Kingma & Welling 2014, arXiv:1312.6114): an encoder of Gaussian
latents and a decoder of pixels, dense (appendix C) or with convolutions before and after.

The noise of the reparametrisation is an input, drawn by `fmjax.tasks.variational_autoencoding`;
without it the latents are their means. Pixels go from 0 to 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.activation import activation
from fmjax.nn.checks import check_head, refuse
from fmjax.nn.conv import Conv, ConvTranspose
from fmjax.nn.linear import Dense
from fmjax.nn.vision import check_pixels, pair
from fmjax.types import Output, Remat
from fmjax.weights import Rule, conv_rules, conv_transpose_rules, dense_rules

LIKELIHOODS = ("bernoulli", "gaussian")
SIZE = 4  # of the convolutions' windows, whose stride is 2
AROUND = ((1, 1), (1, 1))


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, our own.

    Attributes:
      image_size: rows and columns, which the convolutions halve.
      latent_size: Z.
      conv_sizes: features of the encoder's convolutions; the decoder has them in reverse. None
        for a perceptron of pixels.
      dense_sizes: of the encoder's hidden layers after them; the decoder has them in reverse.
      likelihood: of pixels, "bernoulli", or "gaussian" with a spread of each pixel's own.
    """

    image_size: int | tuple[int, ...] = 28
    num_channels: int = 1
    latent_size: int = 20
    conv_sizes: tuple[int, ...] = ()
    dense_sizes: tuple[int, ...] = (500,)
    hidden_act: str = "tanh"
    likelihood: str = "bernoulli"

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value} must be positive"
            for name, value in (
                ("num_channels", self.num_channels),
                ("latent_size", self.latent_size),
                ("conv_sizes", min(self.conv_sizes, default=1)),
                ("dense_sizes", min(self.dense_sizes, default=1)),
            )
            if value < 1
        ]
        halved = 2 ** len(self.conv_sizes)
        if any(side < 1 or side % halved for side in pair(self.image_size)):
            problems.append(
                f"image_size={self.image_size} must divide by {halved}: "
                f"{len(self.conv_sizes)} convolutions halve it"
            )
        if self.likelihood not in LIKELIHOODS:
            problems.append(f"likelihood={self.likelihood!r} is not one of {LIKELIHOODS}")
        refuse(self, problems)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns after the encoder's convolutions."""
        rows, columns = pair(self.image_size)
        return rows // 2 ** len(self.conv_sizes), columns // 2 ** len(self.conv_sizes)

    @property
    def last_features(self) -> int:
        """Numbers a pixel is described by: one of a Bernoulli, two of a Gaussian, a channel."""
        return self.num_channels * (2 if self.likelihood == "gaussian" else 1)


MODEL_TYPE = "vae"
HEADS = {"model": "VAEModel"}
VARIANTS = {
    "tiny": Config(image_size=8, num_channels=2, latent_size=3, conv_sizes=(4,), dense_sizes=(6,)),
    "mnist": Config(),  # appendix C, 500 hidden units (section 5)
    "frey": Config(
        image_size=(28, 20), latent_size=10, dense_sizes=(200,), likelihood="gaussian"
    ),
    "conv-32": Config(
        image_size=32, num_channels=3, latent_size=64, conv_sizes=(32, 64, 128),
        dense_sizes=(256,), hidden_act="relu",
    ),  # ours
}  # fmt: skip


class Encoder(nn.Module):
    """Pixels -> mean and log variance of the latents."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:  # [B, X, Y, C] -> [B, Z], [B, Z]
        config, act = self.config, activation(self.config.hidden_act)
        for number, features in enumerate(config.conv_sizes):
            conv = Conv(features, SIZE, 2, use_bias=True, around=AROUND, name=f"conv_{number}")
            x = act(conv(x))  # fmt: skip
        x = jnp.moveaxis(x, -1, 1).reshape(len(x), -1)  # [B, C * X * Y], as PyTorch flattens
        for number, features in enumerate(config.dense_sizes):
            x = act(Dense(features, name=f"dense_{number}")(x))
        mean = Dense(config.latent_size, name="mean")(x)
        return mean, Dense(config.latent_size, name="log_variance")(x)


class Decoder(nn.Module):
    """Latents -> what is known of each pixel."""

    config: Config

    @nn.compact
    def __call__(self, z: Array) -> Array:  # [B, Z] -> [B, X, Y, C], or 2 C of a Gaussian
        config, act = self.config, activation(self.config.hidden_act)
        x = z
        for number, features in enumerate(reversed(config.dense_sizes)):
            x = act(Dense(features, name=f"dense_{number}")(x))
        widths = tuple(reversed(config.conv_sizes))
        first = widths[0] if widths else config.last_features
        rows, columns = config.grid
        x = Dense(first * rows * columns, name="project")(x)
        x = jnp.moveaxis(x.reshape(len(x), first, rows, columns), 1, -1)  # [B, x, y, C]
        for number, features in enumerate((*widths[1:], config.last_features) if widths else ()):
            x = act(x)
            x = ConvTranspose(features, SIZE, 2, 1, use_bias=True, name=f"conv_{number}")(x)
        return x


class Model(nn.Module):
    """Both halves.

    Args:
        config: the family's.
        head: "model".
        scan, remat: have no effect: layers differ in shape and are few.
    """

    config: Config
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(
        self, pixel_values: Array, noise: Array | None = None, *, train: bool = False
    ) -> Output:
        """Encodes and decodes.

        Args:
            pixel_values: [B, X, Y, C] from 0 to 1.
            noise: standard normal [B, Z]; None decodes the latents' means.
            train: has no effect: nothing is dropped.

        Returns:
            ``latent_mean``, ``latent_log_variance`` [B, Z], and what `decode` returns.

        Raises:
            ValueError: an unknown head, or images of another shape.
        """
        check_head(self, HEADS)
        check_pixels(pixel_values, self.config.num_channels)
        if pixel_values.shape[1:3] != pair(self.config.image_size):
            raise ValueError(
                f"images of {pixel_values.shape[1:3]}; this model's are of {self.config.image_size}"
            )
        mean, log_variance = self.encoder(pixel_values)
        mean, log_variance = mean.astype(jnp.float32), log_variance.astype(jnp.float32)
        latents = mean
        if noise is not None:
            latents = mean + jnp.exp(log_variance / 2) * noise  # equation 10
        out = self.decode(latents.astype(pixel_values.dtype))
        return dataclasses.replace(out, latent_mean=mean, latent_log_variance=log_variance)

    def decode(self, latents: Array) -> Output:
        """Latents [B, Z] into the distribution of pixels.

        Returns:
            ``images`` [B, X, Y, C], the means; ``image_location``, the logits of a Bernoulli or
            the means again; of a Gaussian ``image_log_scale``, the log standard deviations.
        """
        said = self.decoder(latents).astype(jnp.float32)
        if self.config.likelihood == "bernoulli":
            return Output(images=jax.nn.sigmoid(said), image_location=said)
        means, log_scale = jnp.split(said, 2, axis=-1)
        means = jax.nn.sigmoid(means)  # appendix C.2: pixels lie between 0 and 1
        return Output(images=means, image_location=means, image_log_scale=log_scale)


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    return {"pixel_values": jnp.zeros((1, *pair(config.image_size), config.num_channels))}


PREFIX = ""
FIXED: dict[str, Any] = {}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, under the same names."""
    table: list[Rule] = []
    for number in range(len(config.conv_sizes)):
        name = f"conv_{number}"
        table += conv_rules(f"encoder/{name}", f"encoder.{name}", bias=True)
        table += conv_transpose_rules(f"decoder/{name}", f"decoder.{name}", bias=True)
    dense = [f"dense_{number}" for number in range(len(config.dense_sizes))]
    for name in (*dense, "mean", "log_variance"):
        table += dense_rules(f"encoder/{name}", f"encoder.{name}")
    for name in (*dense, "project"):
        table += dense_rules(f"decoder/{name}", f"decoder.{name}")
    return table
