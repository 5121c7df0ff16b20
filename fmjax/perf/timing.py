"""Wall-clock, compile-time and memory measurements, in seconds and bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the repeats of one thunk. `all` is in the order they ran."""

    min: float
    median: float
    max: float
    all: tuple[float, ...]

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """Of the seconds of each repeat."""
        return cls(min(times), statistics.median(times), max(times), tuple(times))

    def of_each(self, parts: int) -> Timing:
        """The same of one of as many equal parts of the thunk."""
        each = tuple(seconds / parts for seconds in self.all)
        return Timing(self.min / parts, self.median / parts, self.max / parts, each)


def time_alternately(
    thunks: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1
) -> dict[str, Timing]:
    """Time several thunks turn by turn: A B A B ..., so that each meets the same machine.

    Comparing two programs timed minutes apart compares two moods of the machine; neighbours,
    clocks and heat move absolute times by more than most optimisations do. What a program does
    over and over, it does with warm caches and memory that it holds: a turn begins with runs that
    are not timed, because the turn of another, or merely waiting for it, took these away.

    Args:
        thunks: {name: thunk}. A thunk returns once its result exists: it calls
            `jax.block_until_ready` (or `torch.cuda.synchronize`) itself, else only the dispatch
            is timed.
        repeats: timed runs of each thunk, one a turn.
        warmup: runs at the start of every turn, not timed.

    Returns:
        {name: Timing} in the order of `thunks`.

    Raises:
        ValueError: no thunks, fewer than one repeat, or a negative warmup.
    """
    problems = []
    if not thunks:
        problems.append("thunks is empty: give at least one")
    if repeats < 1:
        problems.append(f"repeats is {repeats}: it must be at least 1")
    if warmup < 0:
        problems.append(f"warmup is {warmup}: it must be 0 or more")
    if problems:
        raise ValueError("; ".join(problems))
    seconds: dict[str, list[float]] = {name: [] for name in thunks}
    for _ in range(repeats):
        for name, thunk in thunks.items():
            gc.collect()  # else one thunk pays for the garbage of the other
            for _ in range(warmup):
                thunk()
            start = time.perf_counter()
            thunk()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(times) for name, times in seconds.items()}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled function and what it took to get it.

    Attributes:
        call: the compiled executable; takes the same arrays as the function.
        lower_seconds: tracing and lowering to StableHLO.
        compile_seconds: StableHLO to machine code.
        memory: bytes, for one device: "arguments", "outputs", "aliased" (outputs that reuse
            donated arguments), "temporaries", "code" and "peak" (the most alive at one time, as
            the compiler planned it).
    """

    call: jax.stages.Compiled
    lower_seconds: float
    compile_seconds: float
    memory: Mapping[str, int]

    @property
    def planned_bytes(self) -> int | None:
        """What the program holds in all, as planned; None where the compiler does not say."""
        if not self.memory:
            return None
        held = self.memory["arguments"] + self.memory["outputs"] - self.memory["aliased"]
        return held + self.memory["temporaries"]


def compile_time(lowerable: jax.stages.Wrapped, *args: Any, **kwargs: Any) -> Compiled:
    """Lower and compile a jitted function, timing both.

    A hit in JAX's persistent compilation cache is a read and not a compilation; switch the cache
    off (`JAX_ENABLE_COMPILATION_CACHE=false`) to measure compilers.

    Args:
        lowerable: the result of `jax.jit`.
        *args: arrays or `jax.ShapeDtypeStruct`s.
        **kwargs: the same, by name.

    Returns:
        The executable, seconds and bytes.
    """
    start = time.perf_counter()
    lowered = lowerable.lower(*args, **kwargs)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    return Compiled(compiled, middle - start, end - middle, compiled_memory(compiled))


def compiled_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The compiler's memory plan of an executable, in bytes for one device.

    Args:
        compiled: the result of `jax.jit(f).lower(...).compile()`.

    Returns:
        See `Compiled.memory`. Empty where the backend has no such plan.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        return {}
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }


@dataclasses.dataclass
class CompileEvents:
    """What JAX traced and compiled in the meantime.

    Attributes:
        traces: functions traced.
        compilations: programs compiled (or read from the persistent cache).
        seconds: {"lower": tracing and lowering, "compile": compiling}.
    """

    traces: int = 0
    compilations: int = 0
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"lower": 0.0, "compile": 0.0}
    )


_COMPILE_STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "lower",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}


@contextlib.contextmanager
def compile_events() -> Iterator[CompileEvents]:
    """Counts what JAX traces and compiles inside the ``with`` block, whoever asks for it.

    >>> with compile_events() as events:
    ...     _ = jax.jit(lambda x: x + 1)(1.0)
    >>> events.compilations
    1
    """
    events = CompileEvents()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if stage := _COMPILE_STAGES.get(event):
            events.seconds[stage] += duration_secs
            events.traces += event.endswith("jaxpr_trace_duration")
            events.compilations += stage == "compile"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class PeakMemory(NamedTuple):
    """The most memory this process has held so far, in bytes.

    `device` is the fullest local device's, None where the backend does not count (a CPU).
    """

    host: int
    device: int | None


def peak_memory_bytes() -> PeakMemory:
    """Peak resident memory of the process, and peak use of its fullest device.

    Both only ever grow: for one case's own peak, run the case in its own process.
    """
    # Linux' getrusage goes on counting in a new program what its parent had.
    host = resident_bytes("VmHWM")
    if host is None:
        unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, others KiB
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peaks = [
        stats["peak_bytes_in_use"]
        for stats in (device.memory_stats() for device in jax.local_devices())
        if stats and "peak_bytes_in_use" in stats
    ]
    return PeakMemory(host, max(peaks) if peaks else None)


def resident_bytes(name: str) -> int | None:
    """Bytes of Linux's account of this process; None where there is none.

    Args:
        name: "VmRSS", what is resident, or "VmHWM", its peak.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None
