"""Convolutions over images, channels last: kernels are [X, Y, I, O]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.nn.activation import activation
from fmjax.nn.convolution import Around, check_fit, convolution, shifts, window
from fmjax.nn.norm import BatchNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.product import add_bias, affine, matmul
from fmjax.nn.remat import mark_product
from fmjax.nn.vision import pair, shuffle_pixels

# He et al. 2015, arXiv:1502.01852, eq. 10 with the number of outputs, as PyTorch's ResNets have it.
KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """A convolution in its kernel's dtype; zeros around the image keep its size at stride 1.

    Args:
        features: O.
        size: of the window, one number or rows and columns.
        stride: pixels between windows, one number or along rows and columns.
        kernel_init: initializer of the kernel [X, Y, I / groups, O].
        use_bias: whether a bias is added.
        around: zeros put before and after the rows, and the columns; None is half a window on each
            side, as PyTorch has it.
        groups: I and O fall into as many parts, each convolved by itself.
        dilation: pixels from one place of a window to the next.
    """

    features: int
    size: int | tuple[int, int]
    stride: int | tuple[int, int] = 1
    kernel_init: Callable[..., Array] = KAIMING
    use_bias: bool = False
    around: Around | None = None
    groups: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        size = pair(self.size)
        shape = (*size, x.shape[-1] // self.groups, self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape)
        x = x.astype(kernel.dtype)  # pixels are float32 whatever the weights are
        if size == (1, 1) and self.groups == 1 and self.around in (None, ((0, 0), (0, 0))):
            # XLA's CPU convolutions are slow, and this one is a product.
            down, across = pair(self.stride)
            rows = x[:, ::down, ::across]
            if self.use_bias:
                y = matmul(rows, kernel[0, 0])
            else:
                y = affine(rows, kernel[0, 0], None)
        else:
            around = half_a_window(window(size, self.dilation))
            y = convolution(
                x,
                kernel,
                stride=self.stride,
                around=around if self.around is None else self.around,
                groups=self.groups,
                dilation=self.dilation,
            )
        if self.use_bias:
            y = add_bias(
                y.astype(jnp.float32),
                parameter(self, "bias", nn.initializers.zeros, (self.features,)),
            )
        return mark_product(y.astype(x.dtype))


class ConvTranspose(nn.Module):
    """A transposed convolution: each pixel becomes a window, and windows add up.

    PyTorch's ``ConvTranspose2d``. Not computed with zeros between pixels, three quarters of whose
    products are nothing: the pixels between two of the image are features of a convolution.

    Args:
        features: O.
        size: rows and columns of the window.
        stride: pixels between windows.
        padding: pixels left out at each side.
        more: pixels added at the end, PyTorch's ``output_padding``.
        kernel_init: initializer of the kernel [X, Y, I, O].
        use_bias: whether a bias is added.
    """

    features: int
    size: int
    stride: int = 1
    padding: int = 0
    more: int = 0
    kernel_init: Callable[..., Array] = KAIMING
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape)
        x = x.astype(kernel.dtype)
        if x.shape[1:3] == (1, 1):  # one window
            y = jnp.einsum("BI,XYIO->BXYO", x[:, 0, 0], kernel)
        else:
            y = self.windows(x, kernel)
        rows, columns = (
            (length - 1) * self.stride + self.size - 2 * self.padding + self.more
            for length in x.shape[1:3]
        )
        first = self.padding
        # Pixels at the end may lie beyond all windows.
        beyond = [
            (0, max(first + wanted - there, 0))
            for wanted, there in zip((rows, columns), y.shape[1:3], strict=True)
        ]
        y = jnp.pad(y, ((0, 0), *beyond, (0, 0)))[:, first : first + rows, first : first + columns]
        if self.use_bias:
            y = add_bias(
                y.astype(jnp.float32),
                parameter(self, "bias", nn.initializers.zeros, (self.features,)),
            )
        return mark_product(y.astype(x.dtype))

    def windows(self, x: Array, kernel: Array) -> Array:
        """The sum of all windows, nothing left out: [B, X, Y, I] -> [B, X', Y', O]."""
        stride = self.stride
        reach = -(-self.size // stride)  # pixels of the image whose windows one pixel is in
        zeros = reach * stride - self.size
        kernel = jnp.pad(kernel, ((0, zeros), (0, zeros), (0, 0), (0, 0)))
        parts = kernel.reshape(reach, stride, reach, stride, *kernel.shape[2:])[::-1, :, ::-1]
        phases = parts.transpose(0, 2, 4, 5, 1, 3)  # [reach, reach, I, O, stride, stride]
        phases = phases.reshape(*phases.shape[:3], -1)
        around = (reach - 1, reach - 1)
        y = convolution(x, phases, stride=1, around=(around, around))
        return shuffle_pixels(y, stride)


def enlarged(x: Array, times: int = 2) -> Array:
    """Every pixel as a square of them: [B, X, Y, C] -> [B, X * times, Y * times, C]."""
    return jnp.repeat(jnp.repeat(x, times, axis=1), times, axis=2)


def half_a_window(size: int | tuple[int, ...]) -> Around:
    """Zeros on each side alike, by which an image keeps its size."""
    rows, columns = pair(size)
    return (rows // 2, rows // 2), (columns // 2, columns // 2)


def same_padding(image: tuple[int, ...], size: int | tuple[int, ...], stride: int) -> Around:
    """TensorFlow's "SAME": as many windows as strides fit, an odd zero at the end.

    Args:
        image: its rows and columns.
        size: of the window.
        stride: between windows.
    """
    total = [
        max((-(-length // stride) - 1) * stride + seen - length, 0)
        for length, seen in zip(image, pair(size), strict=True)
    ]
    rows, columns = ((zeros // 2, zeros - zeros // 2) for zeros in total)
    return rows, columns


class ConvNorm(nn.Module):
    """A convolution, batch normalisation, and an activation.

    Args:
        features, size, stride, kernel_init, around, groups, dilation: see `Conv`.
        act: name of the activation, as in config.json; None for none.
        train: whether the batch's own statistics are used.
        epsilon, momentum: of the normalisation.
        norm: makes the normalisation, ``norm(train, epsilon, momentum, name=...)``.
    """

    features: int
    size: int | tuple[int, int]
    stride: int = 1
    act: str | None = None
    train: bool = False
    epsilon: float = 1e-5
    momentum: float = 0.1
    kernel_init: Callable[..., Array] = KAIMING
    around: Around | None = None
    groups: int = 1
    dilation: int = 1
    norm: Callable[..., nn.Module] = BatchNorm

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, X, Y, I] -> [B, X', Y', O]
        x = Conv(
            self.features,
            self.size,
            self.stride,
            self.kernel_init,
            around=self.around,
            groups=self.groups,
            dilation=self.dilation,
            name="conv",
        )(x)
        x = self.norm(self.train, self.epsilon, self.momentum, name="norm")(x)
        return x if self.act is None else activation(self.act)(x)


def squeeze_excite(x: Array, width: int, act: str, kernel_init: Callable[..., Array]) -> Array:
    """Features scaled by what their means say (Hu et al. 2017, arXiv:1709.01507).

    Called in a compact method: its convolutions are the modules "squeeze" and "excite" there.

    Args:
        x: [B, X, Y, C].
        width: features between the two.
        act: name of the activation between them.
        kernel_init: initializer of their kernels.
    """
    y = average(x)[:, None, None]
    y = Conv(width, 1, kernel_init=kernel_init, use_bias=True, name="squeeze")(y)
    y = activation(act)(y)
    y = Conv(x.shape[-1], 1, kernel_init=kernel_init, use_bias=True, name="excite")(y)
    return x * jax.nn.sigmoid(y)


def average(x: Array) -> Array:
    """The mean over all pixels, in x's dtype: [B, X, Y, C] -> [B, C]."""
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2)).astype(x.dtype)


