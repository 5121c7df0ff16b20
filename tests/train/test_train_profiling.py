"""Traces of some steps of a run."""

import jax.numpy as jnp
import pytest

from fmjax.train.profiling import parse_steps, profiled


def test_only_the_named_steps_are_traced(monkeypatch, tmp_path) -> None:
    told = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: told.append(folder))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: told.append("stop"))

    def step(state, batch):
        told.append(int(state))
        return state + batch, {}

    traced, state = profiled(step, 2, 3, tmp_path), jnp.int32(0)
    for _ in range(4):
        state, _ = traced(state, 1)
    assert told == [0, str(tmp_path), 1, 2, "stop", 3]
    assert int(state) == 4


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "0:2", "3:2", "a:b", "1:2:3", "-1:2"])
def test_other_ranges_are_refused(text) -> None:
    with pytest.raises(ValueError, match="must be START:STOP"):
        parse_steps(text)


def test_ranges_are_read() -> None:
    assert parse_steps("3:3") == (3, 3)
