"""A trace of a few steps of a run, for xprof or Perfetto."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

from fmjax.types import Batch, StepFn, TrainState

logger = logging.getLogger(__name__)


def parse_steps(text: str) -> tuple[int, int]:
    """The first step and the last of ``START:STOP``, counted from 1 since the program began.

    Raises:
        ValueError: it is not two numbers, the first at least 1 and the second no smaller.

    >>> parse_steps("10:12")
    (10, 12)
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(
            f"profile={text!r} must be START:STOP, two steps in order and at least 1, such as "
            "10:12 (the first steps compile, which hides what later ones do)"
        )
    return int(first), int(last)


def profiled(step: StepFn, first: int, last: int, folder: Path) -> StepFn:
    """The same step, some calls of which are traced into a folder.

    The trace begins when all earlier steps are done and ends when the last one is, so that the
    device's time in it is that of these steps alone; the program waits twice for that.

    Args:
        step: from `jit_step` or `pmap_step`.
        first, last: which calls, counted from 1.
        folder: see ``jax.profiler.start_trace``; `fmjax.perf.trace.device_operations` sums it up.
    """
    calls = 0

    def traced(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        nonlocal calls
        calls += 1
        if calls == first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(folder))
        state, metrics = step(state, batch)
        if calls == last:
            jax.block_until_ready((state, metrics))
            jax.profiler.stop_trace()
            logger.info("traced steps %d to %d into %s", first, last, folder)
        return state, metrics

    return traced
