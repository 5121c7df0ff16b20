"""The energy that a GPU draws, where it says."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable


def gpu_joules() -> float | None:
    """What the first NVIDIA GPU has drawn since its driver was loaded, in joules.

    None where there is none, or the package ``nvidia-ml-py`` is not installed. The counter moves
    about ten times a second.
    """
    if importlib.util.find_spec("pynvml") is None:
        return None
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        device = nvml.nvmlDeviceGetHandleByIndex(0)
        return nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3  # it counts millijoules
    except nvml.NVMLError:
        return None


def joules_per_call(thunk: Callable[[], object], *, seconds: float = 2.0) -> float | None:
    """The GPU's energy per call of a thunk that waits for its result, idle power included.

    Args:
        thunk: called again and again.
        seconds: for how long, at least.

    Returns:
        Joules; None where `gpu_joules` has none.
    """
    before = gpu_joules()
    if before is None:
        return None
    calls, end = 0, time.perf_counter() + seconds
    while calls == 0 or time.perf_counter() < end:
        thunk()
        calls += 1
    after = gpu_joules()
    return None if after is None else (after - before) / calls
