"""Convolutions over images, channels last: kernels are [X, Y, I, O]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.nn.linear import add_bias, gram, matmul
from fmjax.nn.mlp import activation
from fmjax.nn.norm import BatchNorm

Around = tuple[tuple[int, int], tuple[int, int]]
"""Zeros before and after the rows, and before and after the columns."""
# He et al. 2015, arXiv:1502.01852, eq. 10 with the number of outputs, as PyTorch's ResNets have it.
KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """A convolution in its kernel's dtype; zeros around the image keep its size at stride 1.

    Args:
        features: O.
        size: of the square window.
        stride: pixels between windows.
        kernel_init: initializer of the kernel [X, Y, I, O].
        use_bias: whether a bias is added.
        around: zeros put before and after the rows, and the columns; None is half a window on each
            side, as PyTorch has it.
    """

    features: int
    size: int
    stride: int = 1
    kernel_init: Callable[..., Array] = KAIMING
    use_bias: bool = False
    around: Around | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        x = x.astype(kernel.dtype)  # pixels are float32 whatever the weights are
        if self.size == 1:
            # XLA's CPU convolutions are slow, and this one is a product.
            y = matmul(x[:, :: self.stride, :: self.stride], kernel[0, 0])
        else:
            around = half_a_window(self.size) if self.around is None else self.around
            y = jax.lax.platform_dependent(
                x,
                kernel,
                cpu=lambda x, kernel: _convolution_on_cpu(x, kernel, self.stride, around),
                default=partial(_convolution, stride=self.stride, around=around),
            )
        if self.use_bias:
            y = add_bias(
                y.astype(jnp.float32), self.param("bias", nn.initializers.zeros, (self.features,))
            )
        return y.astype(x.dtype)


class DepthwiseConv(nn.Module):
    """A convolution of each feature by itself, in its kernel's dtype.

    Args:
        size, stride, kernel_init, use_bias, around: see `Conv`; the kernel is [X, Y, 1, C].
    """

    size: int
    stride: int = 1
    kernel_init: Callable[..., Array] = KAIMING
    use_bias: bool = False
    around: Around | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, C] -> [B, X', Y', C]
        kernel = self.param("kernel", self.kernel_init, (self.size, self.size, 1, x.shape[-1]))
        around = half_a_window(self.size) if self.around is None else self.around
        y = jax.lax.platform_dependent(
            x.astype(kernel.dtype),
            kernel,
            # XLA's CPU convolution of many groups takes them one by one.
            cpu=lambda x, kernel: _depthwise_on_cpu(x, kernel, self.stride, around),
            default=partial(_convolution, stride=self.stride, around=around, groups=x.shape[-1]),
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
            y = add_bias(y.astype(jnp.float32), bias).astype(y.dtype)
        return y


def _shifted_products(x: Array, kernel: Array, stride: int, around: Around) -> Array:
    """A depthwise convolution as the sum of the shifted image times a row of the kernel each."""
    x = jnp.pad(x, ((0, 0), *around, (0, 0)))
    rows = kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)  # [X * Y, C]
    total = jnp.zeros((), jnp.float32)
    for part, row in zip(_shifts(x, kernel.shape[0], stride), rows, strict=True):
        total = total + part.astype(jnp.float32) * row
    return total.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise_on_cpu(x: Array, kernel: Array, stride: int, around: Around) -> Array:
    """The same; its gradients are written out.

    In a feed-forward their own take XLA three times as long (measured: 145 ms against 41 ms for
    [32, 16, 16, 128]): it would pad and reduce whole batches once for each place of the window.
    """
    return _shifted_products(x, kernel, stride, around)


def _depthwise_forward(
    x: Array, kernel: Array, stride: int, around: Around
) -> tuple[Array, tuple[Array, Array]]:
    return _shifted_products(x, kernel, stride, around), (x, kernel)


def _depthwise_backward(
    stride: int, around: Around, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    size = kernel.shape[0]
    # To an image: the gradients as far apart as the windows were, and the kernel turned round.
    edges = [(0, 0, 0)]
    for length, new, (before, _) in zip(x.shape[1:3], g.shape[1:3], around, strict=True):
        first = size - 1 - before
        last = length + size - 1 - first - ((new - 1) * stride + 1)
        edges.append((first, last, stride - 1))
    spread = jax.lax.pad(g, jnp.zeros((), g.dtype), (*edges, (0, 0, 0)))
    dx = _shifted_products(spread, kernel[::-1, ::-1], 1, ((0, 0), (0, 0)))

    def add(total: Array, example: tuple[Array, Array]) -> tuple[Array, None]:
        image, gradient = (part.astype(jnp.float32) for part in example)
        image = jnp.pad(image, (*around, (0, 0)))[None]
        products = jnp.concatenate([part * gradient for part in _shifts(image, size, stride)])
        return total + products.sum(axis=(1, 2)), None  # [X * Y, C]

    zeros = jnp.zeros((size * size, x.shape[-1]), jnp.float32)
    dkernel, _ = jax.lax.scan(add, zeros, (x, g))
    return dx, dkernel.reshape(kernel.shape).astype(kernel.dtype)


_depthwise_on_cpu.defvjp(_depthwise_forward, _depthwise_backward)


def _convolution(x: Array, kernel: Array, *, stride: int, around: Around, groups: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=around,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolution_on_cpu(x: Array, kernel: Array, stride: int, around: Around) -> Array:
    """The same; its kernel's gradient is a product for each place of the window.

    XLA's takes up to twice as long (measured: 34 ms against 19 ms for [128, 14, 14, 32] and 64
    features).
    """
    return _convolution(x, kernel, stride=stride, around=around)


def _forward(x: Array, kernel: Array, stride: int, around: Around) -> tuple[Array, Any]:
    return _convolution(x, kernel, stride=stride, around=around), (x, kernel)


def _backward(stride: int, around: Around, saved: Any, g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    of_x = partial(_convolution, kernel=kernel, stride=stride, around=around)
    (dx,) = jax.vjp(of_x, x)[1](g)
    rows = g.reshape(-1, g.shape[-1])  # [N, O]
    parts = _shifts(jnp.pad(x, ((0, 0), *around, (0, 0))), kernel.shape[0], stride)
    products = [gram(part.reshape(-1, part.shape[-1]), rows) for part in parts]
    return dx, jnp.stack(products).reshape(kernel.shape).astype(kernel.dtype)


_convolution_on_cpu.defvjp(_forward, _backward)


def half_a_window(size: int) -> Around:
    """Zeros on each side alike, by which an image keeps its size."""
    return (size // 2, size // 2), (size // 2, size // 2)


def same_padding(image: tuple[int, ...], size: int, stride: int) -> Around:
    """TensorFlow's "SAME": as many windows as strides fit, an odd zero at the end.

    Args:
        image: its rows and columns.
        size: of the window.
        stride: between windows.
    """
    total = [max((-(-length // stride) - 1) * stride + size - length, 0) for length in image]
    rows, columns = ((zeros // 2, zeros - zeros // 2) for zeros in total)
    return rows, columns


class ConvNorm(nn.Module):
    """A convolution, batch normalisation, and an activation.

    Args:
        features, size, stride, kernel_init, around: see `Conv`; no features is a `DepthwiseConv`.
        act: name of the activation, as in config.json; None for none.
        train: whether the batch's own statistics are used.
        epsilon, momentum: of the normalisation.
    """

    features: int | None
    size: int
    stride: int = 1
    act: str | None = None
    train: bool = False
    epsilon: float = 1e-5
    momentum: float = 0.1
    kernel_init: Callable[..., Array] = KAIMING
    around: Around | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        options = {
            "stride": self.stride,
            "kernel_init": self.kernel_init,
            "around": self.around,
            "name": "conv",
        }
        if self.features is None:
            x = DepthwiseConv(self.size, **options)(x)
        else:
            x = Conv(self.features, self.size, **options)(x)
        x = BatchNorm(self.train, self.epsilon, self.momentum, name="norm")(x)
        return x if self.act is None else activation(self.act)(x)


def max_pool(x: Array, size: int, stride: int, padding: int = 0) -> Array:
    """The largest value of each square window; padding never is: [B, X, Y, C] -> [B, X', Y', C]."""
    around = (padding, padding)
    options = {"size": size, "stride": stride, "around": (around, around)}
    return jax.lax.platform_dependent(
        x,
        # XLA's CPU gradient of a window's maximum takes 15 times as long (measured: 53 ms against
        # 3 ms for [128, 28, 28, 32] and windows of 2).
        cpu=partial(_shifted_maxima, **options),
        default=partial(_window_maxima, **options),
    )


def _shifted_maxima(x: Array, *, size: int, stride: int, around: Around) -> Array:
    """The larger, each time, of the image and of itself shifted."""
    x = jnp.pad(x, ((0, 0), *around, (0, 0)), constant_values=-jnp.inf)
    return reduce(jnp.maximum, _shifts(x, size, stride))


def _window_maxima(x: Array, *, size: int, stride: int, around: Around) -> Array:
    return jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        (1, size, size, 1),
        (1, stride, stride, 1),
        ((0, 0), *around, (0, 0)),
    )


def _shifts(x: Array, size: int, stride: int) -> Iterator[Array]:
    """What each place of a window sees, row by row: [B, X', Y', C], size * size times."""
    rows, columns = ((length - size) // stride * stride + 1 for length in x.shape[1:3])
    for i in range(size):
        for j in range(size):
            yield x[:, i : i + rows : stride, j : j + columns : stride]


def average_grid(x: Array, size: tuple[int, int]) -> Array:
    """Averages over the windows of a grid of any size: [B, X, Y, C] -> [B, *size, C].

    As PyTorch's adaptive average pooling: window i of n is of rows ``floor(i X / n)`` to
    ``ceil((i + 1) X / n)``.
    """
    if x.shape[1:3] == size:
        return x
    rows, columns = (_windows(*sizes) for sizes in zip(x.shape[1:3], size, strict=True))
    return resample(x, rows, columns)


def resample(x: Array, rows: Array | np.ndarray, columns: Array | np.ndarray) -> Array:
    """Images whose pixels are sums of others': [B, X, Y, C] -> [B, X', Y', C], by two products.

    Args:
        x: [B, X, Y, C].
        rows: their weights [X', X].
        columns: theirs, [Y', Y].
    """
    rows, columns = (jnp.asarray(matrix, jnp.float32) for matrix in (rows, columns))
    return jnp.einsum("xX,yY,BXYC->BxyC", rows, columns, x.astype(jnp.float32)).astype(x.dtype)


def _windows(old: int, new: int) -> np.ndarray:
    """The weights [new, old] of averages along one axis."""
    matrix = np.zeros((new, old))
    for i in range(new):
        start, end = i * old // new, -(-(i + 1) * old // new)
        matrix[i, start:end] = 1 / (end - start)
    return matrix
