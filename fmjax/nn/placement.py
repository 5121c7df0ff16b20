"""Where activations live on a mesh of devices: axes by name, in blocks that know no mesh.

A step that runs under ``jax.set_mesh`` finds its mesh here; without one nothing is said and nothing
costs. Mesh axes are named by what they are for, and each of them may be missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

DATA = "data"
"""Examples: each device has the whole state."""
FSDP = "fsdp"
"""Examples too, but parameters and moments are in parts, gathered where they are used."""
TENSOR = "tensor"
"""Heads and inner widths."""
EXPERT = "expert"
"""Examples, and the experts of a mixture."""
BATCH = (DATA, FSDP, EXPERT)
"""What a batch's examples are laid over."""


def on_a_mesh() -> bool:
    """Whether there is a mesh to lay arrays over."""
    return bool(jax.sharding.get_abstract_mesh().auto_axes)


def axis_size(name: str) -> int:
    """How many parts the current mesh has along an axis; 1 where it has none, or no say in it."""
    mesh = jax.sharding.get_abstract_mesh()
    # Inside shard_map an axis is manual: what is seen there is a part already.
    return mesh.shape[name] if name in mesh.auto_axes else 1


def parts_over(names: Collection[str]) -> int:
    """How many parts the current mesh divides something into that lies over these axes."""
    return math.prod(map(axis_size, names))


def divided_over(names: Collection[str]) -> tuple[str, ...]:
    """Those of the names that the current mesh has, in its order."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in mesh.auto_axes if name in names and mesh.shape[name] > 1)


def constrain(x: Array, *axes: Any) -> Array:
    """The same array, laid over the current mesh; where there is none, x itself.

    Args:
        x: any array.
        axes: of each axis of x, the mesh axis or axes (a tuple) that divide it, None for none, or
            ``PartitionSpec.UNCONSTRAINED``, which leaves it to the compiler; further axes of x are
            not divided. Mesh axes that there are not are left out, and an axis of x that does not
            divide by the parts is left to the compiler.
    """
    if not on_a_mesh():
        return x
    spec: list[Any] = []
    for size, names in zip(x.shape, axes, strict=False):
        if names is P.UNCONSTRAINED:
            spec.append(names)
            continue
        names = () if names is None else (names,) if isinstance(names, str) else names
        there = divided_over(names)
        spec.append(there if size % parts_over(there) == 0 else P.UNCONSTRAINED)
    return jax.lax.with_sharding_constraint(x, P(*spec))


def constrain_examples(x: Array) -> Array:
    """Divides the leading axis alone, [B, ...]: what goes from block to block."""
    return constrain(x, BATCH) if x.ndim else x


def constrain_heads(x: Array, name: str) -> Array:
    """Divides examples and heads of queries, keys or values [B, T, H, K].

    Args:
        x: the heads.
        name: what they are, for the error.

    Raises:
        ValueError: the heads do not divide by the mesh's tensor axis.
    """
    heads, parts = x.shape[2], axis_size(TENSOR)
    if heads % parts:
        raise ValueError(
            f"the {heads} heads of {name} do not divide by the mesh's {TENSOR}={parts}; the "
            f"nearest sizes of {TENSOR} that do: {nearest_parts(heads, parts)}"
        )
    return constrain(x, BATCH, None, TENSOR)


def divides_heads(query: Array, key: Array) -> bool:
    """Whether queries [B, T, H, K] and keys [B, G, S, K] divide by the mesh, examples and heads."""
    return (
        query.shape[0] % parts_over(BATCH) == 0
        and query.shape[2] % axis_size(TENSOR) == 0
        and key.shape[1] % axis_size(TENSOR) == 0
    )


def heads_divided() -> P:
    """How the current mesh divides what begins with examples and heads, [B, H, ...]."""
    return P(divided_over(BATCH), divided_over((TENSOR,)))


def on_each_device(
    attend: Callable[..., Array], *others: P | None, check_vma: bool = True
) -> Callable[..., Array]:
    """Attention of each device's own examples and heads, which the compiler would gather.

    Args:
        attend: of queries [B, H, T, K], keys and values [B, G, S, K], and others; gives
            [B, H, T, K].
        others: how these are divided; None for what is None.
        check_vma: see `jax.shard_map`.
    """
    heads = heads_divided()
    return jax.shard_map(
        attend,
        in_specs=(heads, heads, heads, *others),
        out_specs=heads,
        axis_names=set(jax.sharding.get_abstract_mesh().auto_axes),
        check_vma=check_vma,
    )


def nearest_parts(size: int, parts: int) -> str:
    """The divisors of a size that are next to a number of parts, for errors.

    >>> nearest_parts(12, 5)
    '4 and 6'
    """
    divisors = [part for part in range(1, size + 1) if size % part == 0]
    below = [part for part in divisors if part < parts][-1:]
    above = [part for part in divisors if part > parts][:1]
    return " and ".join(map(str, below + above))
