"""Invertible changes of layout between a checkpoint's tensors and a model's parameters.

`load` takes a rule's tensors to its parameters and `save` takes them back; the `_shapes` twins do
the same to shapes, so that everything can be checked before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fmjax.weights.tensor import Shape

T = TypeVar("T")
Arrays = Sequence[np.ndarray]
Shapes = Sequence[Shape]


@dataclass(frozen=True)
class Transform:
    """A pair of inverse functions on lists of arrays, and what they do to shapes.

    Attributes:
        name: for errors.
        load: a rule's tensors -> its parameters, as views where possible.
        save: its parameters -> its tensors.
        load_shapes: their shapes; ValueError where `load` does not apply.
        save_shapes: their shapes; ValueError where `save` does not apply.
        each: where all that `load` does is to stack the tensors, what it does to each before.
    """

    name: str
    load: Callable[[Arrays], list[np.ndarray]]
    save: Callable[[Arrays], list[np.ndarray]]
    load_shapes: Callable[[Shapes], list[Shape]]
    save_shapes: Callable[[Shapes], list[Shape]]
    each: Transform | None = None


def _same(given: Sequence[T]) -> list[T]:
    return list(given)


IDENTITY = Transform("identity", _same, _same, _same, _same)


def permute(*axes: int) -> Transform:
    """Axes in another order, as `numpy.transpose` takes them; of each tensor of the rule."""
    name = f"permute{axes}"
    if sorted(axes) != list(range(len(axes))):
        raise ValueError(f"{name}: axes must be 0 to {len(axes) - 1} in some order")
    inverse = tuple(axes.index(axis) for axis in range(len(axes)))

    def arrays(order: tuple[int, ...]) -> Callable[[Arrays], list[np.ndarray]]:
        return lambda given: [array.transpose(order) for array in given]

    def shapes(order: tuple[int, ...]) -> Callable[[Shapes], list[Shape]]:
        def permuted(given: Shapes) -> list[Shape]:
            for shape in given:
                if len(shape) != len(order):
                    raise ValueError(f"{name} needs {len(order)} axes, not {shape}")
            return [tuple(shape[axis] for axis in order) for shape in given]

        return permuted

    return Transform(name, arrays(axes), arrays(inverse), shapes(axes), shapes(inverse))


TRANSPOSE = permute(1, 0)  # Linear [O, I] -> [I, O]
CONV1D = permute(2, 1, 0)  # [O, I, X] -> [X, I, O]
CONV2D = permute(2, 3, 1, 0)  # [O, I, X, Y] -> [X, Y, I, O]


def fused(parts: int | Sequence[int], axis: int = 0) -> Transform:
    """One tensor that holds several parameters one after another along an axis.

    Args:
        parts: how many of equal size, or their sizes (grouped-query attention: H, G, G heads).
        axis: of the tensor, >= 0.
    """
    name = f"fused({parts}, axis={axis})"
    count = parts if isinstance(parts, int) else len(parts)
    if count < 1 or axis < 0:
        raise ValueError(f"{name}: needs at least one part and an axis >= 0")

    def sizes(size: int) -> list[int]:
        split = [size // count] * count if isinstance(parts, int) else list(parts)
        if sum(split) != size:
            raise ValueError(f"{name} does not divide an axis of {size}")
        return split

    def load(tensors: Arrays) -> list[np.ndarray]:
        (tensor,) = tensors
        return np.split(tensor, np.cumsum(sizes(tensor.shape[axis]))[:-1], axis=axis)

    def save(params: Arrays) -> list[np.ndarray]:
        return [np.concatenate(params, axis=axis)]

    def load_shapes(given: Shapes) -> list[Shape]:
        (shape,) = _exactly(name, given, 1)
        _has_axis(name, shape, axis)
        return [_resized(shape, axis, size) for size in sizes(shape[axis])]

    def save_shapes(given: Shapes) -> list[Shape]:
        for shape in _exactly(name, given, count):
            _has_axis(name, shape, axis)
        total = sum(shape[axis] for shape in given)
        if list(given) != [_resized(given[0], axis, size) for size in sizes(total)]:
            raise ValueError(f"{name}: its parameters have the shapes {list(given)}")
        return [_resized(given[0], axis, total)]

    return Transform(name, load, save, load_shapes, save_shapes)


def fused_per_head(parts: int | Sequence[int], num_heads: int, axis: int = 0) -> Transform:
    """One tensor that holds several parameters interleaved head by head (GPT-NeoX, BLOOM).

    The axis is laid out [H, parts, K] and gives `parts` parameters of [H * K].

    Args:
        parts: how many parameters; or, where heads come in groups, how many heads of a group each
            has: (H / G, 1, 1) is Falcon 40B's query, key and value, laid out [G, H / G + 2, K].
        num_heads: H, or G.
        axis: of the tensor, >= 0.
    """
    name = f"fused_per_head({parts}, num_heads={num_heads}, axis={axis})"
    counts = [1] * parts if isinstance(parts, int) else list(parts)
    if not counts or min(counts) < 1 or num_heads < 1 or axis < 0:
        raise ValueError(f"{name}: needs at least one part, one head and an axis >= 0")

    def load(tensors: Arrays) -> list[np.ndarray]:
        (tensor,) = tensors
        before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
        size = tensor.shape[axis] // (sum(counts) * num_heads)
        heads = tensor.reshape(*before, num_heads, sum(counts), size, *after)
        split = np.split(heads, np.cumsum(counts)[:-1], axis=axis + 1)
        return [
            part.reshape(*before, num_heads * count * size, *after)
            for part, count in zip(split, counts, strict=True)
        ]

    def save(params: Arrays) -> list[np.ndarray]:
        shape = params[0].shape
        before, after = shape[:axis], shape[axis + 1 :]
        size = shape[axis] // (counts[0] * num_heads)
        heads = [
            param.reshape(*before, num_heads, count, size, *after)
            for param, count in zip(params, counts, strict=True)
        ]
        total = num_heads * sum(counts) * size
        return [np.concatenate(heads, axis=axis + 1).reshape(_resized(shape, axis, total))]

    def load_shapes(given: Shapes) -> list[Shape]:
        (shape,) = _exactly(name, given, 1)
        _has_axis(name, shape, axis)
        if shape[axis] % (sum(counts) * num_heads):
            raise ValueError(f"{name} does not divide axis {axis} of {shape}")
        unit = shape[axis] // sum(counts)
        return [_resized(shape, axis, unit * count) for count in counts]

    def save_shapes(given: Shapes) -> list[Shape]:
        shape = _exactly(name, given, len(counts))[0]
        _has_axis(name, shape, axis)
        unit = shape[axis] // counts[0]
        if unit % num_heads or list(given) != [
            _resized(shape, axis, unit * count) for count in counts
        ]:
            raise ValueError(f"{name}: its parameters have the shapes {list(given)}")
        return [_resized(shape, axis, sum(counts) * unit)]

    return Transform(name, load, save, load_shapes, save_shapes)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def _add_one(tensors: Arrays) -> list[np.ndarray]:
    """Half precision becomes float32: there, 1 + w would lose most of w."""
    return [_wide(tensor) + 1 for tensor in tensors]


def _subtract_one(params: Arrays) -> list[np.ndarray]:
    return [(_wide(param) - 1).astype(param.dtype) for param in params]


# Gemma's norms multiply by 1 + weight.
PLUS_ONE = Transform("plus_one", _add_one, _subtract_one, _same, _same)


def plus(number: float) -> Transform:
    """A constant added."""

    def add(sign: int) -> Callable[[Arrays], list[np.ndarray]]:
        return lambda given: [
            (array.astype(np.float64) + sign * number).astype(array.dtype) for array in given
        ]

    return Transform(f"plus({number})", add(1), add(-1), _same, _same)


def _subtract(tensors: Arrays) -> list[np.ndarray]:
    first, second = tensors
    return [(first.astype(np.float64) - second).astype(first.dtype)]


def _alike(given: Shapes) -> list[Shape]:
    if len(set(given)) != 1:
        raise ValueError(f"arrays to subtract have the shapes {list(given)}")
    return [given[0]]


# Of two tensors; what was subtracted cannot be told any more, and is zero when saved.
DIFFERENCE = Transform(
    "difference",
    _subtract,
    lambda params: [params[0], np.zeros_like(params[0])],
    lambda shapes: _alike(_exactly("difference", shapes, 2)),
    lambda shapes: [shapes[0], shapes[0]],
)
# One tensor as the second of two parameters, of which the first is all ones.
BESIDE_ONES = Transform(
    "beside_ones",
    lambda tensors: [np.ones_like(tensors[0]), tensors[0]],
    lambda params: [params[1]],
    lambda shapes: _exactly("beside_ones", shapes, 1) * 2,
    lambda shapes: [_exactly("beside_ones", shapes, 2)[1]],
)


def channels_first(rows: int, columns: int) -> Transform:
    """The kernel of a dense layer over a flattened image: [X * Y * C, O] -> [C * X * Y, O]."""
    name = f"channels_first({rows}, {columns})"

    def load(tensors: Arrays) -> list[np.ndarray]:
        (tensor,) = tensors
        image = tensor.reshape(rows, columns, -1, tensor.shape[1])
        return [image.transpose(2, 0, 1, 3).reshape(tensor.shape)]

    def save(params: Arrays) -> list[np.ndarray]:
        (param,) = params
        image = param.reshape(-1, rows, columns, param.shape[1])
        return [image.transpose(1, 2, 0, 3).reshape(param.shape)]

    def shapes(given: Shapes) -> list[Shape]:
        (shape,) = _exactly(name, given, 1)
        if len(shape) != 2 or shape[0] % (rows * columns):
            raise ValueError(f"{name} does not divide {shape}")
        return [shape]

    return Transform(name, load, save, shapes, shapes)


def compose(first: Transform, *others: Transform) -> Transform:
    """Transforms one after another: loading applies `first` first."""
    result = first
    for other in others:
        result = _then(result, other)
    return result


def _then(first: Transform, second: Transform) -> Transform:
    return Transform(
        f"{first.name} then {second.name}",
        lambda tensors: second.load(first.load(tensors)),
        lambda params: first.save(second.save(params)),
        lambda shapes: second.load_shapes(first.load_shapes(shapes)),
        lambda shapes: first.save_shapes(second.save_shapes(shapes)),
    )


def inverted(transform: Transform) -> Transform:
    """The other way round: ``inverted(fused(3))`` joins three tensors in one parameter."""
    return Transform(
        f"inverted {transform.name}",
        transform.save,
        transform.load,
        transform.save_shapes,
        transform.load_shapes,
    )


def stacked(each: Transform = IDENTITY) -> Transform:
    """Many tensors of one shape as one parameter with a leading axis: the experts of a layer.

    Args:
        each: applied to every tensor; takes one to one.
    """
    name = f"stacked({each.name})"

    def load(tensors: Arrays) -> list[np.ndarray]:
        return [np.stack([each.load([tensor])[0] for tensor in tensors])]

    def save(params: Arrays) -> list[np.ndarray]:
        (param,) = params
        return [each.save([expert])[0] for expert in param]

    def load_shapes(given: Shapes) -> list[Shape]:
        if not given or any(shape != given[0] for shape in given):
            raise ValueError(f"{name} needs tensors of one shape, not {list(given)}")
        return [(len(given), *_exactly(name, each.load_shapes([given[0]]), 1)[0])]

    def save_shapes(given: Shapes) -> list[Shape]:
        (shape,) = _exactly(name, given, 1)
        _has_axis(name, shape, 0)
        return _exactly(name, each.save_shapes([shape[1:]]), 1) * shape[0]

    return Transform(name, load, save, load_shapes, save_shapes, each)


def _exactly(name: str, shapes: Shapes, count: int) -> list[Shape]:
    if len(shapes) != count:
        raise ValueError(f"{name} is for {count} arrays, not {len(shapes)}")
    return list(shapes)


def _has_axis(name: str, shape: Shape, axis: int) -> None:
    if axis >= len(shape):
        raise ValueError(f"{name} needs an axis {axis}, which {shape} lacks")


def _resized(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])
