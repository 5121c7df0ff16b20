"""Timers: order, statistics, compile times and memory."""

import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.perf.timing import (
    compile_time,
    peak_memory_bytes,
    resident_bytes,
    time_alternately,
)


def test_turns_alternate_and_begin_with_warmup() -> None:
    calls: list[str] = []
    timings = time_alternately(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2
    )
    assert calls == ["a", "a", "a", "b", "b", "b"] * 3
    assert list(timings) == ["a", "b"]
    assert all(len(timing.all) == 3 for timing in timings.values())


def test_statistics_are_seconds() -> None:
    pauses = iter([0.0, 0.03, 0.0, 0.01, 0.0, 0.02])  # every other one is the warmup's
    timing = time_alternately({"sleep": lambda: time.sleep(next(pauses))}, repeats=3)["sleep"]
    assert timing.all == (timing.max, timing.min, timing.median)
    for value, pause in ((timing.min, 0.01), (timing.median, 0.02), (timing.max, 0.03)):
        assert pause <= value < pause + 0.5


def test_all_problems_in_one_error() -> None:
    with pytest.raises(ValueError, match=r"empty.*repeats is 0.*warmup is -1"):
        time_alternately({}, repeats=0, warmup=-1)


def test_compile_time_gives_a_callable_and_its_memory() -> None:
    x = jnp.arange(12.0).reshape(3, 4)
    compiled = compile_time(jax.jit(lambda x: x @ x.T), x)
    np.testing.assert_allclose(compiled.call(x), x @ x.T)
    assert compiled.lower_seconds > 0
    assert compiled.compile_seconds > 0
    assert compiled.memory["arguments"] == 3 * 4 * 4
    assert compiled.memory["outputs"] == 3 * 3 * 4


@pytest.mark.slow
def test_peak_memory_grows_by_what_is_held() -> None:
    before = peak_memory_bytes().host
    held = np.ones(before // 8 + (64 << 20) // 8)  # more than the whole process had
    after = peak_memory_bytes()
    assert after.host >= held.nbytes
    if jax.default_backend() == "cpu":
        assert after.device is None


@pytest.mark.slow
def test_a_child_does_not_count_its_parents_memory() -> None:
    if resident_bytes("VmHWM") is None:
        pytest.skip("the system does not say")
    held = np.ones(1 << 27)  # 1 GiB
    code = "from fmjax.perf.timing import peak_memory_bytes; print(peak_memory_bytes().host)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < held.nbytes < peak_memory_bytes().host
