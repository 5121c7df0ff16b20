"""One load of a checkpoint, in a process that does nothing else.

    python benchmarks/load_once.py fmjax FOLDER FAMILY/HEAD
    python benchmarks/load_once.py torch FOLDER FAMILY/CLASS

`load.py` starts it. It prints, as JSON, seconds of the imports, of the load, and of the load with
one look at every number; resident bytes behind the imports and at the peak; and the sum of squares.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def resident(name: str) -> int | None:
    """Bytes of Linux's account of this process. As `fmjax.perf.timing` has it, whose imports would
    count here."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(name + ":")), None)


def ours(folder: str, name: str) -> Iterator[list[np.ndarray]]:
    """Nothing behind the imports, the family's among them, then the weights."""
    import jax

    import fmjax
    from fmjax.models import family_of

    family, _, head = name.partition("/")
    family_of(family)
    yield []
    _, variables = fmjax.load(folder, head=head)
    yield [np.asarray(leaf) for leaf in jax.block_until_ready(jax.tree.leaves(variables))]


def theirs(folder: str, name: str) -> Iterator[list[np.ndarray]]:
    """The same of transformers' ``from_pretrained``."""
    family, _, kind = name.partition("/")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    yield []
    model = vars(module)[kind].from_pretrained(folder)
    yield [parameter.detach().numpy() for parameter in model.parameters()]


def main(side: str, folder: str, name: str) -> None:
    """Load, look, print."""
    start = time.perf_counter()
    stages = {"fmjax": ours, "torch": theirs}[side](folder, name)
    next(stages)
    imported = time.perf_counter()
    before = resident("VmRSS")
    begun = time.perf_counter()
    leaves = next(stages)
    loaded = time.perf_counter()
    squares = sum(float(np.vdot(leaf, leaf)) for leaf in leaves)
    looked = time.perf_counter()
    found = {
        "import_seconds": imported - start,
        "load_seconds": loaded - begun,
        "look_seconds": looked - begun,
        "before_bytes": before,
        "peak_bytes": resident("VmHWM"),
        "numbers": sum(leaf.size for leaf in leaves),
        "squares": squares,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
