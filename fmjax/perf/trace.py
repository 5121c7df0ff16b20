"""Where a step's time goes on the device, from a trace that JAX's profiler wrote."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax


class Operation(NamedTuple):
    """All runs of the operations of one kind.

    Args:
        name: of the kernels, without the numbers that tell them apart.
        count: how often they ran.
        seconds: together.
    """

    name: str
    count: int
    seconds: float


def device_operations(folder: str | Path) -> list[Operation]:
    """The kernels in a trace, the longest first.

    Args:
        folder: what ``jax.profiler.trace(folder)`` was given.

    Raises:
        ValueError: the folder has no trace, or the trace no device (a CPU's has none).
    """
    files = sorted(Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise ValueError(f"{folder} has no *.xplane.pb; write one with jax.profiler.trace(folder)")
    runs: dict[str, list[float]] = defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream") or line.name == "XLA Ops":
                for event in line.events:
                    runs[kind(event.name)].append(event.duration_ns / 1e9)
    if not runs:
        raise ValueError(f"{files[-1]} has no operations of a device; trace a GPU or TPU")
    found = [Operation(name, len(times), sum(times)) for name, times in runs.items()]
    return sorted(found, key=lambda operation: -operation.seconds)


def kind(name: str) -> str:
    """A kernel's name without what tells its likes apart.

    >>> kind("loop_add_fusion_12"), kind("fusion.388")
    ('loop_add_fusion', 'fusion')
    """
    return re.sub(r"([._]\d+)+$", "", name)