def max_pool(x: Array, size: int, stride: int, padding: int | Around = 0) -> Array:
    """The largest value of each square window; padding never is: [B, X, Y, C] -> [B, X', Y', C].

    It has reverse-mode derivatives alone (`jax.grad`, `jax.vjp`).

    Args:
        x: images.
        size: of the window.
        stride: between windows.
        padding: on all sides, or as a convolution's.

    Raises:
        ValueError: images are smaller than a window.
    """
    around = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
    check_fit(x.shape[1:3], (size, size), around)

    def along_both(x: Array) -> Array:
        for axis, ends in ((2, around[1]), (1, around[0])):
            x = _maxima(x, axis, size, stride, ends)
        return x

    return jax.lax.platform_dependent(
        x,
        # XLA's CPU gradient of a window's maximum takes 15 times as long (measured: 53 ms against
        # 3 ms for [128, 28, 28, 32] and windows of 2).
        cpu=along_both,
        default=partial(_window_maxima, size=size, stride=stride, around=around),
    )


def last_window(image: tuple[int, ...], size: int, stride: int) -> Around:
    """What lets a window at the end of an image reach over it, PyTorch's "ceil_mode"."""
    over = [-(length - size) % stride for length in image]
    # Not if it would begin outside.
    rows, columns = ((0, zeros if zeros < size else 0) for zeros in over)
    return rows, columns


