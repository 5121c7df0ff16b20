"""Convolutions over images, channels last: kernels are [X, Y, I, O]."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.nn.linear import add_bias, matmul
from fmjax.nn.mlp import activation
from fmjax.nn.norm import BatchNorm

# He et al. 2015, arXiv:1502.01852, eq. 10 with the number of outputs, as PyTorch's ResNets have it.
KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """A convolution in x's dtype; zeros around the image keep its size at stride 1.

    Args:
        features: O.
        size: of the square window.
        stride: pixels between windows.
        kernel_init: initializer of the kernel [X, Y, I, O].
        use_bias: whether a bias is added.
    """

    features: int
    size: int
    stride: int = 1
    kernel_init: Callable[..., Array] = KAIMING
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        if self.size == 1:
            # XLA's CPU convolutions are slow, and this one is a product.
            y = matmul(x[:, :: self.stride, :: self.stride], kernel[0, 0])
        else:
            around = (self.size // 2, self.size // 2)  # on each side alike, as PyTorch has it
            y = jax.lax.conv_general_dilated(
                x,
                kernel.astype(x.dtype),
                window_strides=(self.stride, self.stride),
                padding=(around, around),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        if self.use_bias:
            y = add_bias(
                y.astype(jnp.float32), self.param("bias", nn.initializers.zeros, (self.features,))
            )
        return y.astype(x.dtype)


class ConvNorm(nn.Module):
    """A convolution, batch normalisation, and an activation.

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
        x = Conv(self.features, self.size, self.stride, name="conv")(x)
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


def average_grid(x: Array, size: tuple[int, int]) -> Array:
    """Averages over the windows of a grid of any size: [B, X, Y, C] -> [B, *size, C].

    As PyTorch's adaptive average pooling: window i of n is of rows ``floor(i X / n)`` to
    ``ceil((i + 1) X / n)``.
    """
    if x.shape[1:3] == size:
        return x
    rows, columns = (
        jnp.asarray(_windows(*sizes), jnp.float32) for sizes in zip(x.shape[1:3], size, strict=True)
    )
    pooled = jnp.einsum("xX,yY,BXYC->BxyC", rows, columns, x.astype(jnp.float32))
    return pooled.astype(x.dtype)


def _windows(old: int, new: int) -> np.ndarray:
    """The weights [new, old] of averages along one axis."""
    matrix = np.zeros((new, old))
    for i in range(new):
        start, end = i * old // new, -(-(i + 1) * old // new)
        matrix[i, start:end] = 1 / (end - start)
    return matrix
