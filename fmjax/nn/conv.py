"""Convolutions over images, channels last: kernels are [X, Y, I, O]."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.linear import matmul
from fmjax.nn.mlp import activation
from fmjax.nn.norm import BatchNorm

# He et al. 2015, arXiv:1502.01852, eq. 10 with the number of outputs, as PyTorch's ResNets have it.
KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """A convolution in x's dtype with square windows, zeros around the image as PyTorch puts them.

    Args:
        features: O.
        size: of the window.
        stride: pixels between windows.
        padding: zeros on each side; None is ``size // 2``, which keeps the size at stride 1.
        use_bias: whether there is a bias.
        kernel_init: initializer of the kernel [X, Y, I, O].
    """

    features: int
    size: int
    stride: int = 1
    padding: int | None = None
    use_bias: bool = True
    kernel_init: Callable[..., Array] = KAIMING

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        padding = self.size // 2 if self.padding is None else self.padding
        if self.size == 1 and padding == 0:
            # XLA's CPU convolutions are slow, and this one is a product.
            y = matmul(x[:, :: self.stride, :: self.stride], kernel[0, 0]).astype(x.dtype)
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel.astype(x.dtype),
                window_strides=(self.stride, self.stride),
                padding=((padding, padding), (padding, padding)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        if not self.use_bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalisation, and an activation.

    Args:
        features, size, stride: see `Conv`.
        act: name of the activation, as in config.json; None for none.
        train: whether the batch's own statistics are used.
    """

    features: int
    size: int
    stride: int = 1
    act: str | None = None
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        x = Conv(self.features, self.size, self.stride, use_bias=False, name="conv")(x)
        x = BatchNorm(self.train, name="norm")(x)
        return x if self.act is None else activation(self.act)(x)


def max_pool(x: Array, size: int, stride: int, padding: int = 0) -> Array:
    """The largest value of each square window; padding never is: [B, X, Y, C] -> [B, X', Y', C]."""
    around = (padding, padding)
    return jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        (1, size, size, 1),
        (1, stride, stride, 1),
        ((0, 0), around, around, (0, 0)),
    )
