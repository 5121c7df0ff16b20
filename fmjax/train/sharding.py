"""Where each leaf of a state lives: one table of path patterns for weights, moments and EMA."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax.nn.placement import BATCH, DATA, EXPERT, FSDP, TENSOR, nearest_parts
from fmjax.tree import is_stacked, map_with_path
from fmjax.types import PyTree

VOCABULARY = "vocabulary"
"""Words are divided as `TENSOR` is, where they divide: their number is the tokenizer's."""
TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Columns of one kernel and rows of the next, so that a block sums over devices twice (Shoeybi
    # et al. 2019, arXiv:1909.08053, section 3); experts have one axis more, before these.
    (r"attn/(query|key|value)/kernel$", (None, TENSOR)),
    (r"attn/(query|key|value)/bias$", (TENSOR,)),
    (r"attn/out/kernel$", (TENSOR, None)),
    (r"mlp/(up|gate)/kernel$", (EXPERT, None, TENSOR)),
    (r"mlp/(up|gate)/bias$", (TENSOR,)),
    (r"mlp/down/kernel$", (EXPERT, TENSOR, None)),
    (r"embed/word/embedding$", (VOCABULARY, None)),
    (r"params/head(/predictions)?/kernel$", (None, VOCABULARY)),
    (r"params/head(/predictions)?/bias$", (VOCABULARY,)),
)
"""Of parameters by path, the mesh axis that divides each of their last axes. One table serves every
family, because they name their parameters alike."""


def make_mesh(**axes: int) -> Mesh:
    """A mesh of the available devices by axis name: ``make_mesh(data=4)``.

    `layout` knows the axes ``data``, ``fsdp``, ``tensor`` and ``expert``. Name those first that
    talk least, and ``tensor`` last: neighbours in the last axis are the nearest devices.

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


def parse_mesh(text: str) -> Mesh:
    """`make_mesh` of a text such as ``"data=4,fsdp=2,tensor=2"``.

    Raises:
        ValueError: another axis, one twice, a size that is no number, or too few devices.
    """
    return make_mesh(**parse_axes(text))


def parse_axes(text: str) -> dict[str, int]:
    """The axes of a mesh from a text such as ``"data=4,fsdp=2,tensor=2"``.

    Raises:
        ValueError: another axis, one twice, or a size that is no number.
    """
    axes: dict[str, int] = {}
    problems = []
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in (DATA, FSDP, TENSOR, EXPERT):
            problems.append(f"{name!r} is no axis")
        elif name in axes:
            problems.append(f"{name} is there twice")
        elif not (size.isdecimal() and int(size) > 0):
            problems.append(f"{name} has size {size!r}")
        else:
            axes[name] = int(size)
    if problems:
        raise ValueError(
            f"mesh {text!r}: {'; '.join(problems)}; it must be like data=4,fsdp=2,tensor=2, of the "
            f"axes {DATA}, {FSDP}, {TENSOR} and {EXPERT}"
        )
    return axes


def batch_spec(mesh: Mesh) -> P:
    """How a batch's examples are laid over a mesh: over all its axes but ``tensor``."""
    return P(tuple(name for name in mesh.axis_names if name in BATCH))


def layout(abstract_state: PyTree, mesh: Mesh, *, threshold: int = 2**16) -> PyTree:
    """A NamedSharding for every leaf of any family's state, by what the mesh's axes are named.

    - ``tensor`` divides heads, inner widths and words, ``expert`` experts, as `TABLE` says.
    - ``fsdp`` divides whatever is large, along its largest axis that it divides and nothing else
      does (Rajbhandari et al. 2020, arXiv:1910.02054, stage 3; layers are never divided from one
      another).
    - ``data`` divides nothing of the state.

    Moments and averages lie as their parameters do.

    Args:
        abstract_state: a `TrainState`, or variables, as arrays or ``jax.ShapeDtypeStruct``.
        mesh: from `make_mesh`.
        threshold: leaves of fewer numbers (of a stack of layers: a layer's) are not divided by
            ``fsdp``: to gather them takes longer than they take memory.

    Raises:
        ValueError: an axis that does not divide; all are listed, with sizes that do.
    """
    parameters: set[tuple[str, tuple[int, ...]]] = set()
    problems: dict[str, None] = {}  # a parameter's is also its moments'

    def own(path: str) -> str:
        """The parameter's path in that of a moment."""
        return path[max(path.rfind("params/"), 0) :]

    def note(path: str, leaf: jax.ShapeDtypeStruct) -> None:
        if path.startswith(("params/", "trainable/", "non_trainable/")):
            parameters.add((own(path), leaf.shape))

    def place(path: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name, shape = own(path), leaf.shape
        first = int(is_stacked(name))  # the axis of layers is nobody's
        spec: list[tuple[str, ...]] = [()] * len(shape)
        # Not of what an optimizer keeps in another form.
        roles = _roles(name, len(shape) - first) if (name, shape) in parameters else ()
        for axis, role in enumerate(roles, start=len(shape) - len(roles)):
            along = TENSOR if role == VOCABULARY else role
            parts = mesh.shape.get(along, 1)
            if parts > 1 and along is not None and shape[axis] % parts == 0:
                spec[axis] = (along,)
            elif parts > 1 and role != VOCABULARY:
                problems[_indivisible(name, shape, shape[axis], role, parts)] = None
        parts = mesh.shape.get(FSDP, 1)
        if parts > 1 and len(shape) > first and math.prod(shape[first:]) >= threshold:
            free = [
                axis
                for axis in range(first, len(shape))
                if shape[axis] % (parts * math.prod(mesh.shape[there] for there in spec[axis])) == 0
            ]
            if free:
                axis = max(free, key=lambda axis: (not spec[axis], shape[axis]))
                spec[axis] = (*spec[axis], FSDP)
            else:
                problems[_indivisible(name, shape, max(shape[first:]), FSDP, parts)] = None
        return NamedSharding(mesh, P(*spec))

    map_with_path(note, abstract_state)
    placed = map_with_path(place, abstract_state)
    if problems:
        raise ValueError(
            f"the mesh {dict(mesh.shape)} does not divide the state:\n  " + "\n  ".join(problems)
        )
    return placed


def _roles(name: str, axes: int) -> tuple[str | None, ...]:
    """What the table says of a parameter's last axes; of experts' kernels, E comes first."""
    for pattern, roles in TABLE:
        if name.startswith("params/") and re.search(pattern, name):
            return roles[max(0, len(roles) - axes) :]
    return ()


def _indivisible(
    name: str, shape: tuple[int, ...], size: int, along: str | None, parts: int
) -> str:
    return (
        f"{name} {shape}: {size} does not divide by {along}={parts}; the nearest sizes of {along} "
        f"that do: {nearest_parts(size, parts)}"
    )


def shardings(abstract_state: PyTree, mesh: Mesh, rules: Sequence[tuple[str, P]]) -> PyTree:
    """A NamedSharding for every leaf, by a table of one's own (`layout` has one for all families):
    the first rule whose pattern is found in its path.

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


def placed(abstract: PyTree, shardings: PyTree) -> PyTree:
    """Abstract leaves with their shardings.

    Args:
        abstract: arrays or ``jax.ShapeDtypeStruct``.
        shardings: a tree of them, or one for all.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: _at(leaf, shardings), abstract)
    return jax.tree.map(_at, abstract, shardings)


def _at(leaf: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


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