def average_pool(
    x: Array, size: int, stride: int, padding: int = 0, *, count_padding: bool = True
) -> Array:
    """The mean of each square window: [B, X, Y, C] -> [B, X', Y', C].

    Args:
        x: images.
        size: of the window.
        stride: between windows.
        padding: zeros on all sides.
        count_padding: whether they count, as in PyTorch; TensorFlow takes the mean of the rest.

    Raises:
        ValueError: images are smaller than a window.
    """
    ends = (padding, padding)
    check_fit(x.shape[1:3], (size, size), (ends, ends))
    around = ((0, 0), ends, ends, (0, 0))
    total = reduce(jnp.add, shifts(jnp.pad(x.astype(jnp.float32), around), size, stride))
    count: Any = size**2
    if not count_padding:
        ones = np.pad(np.ones((1, *x.shape[1:3], 1), np.float32), around)
        count = reduce(np.add, shifts(ones, size, stride))
    return (total / count).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _maxima(x: Array, axis: int, size: int, stride: int, ends: tuple[int, int]) -> Array:
    """The larger, each time, of the image and of itself shifted along an axis.

    Equal pixels: the first has the gradient, as in PyTorch. What JAX derives from the maxima is a
    sum of images with zeros between their pixels, for each of which XLA makes all comparisons anew
    (measured, along both axes: 138 ms against 26 ms for [8, 112, 112, 64], windows of 3, stride 2).
    """
    return _maxima_forward(x, axis, size, stride, ends)[0]


def _maxima_forward(
    x: Array, axis: int, size: int, stride: int, ends: tuple[int, int]
) -> tuple[Array, Any]:
    padded = _pad(x, axis, ends, -jnp.inf)
    reach = (padded.shape[axis] - size) // stride * stride + 1
    largest, place = jnp.full((), -jnp.inf, x.dtype), jnp.zeros((), x.dtype)
    for i in range(size):
        seen = jax.lax.slice_in_dim(padded, i, i + reach, stride, axis)
        place = jnp.where(seen > largest, jnp.asarray(i, x.dtype), place)
        largest = jnp.maximum(seen, largest)
    return largest, (place, x)  # x for its shape


def _maxima_backward(
    axis: int, size: int, stride: int, ends: tuple[int, int], saved: Any, g: Array
) -> tuple[Array]:
    place, x = saved
    windows, length = g.shape[axis], x.shape[axis]
    count = -(-(sum(ends) + length) // stride)
    phases = []  # every `stride`-th pixel, from each of the first on
    for first in range(stride):
        total = jnp.zeros((*g.shape[:axis], count, *g.shape[axis + 1 :]), g.dtype)
        for i in range(first, size, stride):
            before = i // stride
            chosen = jnp.where(place == i, g, 0)
            total += _pad(chosen, axis, (before, count - before - windows), 0)
        phases.append(total)
    dx = jnp.stack(phases, axis + 1)
    dx = dx.reshape(*g.shape[:axis], count * stride, *g.shape[axis + 1 :])
    return (jax.lax.slice_in_dim(dx, ends[0], ends[0] + length, axis=axis),)


_maxima.defvjp(_maxima_forward, _maxima_backward)


def _pad(x: Array, axis: int, ends: tuple[int, int], value: float) -> Array:
    around = [ends if i == axis else (0, 0) for i in range(x.ndim)]
    return jnp.pad(x, around, constant_values=value)


def _window_maxima(x: Array, *, size: int, stride: int, around: Around) -> Array:
    return jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        (1, size, size, 1),
        (1, stride, stride, 1),
        ((0, 0), *around, (0, 0)),
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
