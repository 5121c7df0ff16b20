"""The benchmark of scaling, tiny: devices and processes compute the same, and its cost is said."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("scaling")


@pytest.mark.slow
def test_devices_and_processes_are_measured(tmp_path):
    path = tmp_path / "out.json"
    names = ["devices-1-data", "devices-4-fsdp", "processes-2-data"]
    command = [sys.executable, str(FOLDER / "scaling.py"), "--smoke", "--repeats", "2"]
    done = subprocess.run(
        [*command, "--cases", *names, "--json", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    doc = json.loads(path.read_text())
    one, four, two = doc["rows"]
    assert [row["case"] for row in doc["rows"]] == names
    assert [(row["processes"], row["devices"]) for row in doc["rows"]] == [(1, 1), (1, 4), (2, 2)]
    assert four["state_bytes"] < 0.4 * one["state_bytes"] == 0.4 * two["state_bytes"]
    for row in doc["rows"]:
        assert row["cores"] == os.cpu_count()
        assert len(row["seconds"]["all"]) == 2
        assert row["examples_per_second"] == pytest.approx(8 / row["seconds"]["median"])
        assert row["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert row["cpu_seconds_per_example"] > 0
    work = two["cpu_seconds_per_example"] / one["cpu_seconds_per_example"]
    assert doc["ratios"]["processes-2-data"]["work"] == pytest.approx(work)
    assert doc["ratios"]["devices-1-data"] == {"speed": 1, "work": 1}


def test_another_loss_is_not_compared(scaling):
    times = {"min": 1.0, "median": 1.0, "max": 1.0, "all": [1.0]}
    row = scaling.Row("a", "data", 1, 1, 2, 8, 8, times, 8.0, 0.5, 100, 4.0)
    twice = dataclasses.replace(row, case="b", examples_per_second=12.0, loss=4.0001)
    assert scaling.ratios_of([row, twice])["b"] == {"speed": 1.5, "work": 1.0}
    with pytest.raises(ValueError, match=r"b begins with a loss of 4.1 and a with 4.0"):
        scaling.ratios_of([row, dataclasses.replace(twice, loss=4.1)])
