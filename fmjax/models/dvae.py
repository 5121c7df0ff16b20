"""The discrete VAE of DALL-E (Ramesh et al. 2021, arXiv:2102.12092, appendix A.1): convolutional
residual nets between images and grids of 8,192 kinds of tokens. The names of the authors' files.

The Gumbel noise by which a token is relaxed is an input, drawn by
`fmjax.tasks.discrete_autoencoding`; without it tokens are the likeliest. Pixels go from 0 to 1.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.checks import check_head, refuse
from fmjax.nn.conv import Conv, enlarged, max_pool
from fmjax.nn.vision import check_pixels
from fmjax.types import Output, Remat
from fmjax.weights import CONV2D, Rule

EPSILON = 0.1
"""Pixels from 0 to 1 are mapped to [EPSILON, 1 - EPSILON], whose logits are finite (A.3)."""
INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, our own.

    Attributes:
      hidden_size: features of the encoder's first group and the decoder's last.
      initial_size: features of the decoder's first convolution.
      multipliers: of each group's features; an image is halved between two.
      blocks_per_group: residual blocks.
      codebook_size: V, kinds of tokens.
    """

    num_channels: int = 3
    hidden_size: int = 256
    initial_size: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    blocks_per_group: int = 2
    codebook_size: int = 8192

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = min(value, default=0) if isinstance(value, tuple) else value
            if least < 1:
                problems.append(f"{field.name}={value} must be positive")
        if self.hidden_size % 4:
            problems.append(f"hidden_size={self.hidden_size} must divide by 4, for the bottlenecks")
        refuse(self, problems)

    @property
    def reduction(self) -> int:
        """Pixels of an image in a row or column of one token."""
        return 2 ** (len(self.multipliers) - 1)


MODEL_TYPE = "dvae"
HEADS = {"model": "DVAEModel"}
VARIANTS = {
    "tiny": Config(
        num_channels=2, hidden_size=4, initial_size=3, multipliers=(1, 2), blocks_per_group=1,
        codebook_size=7,
    ),
    "dall-e": Config(),
}  # fmt: skip


def to_unit(pixels: Array) -> Array:
    """Pixels from 0 to 1 into [EPSILON, 1 - EPSILON]."""
    return (1 - 2 * EPSILON) * pixels + EPSILON


def from_unit(mapped: Array) -> Array:
    """The inverse of `to_unit`, cut to 0 and 1."""
    return jnp.clip((mapped - EPSILON) / (1 - 2 * EPSILON), 0.0, 1.0)


class Block(nn.Module):
    """Four convolutions, each behind a ReLU, weighed little beside the image itself.

    Args:
        features: O; the three narrow convolutions have a quarter.
        sizes: of the four windows.
        gain: what the convolutions' result is multiplied by.
    """

    features: int
    sizes: tuple[int, int, int, int]
    gain: float

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X, Y, O]
        y = x
        for number, size in enumerate(self.sizes, 1):
            features = self.features if number == 4 else self.features // 4
            y = _conv(features, size, f"conv_{number}")(nn.relu(y))
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, "shortcut")(x)
        return x + self.gain * y


def _conv(features: int, size: int, name: str) -> Conv:
    return Conv(features, size, kernel_init=INIT, use_bias=True, name=name)


class Side(nn.Module):
    """The encoder or the decoder.

    Args:
        config: the family's.
        decodes: which.
    """

    config: Config
    decodes: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, groups = self.config, self.config.multipliers
        gain = 1 / (len(groups) * config.blocks_per_group) ** 2
        if self.decodes:
            x = _conv(config.initial_size, 1, "input")(x)
            groups, sizes, last = groups[::-1], (1, 3, 3, 3), 2 * config.num_channels
        else:
            x = _conv(config.hidden_size, 7, "input")(x)
            sizes, last = (3, 3, 3, 1), config.codebook_size
        for number, times in enumerate(groups):
            for i in range(config.blocks_per_group):
                width = times * config.hidden_size
                x = Block(width, sizes, gain, name=f"group_{number}_block_{i}")(x)
            if number < len(groups) - 1:
                x = enlarged(x) if self.decodes else max_pool(x, 2, 2)
        return _conv(last, 1, "output")(nn.relu(x))


