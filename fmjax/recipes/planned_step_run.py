"""A planned step run on the device at hand, so that the plan can be compared with it."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fmjax.perf.timing import resident_bytes
from fmjax.recipes.planned_step import Compiled

STEPS = 3


def measure(compiled: Compiled) -> dict[str, Any]:
    """Seconds of a step, and by how much the process grows at its peak.

    The state is of ones, as what is multiplied changes neither time nor memory.

    Args:
        compiled: for devices that are here.

    Returns:
        {"step_seconds", "peak_bytes"}: the median of a few steps; and the peak of resident memory
        on each chip's behalf, above what there was before the state. None where the system does
        not say.
    """
    before = resident_bytes("VmRSS") if _forget_peak() else None
    state, batch = _filled((compiled.state, compiled.batch))
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled.run(state, batch))
        times.append(time.perf_counter() - start)
    peak = resident_bytes("VmHWM")
    chips = len(jax.tree.leaves(state)[0].sharding.device_set)
    grown = None if before is None or peak is None else (peak - before) // chips
    return {"step_seconds": statistics.median(times), "peak_bytes": grown}


def _filled(tree: Any) -> Any:
    """Arrays of ones where abstract ones lie; of a key, a key."""

    def leaf(abstract: Any) -> jax.Array:
        if jnp.issubdtype(abstract.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.ones(abstract.shape, abstract.dtype)

    places = jax.tree.map(lambda abstract: abstract.sharding, tree)
    return jax.jit(lambda: jax.tree.map(leaf, tree), out_shardings=places)()


def _forget_peak() -> bool:
    """Sets Linux's peak of resident memory to what it is now, where that is allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
