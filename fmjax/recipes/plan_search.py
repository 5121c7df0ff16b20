"""Which ways to lay a step over chips are worth compiling, and in which order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import jax

from fmjax.perf.memory import bytes_per_chip, state_bytes
from fmjax.perf.targets import Target
from fmjax.recipes.planned_step import Step, places
from fmjax.types import Remat

POLICIES: tuple[Remat, ...] = get_args(Remat)
"""From the least work to the least memory."""


class Candidate(NamedTuple):
    """A way to lay the step over the chips.

    Args:
        mesh: chips by axis.
        remat: what of blocks is recomputed.
        least: bytes on a chip that it needs at the least: its state and gradients.
        gradients: bytes of those.
        talk: bytes a chip sends for parameters, gradients and activations, roughly; orders what is
            compiled, and is told nobody.
    """

    mesh: dict[str, int]
    remat: Remat
    least: int
    gradients: int
    talk: float


def rows_over(axes: dict[str, int]) -> int:
    """Parts of a batch's examples."""
    return math.prod(size for name, size in axes.items() if name != "tensor")


def meshes(chips: int) -> Iterator[dict[str, int]]:
    """Every way to lay chips over data, fsdp and tensor.

    >>> list(meshes(2))[0]
    {'data': 1, 'fsdp': 1, 'tensor': 2}
    """
    for data in range(1, chips + 1):
        if chips % data:
            continue
        for fsdp in range(1, chips // data + 1):
            if (chips // data) % fsdp == 0:
                yield {"data": data, "fsdp": fsdp, "tensor": chips // data // fsdp}


def candidates(
    step: Step,
    target: Target,
    devices: list[Any],
    axes: dict[str, int] | None,
    remat: Remat | None,
) -> tuple[list[Candidate], list[tuple[Candidate, str]]]:
    """What can be compiled, the most promising first, and what cannot, with the reason.

    Args:
        step: what is planned.
        target: for what.
        devices: the target's.
        axes: the mesh that was asked for; None tries all.
        remat: as asked for; None tries all that there are on the target.

    Raises:
        ValueError: the mesh that was asked for does not divide the model, or none does.
    """
    found, refused = [], []
    there = POLICIES if target.backend != "cpu" else POLICIES[: POLICIES.index("offload")]
    chosen = there if remat is None else (remat,)
    for mesh in [axes] if axes is not None else meshes(target.chips):
        rows = rows_over(mesh) * step.work.microbatches
        if step.work.batch % rows:
            why = f"batch={step.work.batch} does not divide by {rows}"
            refused.append((Candidate(mesh, chosen[0], 0, 0, 0.0), why))
            continue
        try:
            state = places(step, devices, mesh)
        except ValueError as error:
            if axes is not None:
                raise
            why = str(error).splitlines()[min(1, str(error).count("\n"))].strip()
            refused.append((Candidate(mesh, chosen[0], 0, 0, 0.0), why))
            continue
        gradients = bytes_per_chip(state.trainable)
        least = sum(state_bytes(state)) + gradients
        talk = _talk(step, state, mesh)
        found += [Candidate(mesh, remat, least, gradients, talk) for remat in chosen]
    if not found:
        raise ValueError(
            f"no mesh of {target.chips} chips divides batch={step.work.batch} and the model: "
            f"{refused[0][1]}"
        )
    found.sort(
        key=lambda one: (
            one.least > target.memory, one.talk, one.least, POLICIES.index(one.remat),
        )
    )  # fmt: skip
    return found, refused


def _talk(step: Step, state: Any, mesh: dict[str, int]) -> float:
    """Bytes that a chip sends, roughly."""
    data, fsdp, tensor = (mesh.get(name, 1) for name in ("data", "fsdp", "tensor"))
    kept = bytes_per_chip(state.trainable) + bytes_per_chip(state.non_trainable)
    trained = bytes_per_chip(state.trainable)
    # Parameters are gathered in half precision for both passes, gradients summed in parts.
    parts = (2 * kept / 2 + trained) * (fsdp - 1)
    whole = 2 * trained * (data - 1) / data
    sums = 0.0
    if tensor > 1:
        for leaf in jax.tree.leaves(state.trainable) + jax.tree.leaves(state.non_trainable):
            spec = leaf.sharding.spec
            if len(spec) > 1 and len(leaf.shape) == len(spec) and "tensor" in str(spec[-2]):
                layers = math.prod(leaf.shape[:-2])
                sums += layers * 2 * 2 * 2 * leaf.shape[-1] * (tensor - 1) / tensor
        sums *= step.tokens / (data * fsdp)
    return parts + whole + sums