class Model(nn.Module):
    """Encoder and decoder.

    Args:
        config: the family's.
        head: "model".
        scan, remat: have no effect: blocks differ in shape.
    """

    config: Config
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    pixel_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @property
    def num_codes(self) -> int:
        """V."""
        return self.config.codebook_size

    def setup(self) -> None:
        self.encoder = Side(self.config, False)
        self.decoder = Side(self.config, True)

    def __call__(
        self,
        pixel_values: Array,
        gumbel: Array | None = None,
        temperature: Array | float = 1.0,
        *,
        train: bool = False,
    ) -> Output:
        """Encodes and decodes.

        Args:
            pixel_values: [B, X, Y, C] from 0 to 1.
            gumbel: Gumbel noise [B, x, y, V], by which tokens are drawn, relaxed; None takes the
                likeliest.
            temperature: of the relaxation: near 0 tokens are whole.
            train: has no effect: nothing is dropped.

        Returns:
            ``logits`` [B, x, y, V], ``codes`` [B, x, y], the likeliest, and what `decode` returns.

        Raises:
            ValueError: an unknown head, or images of the wrong shape.
        """
        check_head(self, HEADS)
        encoded = self.encode(pixel_values)
        logits = encoded.logits
        assert logits is not None
        if gumbel is None:
            tokens = jax.nn.one_hot(encoded.codes, self.config.codebook_size)
        else:  # Jang et al. 2017, arXiv:1611.01144, equation 2
            tokens = jax.nn.softmax((logits + gumbel) / temperature)
        out = self.decode(tokens.astype(pixel_values.dtype))
        return dataclasses.replace(out, logits=logits, codes=encoded.codes)

    def encode(self, pixel_values: Array) -> Output:
        """``logits`` [B, x, y, V] of tokens, and ``codes``, the likeliest."""
        check_pixels(pixel_values, self.config.num_channels)
        sides = pixel_values.shape[1:3]
        if any(side % self.config.reduction for side in sides):
            raise ValueError(
                f"images of {sides} pixels; rows and columns must divide by {self.config.reduction}"
            )
        logits = self.encoder(to_unit(pixel_values)).astype(jnp.float32)
        return Output(logits=logits, codes=jnp.argmax(logits, axis=-1))

    def decode(self, tokens: Array) -> Output:
        """Tokens, whole or relaxed, [B, x, y, V] into the distribution of pixels.

        Returns:
            ``image_location`` and ``image_log_scale`` of the logit-Laplace distribution (A.3) of
            mapped pixels, and ``images`` [B, X, Y, C] from 0 to 1.
        """
        said = self.decoder(tokens).astype(jnp.float32)
        location, log_scale = jnp.split(said, 2, axis=-1)
        images = from_unit(jax.nn.sigmoid(location))
        return Output(images=images, image_location=location, image_log_scale=log_scale)

    def decode_codes(self, codes: Array) -> Array:
        """Codes int [B, x, y] into images [B, X, Y, C] from 0 to 1."""
        images = self.decode(jax.nn.one_hot(codes, self.config.codebook_size)).images
        assert images is not None
        return images

    def log_density(self, output: Output, pixels: Array) -> Array:
        """log p of pixels [B, X, Y, C] from 0 to 1 under what `decode` returned, nats each.

        The logit-Laplace distribution (equation 2): the logit of a mapped pixel is Laplace's, so
        that all probability lies between 0 and 1.
        """
        location, log_scale = output.image_location, output.image_log_scale
        assert location is not None
        assert log_scale is not None
        mapped = to_unit(pixels.astype(jnp.float32))
        logit = jnp.log(mapped) - jnp.log1p(-mapped)
        # 1 / (2 b x (1 - x)) exp(-|logit(x) - mu| / b)
        density = -math.log(2) - log_scale - jnp.log(mapped) - jnp.log1p(-mapped)
        return density - jnp.abs(logit - location) * jnp.exp(-log_scale)


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    side = config.reduction
    return {"pixel_values": jnp.zeros((1, side, side, config.num_channels))}


PREFIX = ""
FIXED: dict[str, Any] = {}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the tensors they are, which the authors keep in a file for each side."""
    table: list[Rule] = []

    def conv(param: str, tensor: str) -> None:
        table.append(Rule(f"params/{param}/kernel", f"{tensor}.w", CONV2D))
        table.append(Rule(f"params/{param}/bias", f"{tensor}.b"))

    for side in ("encoder", "decoder"):
        groups = config.multipliers if side == "encoder" else config.multipliers[::-1]
        width = config.hidden_size if side == "encoder" else config.initial_size
        conv(f"{side}/input", f"{side}.blocks.input")
        for number, times in enumerate(groups):
            for i in range(config.blocks_per_group):
                place = f"{side}.blocks.group_{number + 1}.block_{i + 1}"
                param = f"{side}/group_{number}_block_{i}"
                for step in range(1, 5):
                    conv(f"{param}/conv_{step}", f"{place}.res_path.conv_{step}")
                if width != times * config.hidden_size:
                    conv(f"{param}/shortcut", f"{place}.id_path")
                width = times * config.hidden_size
        conv(f"{side}/output", f"{side}.blocks.output.conv")
    return table
