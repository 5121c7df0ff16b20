"""Parameters that are kept in fewer bits or numbers than their arrays have.

They are leaves of variables where the arrays would be, and trees of arrays to JAX. Layers compute
what they need of them at the place where they need it: a whole array only inside a layer (of a
scanned model, of one layer at a time), rows of a table only those looked up, and factors as two
products.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from statistics import NormalDist
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.tree import flatten, unflatten
from fmjax.types import Variables

Self = TypeVar("Self", bound="Compact")


class Compact(abc.ABC):
    """What stands for an array; its `shape` and `dtype` are the array's."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The array's."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """The array's."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """How many parameters it is made of."""

    @abc.abstractmethod
    def array(self) -> Array:
        """The array."""

    @property
    def ndim(self) -> int:
        """The array's."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def astype(self: Self, dtype: Any) -> Self:
        """The same with what it keeps in floating point cast."""
        return jax.tree.map(
            lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
            self,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors(Compact):
    """A kernel [..., I, O] as a product of two.

    Args:
        down: [..., I, R].
        up: [..., R, O].
    """

    down: Array
    up: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.down.shape[:-1], self.up.shape[-1])

    @property
    def dtype(self) -> Any:
        return self.down.dtype

    @property
    def size(self) -> int:
        return self.down.size + self.up.size

    def array(self) -> Array:
        return jnp.matmul(self.down, self.up, precision="highest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(Compact):
    """An array as small integers and a scale for each group of them.

    Args:
        codes: int8 in the array's shape; of 4 bits uint8 with half as many along `axis`: see
            `packed`.
        scales: [..., G, O] or [..., G]: `axis` in G groups; of the array's dtype.
        bits: 8 or 4.
        axis: along which groups run: -2 of kernels, -1 of tables.
        normal: whether codes are places in `normal_levels`, not multiples of the scale.
    """

    codes: Array
    scales: Array
    bits: int = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    normal: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] *= 8 // self.bits
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        return self.scales.dtype

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def array(self) -> Array:
        codes = self.codes if self.bits == 8 else unpacked(self.codes, self.axis)
        if self.normal:
            values = jnp.asarray(normal_levels(), self.dtype)[codes + 8]
        else:
            values = codes.astype(self.dtype)
        groups = in_groups(values, self.scales.shape[self.axis], self.axis)
        return (groups * jnp.expand_dims(self.scales, self.axis)).reshape(self.shape)


def in_groups(values: Array, groups: int, axis: int) -> Array:
    """An axis (-1 or -2) as two: [..., I, O] -> [..., G, I / G, O]."""
    shape = values.shape
    split = (groups, shape[axis] // groups)
    return values.reshape(*shape[:axis], *split, *shape[axis:][1:])


def packed(codes: Array, axis: int) -> Array:
    """Codes in -8..7 two a byte: those of the first half of an axis in the low four bits.

    Halves, and not neighbours, lie together so that unpacking joins two blocks.
    """
    low, high = jnp.split((codes + 8).astype(jnp.uint8), 2, axis)
    return low | (high << 4)


def unpacked(pairs: Array, axis: int) -> Array:
    """The inverse of `packed`: int8."""
    codes = jnp.concatenate([pairs & 15, pairs >> 4], axis)
    return codes.astype(jnp.int8) - 8


@functools.cache
def normal_levels() -> tuple[float, ...]:
    """The 16 values of NF4, -1 to 1 with 0 among them: quantiles of a normal distribution, evenly
    spaced in probability on each side (Dettmers et al. 2023, arXiv:2305.14314, section 3 and
    appendix E).
    """
    # The outermost probability is the mean of those that 15 and 16 levels would leave out.
    edge = 1 - (1 / 30 + 1 / 32) / 2
    inverse = NormalDist().inv_cdf
    above = [inverse(p) for p in np.linspace(edge, 0.5, 9)[:-1]]  # 8 levels
    below = [-inverse(p) for p in np.linspace(edge, 0.5, 8)[:-1]]  # 7 levels
    return tuple(float(v) / above[0] for v in sorted([*above, 0.0, *below]))


def whole(leaf: Array | Compact) -> Array:
    """The array that a leaf is or stands for."""
    return leaf.array() if isinstance(leaf, Compact) else leaf


def whole_arrays(variables: Variables) -> Variables:
    """The variables with plain arrays alone, as files of models have them."""
    return unflatten({path: whole(leaf) for path, leaf in flatten(variables).items()})


def rows(table: Array | Compact, ids: Array) -> Array:
    """Rows of a table [V, D], of which no others are computed: [...] -> [..., D]."""
    return whole(jax.tree.map(lambda leaf: jnp.take(leaf, ids, axis=0), table))
