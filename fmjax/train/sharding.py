"""Where each leaf of a state lives: one table of path patterns for weights, moments and EMA."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax.tree import map_with_path
from fmjax.types import PyTree


def make_mesh(**axes: int) -> Mesh:
    """A mesh of the available devices by axis name: ``make_mesh(data=4)``.

    Raises:
        ValueError: the sizes do not multiply to at most the number of devices.
    """
    wanted, there = math.prod(axes.values()), jax.device_count()
    if wanted > there or wanted < 1:
        raise ValueError(
            f"a mesh of {axes} needs {wanted} devices and there are {there}; make the axes smaller"
        )
    # jax.make_mesh defaults to Explicit axes, which refuse what the compiler could work out.
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[:wanted],
    )


def shardings(abstract_state: PyTree, mesh: Mesh, rules: Sequence[tuple[str, P]]) -> PyTree:
    """A NamedSharding for every leaf: the first rule whose pattern is found in its path.

    A moment or an average has the path of its parameter inside its own
    (``opt_state/0/mu/params/layers_0/mlp/up/kernel``), so one table places them alike. Leaves that
    no rule names are replicated.

    Args:
        abstract_state: a `TrainState` (or any tree) of arrays or ``jax.ShapeDtypeStruct``.
        mesh: the devices.
        rules: ``(regular expression, PartitionSpec)`` pairs.

    Raises:
        ValueError: a rule names an axis the mesh lacks, has more axes than the leaf, or does not
            divide it; or a pattern matches nothing. All problems are listed.
    """
    problems: list[str] = []
    used: set[str] = set()

    def place(path: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        for pattern, spec in rules:
            if re.search(pattern, path):
                used.add(pattern)
                problems.extend(_misfits(path, leaf.shape, mesh, spec))
                return NamedSharding(mesh, P() if problems else spec)
        return NamedSharding(mesh, P())

    placed = map_with_path(place, abstract_state)
    problems += [
        f"pattern {pattern!r} matches no leaf" for pattern, _ in rules if pattern not in used
    ]
    if problems:
        raise ValueError("the sharding table does not fit:\n  " + "\n  ".join(problems))
    return placed


def _misfits(path: str, shape: tuple[int, ...], mesh: Mesh, spec: P) -> list[str]:
    if len(spec) > len(shape):
        return [f"{path} has shape {shape}, fewer axes than {spec}"]
    problems = []
    for size, names in zip(shape, spec, strict=False):
        axes = names if isinstance(names, tuple) else (names,) if names is not None else ()
        if unknown := [name for name in axes if name not in mesh.shape]:
            problems.append(f"{path}: {spec} names {unknown}, the mesh has {dict(mesh.shape)}")
            continue
        parts = math.prod(mesh.shape[name] for name in axes)
        if size % parts:
            problems.append(f"{path}: {shape} does not divide into {parts} parts along {axes}")
    return problems
