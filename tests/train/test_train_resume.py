"""A run killed again and again ends bitwise equal to one never killed."""

import dataclasses
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fmjax.train.checkpoint import Checkpoints
from fmjax.tree import map_with_path

SCRIPT = Path(__file__).with_name("resume_run.py")
# The fourth dies at an arbitrary moment while the checkpoint of step 40 is being written.
DELAY = f"{random.Random(0).uniform(0.0, 0.1):.4f}"
DEATHS = ["before-save:20", "after-save:30", "evaluating:36", f"saving:40:{DELAY}", "sigterm:44"]
END = 54
"""Where early stopping ends the run, 12 steps before its time."""


def live(folder, death="never:0"):
    """Starts one life of the run."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), death],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )


def outcome(process):
    """(exit status, step at the start, step at the end or None) of one life."""
    output, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors, errors
    steps = {line.split()[0]: int(line.split()[1]) for line in output.splitlines()}
    return process.returncode, steps["start"], steps.get("end")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run never killed, that of one killed five times, and its six lives."""
    folder = tmp_path_factory.mktemp("runs")
    whole, lives = live(folder / "whole"), []
    for death in [*DEATHS, "never:0"]:
        lives.append(outcome(live(folder / "killed", death)))
    assert outcome(whole) == (0, 0, END)
    return folder / "whole", folder / "killed", lives


def test_each_life_ended_as_planned(runs):
    *_, lives = runs
    statuses, starts, ends = zip(*lives, strict=True)
    assert statuses == (-9, -9, -9, -9, 0, 0)
    assert ends == (None, None, None, None, 44, END)
    # Saved at 6 and 12 (improvements) and at 10, 20, 30, ...; each waits for the one before, and
    # the last of a life may be on disk or not: it is written while the run goes on.
    assert starts[0] == 0
    assert starts[1] in (10, 12)
    assert starts[2] in (20, 30)
    assert starts[3] in (20, 30)
    assert starts[4] in (30, 40)
    assert starts[5] == 44, "SIGTERM saves the step it ends at"


def test_the_same_states_positions_and_memories(runs):
    whole, killed, _ = runs
    specification = importlib.util.spec_from_file_location("resume_run", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    template = jax.eval_shape(script.init)
    restored = {}
    for folder in (whole, killed):
        with Checkpoints(folder / "checkpoints", settings={"steps": script.STEPS}) as checkpoints:
            restored[folder] = (
                checkpoints.restore_last(template),
                checkpoints.restore_best(template),
            )
    for one, other in zip(restored[whole], restored[killed], strict=True):
        assert leaves(one.state) == leaves(other.state)
        assert one.data == other.data
        assert timeless(one.memory) == timeless(other.memory)
    last, best = restored[whole]
    assert (int(last.state.step), last.memory.stopped, last.memory.stale) == (END, True, 7)
    assert last.data == {"position": END}
    assert int(best.state.step) == last.memory.best_step == 12


def leaves(state):
    """dtype, shape and bytes of every leaf by path."""
    found = {}

    def note(path, leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found[path] = (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())

    map_with_path(note, state)
    return found


def timeless(memory):
    windows = {
        period: dataclasses.replace(window, seconds=0.0)
        for period, window in memory.windows.items()
    }
    return dataclasses.replace(memory, windows=windows)


def test_the_same_records_each_once(runs):
    times = {"seconds", "examples_per_second", "tokens_per_second"}
    whole, killed = (
        [
            {key: value for key, value in json.loads(line).items() if key not in times}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in runs[:2]
    )
    assert whole == killed
    assert [r["step"] for r in whole if r["split"] == "val"] == list(range(6, END + 1, 6))
    assert [r["step"] for r in whole if r["split"] == "train"] == list(range(7, END, 7))


def test_nothing_half_written_remains(runs):
    whole, killed, _ = runs
    for folder in (whole, killed):
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert names == ["12", str(END)]
        assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "metrics.jsonl", "tb"]


def test_a_finished_run_stays_finished(runs):
    whole, _, _ = runs
    before = (whole / "metrics.jsonl").read_bytes()
    assert outcome(live(whole)) == (0, END, END)
    assert (whole / "metrics.jsonl").read_bytes() == before
