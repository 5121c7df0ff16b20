"""The convolution of images, channels last, on each platform in the way that it is fast at."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.nn.product import gram, gram_on_cpu, matmul, transposed
from fmjax.nn.vision import pair

# Features of an image up to which the places of a window are put side by side: a product for each
# would read the gradient as often, and have few rows.
THIN = 4
# Features of an image from which products are faster than XLA's convolution in bfloat16 (measured,
# windows of 3 x 3 and as many features, one core: 12 ms against 9 ms for [8, 56, 56, 64], 8 against
# 9 for [8, 28, 28, 128], 6 against 9 for [8, 14, 14, 256], 5 against 12 for [8, 7, 7, 512]).
BROAD = 128
# Places of a window beyond which a product for each takes longer than XLA's own gradient (measured:
# 464 ms against 73 ms for [16, 125, 40, 32] and windows of 11 x 11), and long to compile.
WIDE = 49
Around = tuple[tuple[int, int], tuple[int, int]]
"""Zeros before and after the rows, and before and after the columns."""
Stride = int | tuple[int, int]


def convolution(
    x: Array, kernel: Array, *, stride: Stride, around: Around, groups: int = 1, dilation: int = 1
) -> Array:
    """A convolution: [B, X, Y, I] -> [B, X', Y', O].

    Args:
        x: images.
        kernel: [X, Y, I / groups, O], in x's dtype.
        stride: pixels between windows, one number or along rows and columns.
        around: zeros put before and after the rows, and the columns; of a negative number, pixels
            are left out.
        groups: I and O fall into as many parts, each convolved by itself.
        dilation: pixels from one place of a window to the next.

    Raises:
        ValueError: images are smaller than a window.
    """
    check_fit(x.shape[1:3], window(kernel.shape[:2], dilation), around)
    options: dict[str, Any] = {
        "stride": stride, "around": around, "groups": groups, "dilation": dilation
    }  # fmt: skip
    return jax.lax.platform_dependent(
        x, kernel, cpu=partial(_on_cpu, **options), default=partial(_convolution, **options)
    )


def _convolution(
    x: Array, kernel: Array, *, stride: Stride, around: Around, groups: int = 1, dilation: int = 1
) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=pair(stride),
        padding=around,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _on_cpu(
    x: Array, kernel: Array, *, stride: Stride, around: Around, groups: int, dilation: int
) -> Array:
    """The same, each kind in the way that XLA's CPU backend is fast at.

    Groups of features at once take it four times as long as one after the other, and the gradient
    of their kernel ten times (measured: 1389 ms against 121 ms for [8, 28, 28, 192] in groups
    of 64).
    """
    if groups == 1 and kernel.shape[0] * kernel.shape[1] > WIDE:
        return _convolution(x, kernel, stride=stride, around=around, dilation=dilation)
    if groups == 1:
        return _convolution_on_cpu(x, kernel, stride, around, dilation)
    if groups == x.shape[-1] == kernel.shape[-1]:
        return _shifted_products(x, kernel, stride, around, dilation)
    one = partial(_convolution, stride=stride, around=around, dilation=dilation)
    parts = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    return jnp.concatenate([one(*part) for part in parts], -1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _shifted_products(
    x: Array, kernel: Array, stride: Stride, around: Around, dilation: int
) -> Array:
    """A convolution of each feature by itself: the sum of the shifted image times a row of the
    kernel each.

    Its gradients are written out, the kernel's as a loop: 49 sums side by side take XLA five times
    as long to compile and to run (measured: 404 ms against 57 ms for [8, 14, 14, 384]).
    """
    x = _padded(x, around)
    rows = kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)  # [X * Y, C]
    total = jnp.zeros((), jnp.float32)
    for part, row in zip(shifts(x, kernel.shape[:2], stride, dilation), rows, strict=True):
        total = total + part.astype(jnp.float32) * row
    return total.astype(x.dtype)


def _products_forward(
    x: Array, kernel: Array, stride: Stride, around: Around, dilation: int
) -> tuple[Array, Any]:
    return _shifted_products(x, kernel, stride, around, dilation), (x, kernel)


def _products_backward(
    stride: Stride, around: Around, dilation: int, saved: Any, g: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    whole = window(kernel.shape[:2], dilation)
    # Of the image: the same products, of the gradient's pixels as far apart as they came from.
    steps = pair(stride)
    spans = [(length - 1) * step + 1 for length, step in zip(g.shape[1:3], steps, strict=True)]
    before = [side - 1 - zeros for side, (zeros, _) in zip(whole, around, strict=True)]
    after = [
        length - span - start + side - 1
        for length, span, start, side in zip(x.shape[1:3], spans, before, whole, strict=True)
    ]
    nothing = (0, 0, 0)
    edges = [(start, end, step - 1) for start, end, step in zip(before, after, steps, strict=True)]
    spread = jax.lax.pad(g, jnp.zeros((), g.dtype), [nothing, *edges, nothing])
    dx: Array = _shifted_products(spread, kernel[::-1, ::-1], 1, ((0, 0), (0, 0)), dilation)
    # Of the kernel: the sum over what each of its places saw.
    padded = _padded(x, around)
    seen = (x.shape[0], *spans, x.shape[-1])

    columns = kernel.shape[1]

    def place(number: Array) -> Array:
        start = (0, number // columns * dilation, number % columns * dilation, 0)
        part = jax.lax.dynamic_slice(padded, start, seen)[:, :: steps[0], :: steps[1]]
        return jnp.sum(part.astype(jnp.float32) * g.astype(jnp.float32), axis=(0, 1, 2))

    dkernel = jax.lax.map(place, jnp.arange(kernel.shape[0] * columns))
    return dx.astype(x.dtype), dkernel.reshape(kernel.shape).astype(kernel.dtype)


_shifted_products.defvjp(_products_forward, _products_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolution_on_cpu(
    x: Array, kernel: Array, stride: Stride, around: Around, dilation: int
) -> Array:
    """Without groups; its kernel's gradient is a product for each place of the window.

    XLA's takes up to twice as long (measured: 34 ms against 19 ms for [128, 14, 14, 32] and 64
    features). Below float32 so is the convolution itself, which XLA computes in float32.
    """
    if x.dtype == jnp.float32 or x.shape[-1] < BROAD:
        return _convolution(x, kernel, stride=stride, around=around, dilation=dilation)
    return _by_rows(x, kernel, stride, around, dilation)


def _by_rows(x: Array, kernel: Array, stride: Stride, around: Around, dilation: int) -> Array:
    """A product for each row of the window, whose columns are put side by side."""
    x = _padded(x, around)
    columns = list(shifts(x, (1, kernel.shape[1]), (1, pair(stride)[1]), dilation))
    beside = jnp.stack(columns, -2).reshape(*columns[0].shape[:3], -1)  # [B, X, Y', Y * I]
    parts = shifts(beside, (kernel.shape[0], 1), (pair(stride)[0], 1), dilation)
    rows = kernel.reshape(kernel.shape[0], -1, kernel.shape[-1])
    total = jnp.zeros((), jnp.float32)
    for part, row in zip(parts, rows, strict=True):
        total = total + matmul(part, row)
    return total.astype(x.dtype)


def _forward(
    x: Array, kernel: Array, stride: Stride, around: Around, dilation: int
) -> tuple[Array, Any]:
    return _convolution_on_cpu(x, kernel, stride, around, dilation), (x, kernel)


def _backward(
    stride: Stride, around: Around, dilation: int, saved: Any, g: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    low = x.dtype != jnp.float32
    size = kernel.shape[:2]
    if low and pair(stride) == (1, 1) and g.shape[-1] >= BROAD:
        rows, columns = (
            (side - 1 - before, side - 1 - after)
            for side, (before, after) in zip(window(size, dilation), around, strict=True)
        )
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        dx = _by_rows(g, turned, stride, (rows, columns), dilation)
    else:
        of_x = partial(_convolution, kernel=kernel, stride=stride, around=around, dilation=dilation)
        (dx,) = jax.linear_transpose(of_x, x)(g)
    padded = _padded(x, around)
    if low and x.shape[-1] > THIN and pair(stride) == (1, 1) and 2 * padded.size < 3 * x.size:
        dkernel = _transposed_once(padded, g, size, dilation)
    else:
        parts = list(shifts(padded, size, stride, dilation))
        if x.shape[-1] <= THIN:
            parts = [jnp.concatenate(parts, axis=-1)]
        product = gram_on_cpu if low else gram
        g = g.reshape(-1, g.shape[-1])  # [N, O]
        dkernel = jnp.concatenate([product(part.reshape(-1, part.shape[-1]), g) for part in parts])
    return dx, dkernel.reshape(kernel.shape).astype(kernel.dtype)


def _transposed_once(padded: Array, g: Array, size: tuple[int, ...], dilation: int) -> Array:
    """The gradient of a kernel at stride 1 from an image with zeros around it: [X * Y * I, O].

    With its pixels one after another, and the gradient's at the same places, each place of the
    window sees the image some pixels further on: one transpose serves them all (measured on one
    core: 33 ms against 16 ms for [8, 56, 56, 64], 14 against 8 for [8, 14, 14, 256]). The products
    of the zeros are in vain, so it is not for images that they make much larger.
    """
    shape = padded.shape
    over = [whole - length for whole, length in zip(shape[1:3], g.shape[1:3], strict=True)]
    g = jnp.pad(g, ((0, 0), (0, over[0]), (0, over[1]), (0, 0))).reshape(-1, g.shape[-1])
    pixels = transposed(padded.reshape(-1, shape[-1]))  # [I, N]
    places = [
        dilation * (row * shape[2] + column) for row in range(size[0]) for column in range(size[1])
    ]
    count = pixels.shape[1] - places[-1]
    products = [
        jnp.dot(pixels[:, place : place + count], g[:count], preferred_element_type=jnp.float32)
        for place in places
    ]
    return jnp.concatenate(products)


_convolution_on_cpu.defvjp(_forward, _backward)


def _padded(x: Array, around: Around) -> Array:
    """x with zeros around it; of a negative number, pixels are left out."""
    sides = [(before, after, 0) for before, after in around]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *sides, (0, 0, 0)])


def check_fit(image: tuple[int, ...], whole: tuple[int, int], around: Around) -> None:
    """Refuses images in which there is no window.

    Args:
        image: its rows and columns.
        whole: those of a window, from one side to the other.
        around: see `convolution`.
    """
    sides = [length + sum(ends) for length, ends in zip(image, around, strict=True)]
    if any(length < seen for length, seen in zip(sides, whole, strict=True)):
        raise ValueError(
            f"images of {image[0]} x {image[1]}, with zeros around them {sides[0]} x {sides[1]}, "
            f"are smaller than a window of {whole[0]} x {whole[1]}; give larger images"
        )


def window(size: int | tuple[int, ...], dilation: int) -> tuple[int, int]:
    """Pixels from one side of a window to the other, (rows, columns)."""
    rows, columns = pair(size)
    return dilation * (rows - 1) + 1, dilation * (columns - 1) + 1


def shifts(x: Any, size: int | tuple[int, ...], stride: Stride, dilation: int = 1) -> Iterator[Any]:
    """What each place of a window sees, row by row: [B, X', Y', C], as often as it has pixels."""
    whole = window(size, dilation)
    down, across = pair(stride)
    rows, columns = (
        (length - seen) // step * step + 1
        for length, seen, step in zip(x.shape[1:3], whole, (down, across), strict=True)
    )
    for i in range(0, whole[0], dilation):
        for j in range(0, whole[1], dilation):
            yield x[:, i : i + rows : down, j : j + columns : across]
