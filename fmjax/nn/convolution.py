"""The convolution of images, channels last, on each platform in the way that it is fast at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.nn.product import SLOW, gram, gram_on_cpu, matmul, moved, transposed
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


def _kept(of: Callable[..., Any]) -> Callable[..., tuple[Array, tuple[Array, Array]]]:
    """The forward pass of a function of two arrays and options, which keeps both arrays."""
    return lambda a, b, *options: (of(a, b, *options), (a, b))


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


_shifted_products.defvjp(_kept(_shifted_products), _products_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolution_on_cpu(
    x: Array, kernel: Array, stride: Stride, around: Around, dilation: int
) -> Array:
    """Without groups; below float32, in which XLA computes its own, by products of rows."""
    if x.dtype == jnp.float32 or x.shape[-1] < BROAD:
        return _convolution(x, kernel, stride=stride, around=around, dilation=dilation)
    return _by_rows(x, kernel, stride, around, dilation)


def _by_rows(x: Array, kernel: Array, stride: Stride, around: Around, dilation: int) -> Array:
    """A product for each row of the window, whose columns are put side by side."""
    size = kernel.shape[:2]
    parts = moved(lambda x: _rows_seen(_padded(x, around), size, stride, dilation), x)
    rows = moved(lambda kernel: list(kernel.reshape(size[0], -1, kernel.shape[-1])), kernel)
    total = jnp.zeros((), jnp.float32)
    for part, row in zip(parts, rows, strict=True):
        total = total + matmul(part, row)
    return total.astype(x.dtype)


def _rows_seen(x: Array, size: tuple[int, ...], stride: Stride, dilation: int) -> list[Array]:
    """What each row of a window sees, its columns side by side: [B, X', Y', Y * C] of each."""
    down, across = pair(stride)
    columns = list(shifts(x, (1, size[1]), (1, across), dilation))
    beside = jnp.stack(columns, -2).reshape(*columns[0].shape[:3], -1)
    return list(shifts(beside, (size[0], 1), (down, 1), dilation))


def _backward(
    stride: Stride, around: Around, dilation: int, saved: Any, g: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    return (
        _of_image(kernel, g, x.shape, stride, around, dilation),
        _of_kernel(x, g, kernel.shape[:2], stride, around, dilation),
    )


_convolution_on_cpu.defvjp(_kept(_convolution_on_cpu), _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _of_image(
    kernel: Array,
    g: Array,
    shape: tuple[int, ...],
    stride: Stride,
    around: Around,
    dilation: int,
) -> Array:
    """The gradient of an image of this shape: [B, X, Y, I].

    It is linear in both its operands, as the convolution and the kernel's gradient are: the three
    are each other's derivatives, of any order. (A gradient of XLA's own gradient takes five times
    as long, measured for a critic's penalty at [64, 32, 32].)
    """
    if g.dtype != jnp.float32 and (
        g.shape[-1] >= BROAD if pair(stride) == (1, 1) else shape[-1] > THIN and dilation == 1
    ):
        return _image_by_rows(kernel, g, shape, stride, around, dilation)
    of_x = partial(_convolution, kernel=kernel, stride=stride, around=around, dilation=dilation)
    (dx,) = jax.linear_transpose(of_x, jax.ShapeDtypeStruct(shape, g.dtype))(g)
    return dx


def _of_image_backward(
    shape: tuple[int, ...], stride: Stride, around: Around, dilation: int, saved: Any, x: Array
) -> tuple[Array, Array]:
    kernel, g = saved
    return (
        _of_kernel(x, g, kernel.shape[:2], stride, around, dilation),
        _convolution_on_cpu(x, kernel, stride, around, dilation),
    )


_of_image.defvjp(_kept(_of_image), _of_image_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _of_kernel(
    x: Array, g: Array, size: tuple[int, ...], stride: Stride, around: Around, dilation: int
) -> Array:
    """The gradient of a kernel of this size: [X, Y, I, O], a product for each place of a window.

    XLA's takes up to twice as long (measured: 34 ms against 19 ms for [128, 14, 14, 32] and 64
    features).
    """
    low = x.dtype != jnp.float32
    whole = _padded_to(x.shape, stride, around)
    larger = math.prod(whole) / math.prod(pair(stride)) > 1.5 * math.prod(g.shape[1:3])
    if low and x.shape[-1] > THIN and not larger:
        products = _transposed_once(x, size, g, stride, around, dilation)
    else:

        def seen(x: Array) -> list[Array]:
            x = _padded(x, around)
            if x.shape[-1] > THIN:
                parts = list(shifts(x, size, stride, dilation))
            else:
                parts = [jnp.concatenate(_rows_seen(x, size, stride, dilation), -1)]
            return [part.reshape(-1, part.shape[-1]) for part in parts]

        product = gram_on_cpu if low else gram
        rows = g.reshape(-1, g.shape[-1])  # [N, O]
        products = [product(part, rows) for part in moved(seen, x)]
    flat = jnp.concatenate(products)  # [X * Y * I, O]
    return flat.reshape(*size, x.shape[-1], g.shape[-1]).astype(x.dtype)


def _of_kernel_backward(
    size: tuple[int, ...], stride: Stride, around: Around, dilation: int, saved: Any, kernel: Array
) -> tuple[Array, Array]:
    x, g = saved
    return (
        _of_image(kernel, g, x.shape, stride, around, dilation),
        _convolution_on_cpu(x, kernel, stride, around, dilation),
    )


_of_kernel.defvjp(_kept(_of_kernel), _of_kernel_backward)


def _image_by_rows(
    kernel: Array,
    g: Array,
    shape: tuple[int, ...],
    stride: Stride,
    around: Around,
    dilation: int,
) -> Array:
    """`_of_image` by products of rows.

    At a stride of S the image's rows fall into S kinds, which meet other rows of the kernel each,
    and so do its columns: of each kind it is a convolution of g with its part of the kernel, turned
    about. (XLA puts zeros between g's pixels.)
    """
    (batch, *image, features), steps = shape, pair(stride)
    sides = [-(-length // step) for length, step in zip(image, steps, strict=True)]

    def of_kind(kind: tuple[int, ...]) -> Array:
        met, zeros = [], []
        for axis, (step, (before, _)) in enumerate(zip(steps, around, strict=True)):
            further, first = divmod(kind[axis] + before, step)
            met.append(range(first, kernel.shape[axis], step))
            start = dilation * (len(met[axis]) - 1) - further
            zeros.append((start, sides[axis] - g.shape[1 + axis] + further))
        if not all(met):
            return jnp.zeros((batch, *sides, features), g.dtype)
        rows, columns = (slice(places.start, None, places.step) for places in met)
        turned = moved(lambda k: k[rows, columns][::-1, ::-1].swapaxes(2, 3), kernel)
        return _by_rows(g, turned, 1, (zeros[0], zeros[1]), dilation)

    kinds = [of_kind(kind) for kind in np.ndindex(*steps)]
    if len(kinds) == 1:
        return kinds[0]

    def between(*kinds: Array) -> Array:
        parts = jnp.stack(kinds).reshape(*steps, batch, *sides, features)
        whole = parts.transpose(2, 3, 0, 4, 1, 5).reshape(
            batch, sides[0] * steps[0], sides[1] * steps[1], features
        )
        return whole[:, : image[0], : image[1]]

    return moved(between, *kinds)


def _transposed_once(
    x: Array,
    size: tuple[int, ...],
    g: Array,
    stride: Stride,
    around: Around,
    dilation: int,
) -> list[Array]:
    """`_of_kernel`'s product for each place of a window: [I, O] each.

    With the image's pixels one after another, and the gradient's at the same places, each place of
    the window sees the image some pixels further on: one transpose serves them all (measured on one
    core: 33 ms against 16 ms for [8, 56, 56, 64], 14 against 8 for [8, 14, 14, 256]). At a stride
    of S x S these are S * S images. The products of the zeros are in vain, so it is not for images
    that they make much larger.
    """
    (down, across), whole = pair(stride), _padded_to(x.shape, stride, around)
    places = [(dilation * row, dilation * column) for row, column in np.ndindex(*size)]
    kinds = [(row % down, column % across) for row, column in places]
    length = whole[1] // across
    further = [row // down * length + column // across for row, column in places]

    def images(x: Array) -> dict[tuple[int, int], Array]:
        sides = zip(x.shape[1:3], whole, around, strict=True)
        padded = _padded(x, [(start, side - length - start) for length, side, (start, _) in sides])
        parts = {kind: padded[:, kind[0] :: down, kind[1] :: across] for kind in set(kinds)}
        return {kind: part.reshape(-1, part.shape[-1]) for kind, part in parts.items()}

    pixels = {kind: transposed(image) for kind, image in moved(images, x).items()}  # [I, N]
    features = x.shape[-1]
    if features == SLOW:
        more = [(0, 8), (0, 0)]
        pixels = {kind: moved(lambda a: jnp.pad(a, more), part) for kind, part in pixels.items()}

    def behind(g: Array) -> dict[int, Array]:
        """The gradient's pixels [N, O], after as many others as a place is further on."""
        last = max(further)
        over = [(0, whole[0] // down - g.shape[1]), (0, length - g.shape[2])]
        rows = _padded(g, over).reshape(-1, g.shape[-1])
        count = len(rows)
        rows = jnp.pad(rows, ((last, 0), (0, 0)))
        return {start: rows[last - start :][:count] for start in set(further)}

    rows = moved(behind, g)
    return [
        jnp.dot(pixels[kind], rows[start], preferred_element_type=jnp.float32)[:features]
        for kind, start in zip(kinds, further, strict=True)
    ]


def _padded(x: Array, around: Sequence[tuple[int, int]]) -> Array:
    """x with zeros around it; of a negative number, pixels are left out."""
    sides = [(before, after, 0) for before, after in around]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *sides, (0, 0, 0)])


def _padded_to(shape: tuple[int, ...], stride: Stride, around: Around) -> tuple[int, int]:
    """Rows and columns of an image with the zeros around it and to a whole number of strides."""
    rows, columns = (
        -(-(length + sum(ends)) // step) * step
        for length, ends, step in zip(shape[1:3], around, pair(stride), strict=True)
    )
    return rows, columns


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
