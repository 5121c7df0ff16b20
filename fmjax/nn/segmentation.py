"""Heads that label every pixel: feature maps of four sizes, UPerNet (Xiao et al. 2018,
arXiv:1807.10221), a fully convolutional head (Long et al. 2014, arXiv:1411.4038).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.activation import gelu
from fmjax.nn.conv import Conv, ConvNorm, average_grid, max_pool
from fmjax.nn.norm import BatchNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.product import matmul
from fmjax.nn.vision import resize


class Enlarge(nn.Module):
    """A transposed convolution by windows of 2 x 2 that do not overlap, and so a product.

    Args:
        kernel_init: initializer of the kernel [X, Y, C, C].
    """

    kernel_init: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, C] -> [B, 2 X, 2 Y, C]
        batch, rows, columns, width = x.shape
        kernel = parameter(self, "kernel", self.kernel_init, (2, 2, width, width))
        bias = parameter(self, "bias", nn.initializers.zeros, (width,))
        flat = kernel.transpose(2, 0, 1, 3).reshape(width, 4 * width)  # [I, 2 * 2 * O]
        y = matmul(x, flat).reshape(batch, rows, columns, 2, 2, width) + bias
        y = jnp.swapaxes(y, 2, 3)  # [B, X, 2, Y, 2, C]
        return y.reshape(batch, 2 * rows, 2 * columns, width).astype(x.dtype)


class Pyramid(nn.Module):
    """Four maps of one size made 4 and 2 times as large, left alone, and halved.

    Args:
        kernel_init: initializer of kernels.
        train: whether batch normalisation uses the batch's own statistics.
    """

    kernel_init: Callable[..., Array]
    train: bool

    @nn.compact
    def __call__(self, maps: Sequence[Array]) -> tuple[Array, ...]:  # [B, X, Y, C] each
        first = Enlarge(self.kernel_init, name="first_1")(maps[0])
        first = gelu(BatchNorm(self.train, name="first_norm")(first))
        first = Enlarge(self.kernel_init, name="first_2")(first)
        second = Enlarge(self.kernel_init, name="second")(maps[1])
        return first, second, maps[2], max_pool(maps[3], 2, 2)


class UperHead(nn.Module):
    """UPerNet: the smallest map pooled at several scales, then each larger one added from above.

    Args:
        width: features of all maps inside.
        classes: C.
        scales: sides of the grids that the smallest map is averaged over.
        kernel_init, train: see `Pyramid`.
    """

    width: int
    classes: int
    scales: tuple[int, ...]
    kernel_init: Callable[..., Array]
    train: bool

    @nn.compact
    def __call__(self, maps: Sequence[Array]) -> Array:  # -> [B, X, Y, C] float32, of the largest
        def conv(name: str, x: Array, size: int = 3) -> Array:
            options = {"train": self.train, "kernel_init": self.kernel_init, "name": name}
            return ConvNorm(self.width, size, act="relu", **options)(x)

        *larger, top = maps
        size = (top.shape[1], top.shape[2])
        pooled = [
            resize(conv(f"pooled_{i}", average_grid(top, (scale, scale)), 1), size)
            for i, scale in enumerate(self.scales)
        ]
        above = conv("pooled_out", jnp.concatenate([top, *pooled], axis=-1))
        out = [above]
        for i in reversed(range(len(larger))):
            x = conv(f"lateral_{i}", larger[i], 1)
            above = x + resize(above, (x.shape[1], x.shape[2]))
            out.insert(0, conv(f"level_{i}", above))
        size = (out[0].shape[1], out[0].shape[2])
        joined = jnp.concatenate([resize(x, size) for x in out], axis=-1)
        return classify_pixels(conv("out", joined), self.classes, self.kernel_init)


class FcnHead(nn.Module):
    """Convolutions, and the classes of each pixel.

    Args:
        width: features of the convolutions.
        classes: C.
        count: how many convolutions.
        joined: whether one more reads the map beside what they made of it.
        kernel_init, train: see `Pyramid`.
    """

    width: int
    classes: int
    count: int
    joined: bool
    kernel_init: Callable[..., Array]
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X, Y, C] float32
        options = {"act": "relu", "train": self.train, "kernel_init": self.kernel_init}
        y = x
        for i in range(self.count):
            y = ConvNorm(self.width, 3, name=f"layer_{i}", **options)(y)
        if self.joined:
            both = jnp.concatenate([x, y], axis=-1)
            y = ConvNorm(self.width, 3, name="joined", **options)(both)
        return classify_pixels(y, self.classes, self.kernel_init)


def classify_pixels(x: Array, classes: int, kernel_init: Callable[..., Array]) -> Array:
    """[B, X, Y, D] -> [B, X, Y, C] float32; a module "classes" of the compact method around it."""
    conv = Conv(classes, 1, kernel_init=kernel_init, use_bias=True, name="classes")
    return conv(x).astype(jnp.float32)
