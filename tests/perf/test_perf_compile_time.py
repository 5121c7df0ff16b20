"""The benchmark of compile times and of starts, tiny."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def run(path, *arguments):
    command = [sys.executable, str(FOLDER / "compile_time.py"), "--smoke", "--json", str(path)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.slow
def test_steps_are_compiled_from_nothing_each_time(tmp_path):
    names = ["bert-base", "t5-base"]
    doc = run(tmp_path / "out.json", "--repeats", "2", "--cases", *names)
    assert [(row["case"], row["side"]) for row in doc["rows"]] == [
        (name, side) for name in names for side in ("loop", "scan")
    ]
    for row in doc["rows"]:
        first, second = row["seconds"]["all"]
        assert second > 0.2 * first  # nothing is remembered
        parts = sum(row["stages"].values())
        assert row["stages"].keys() == {"trace", "compile"}
        assert parts == pytest.approx(row["seconds"]["median"])
        assert row["planned_bytes"] > 0
    medians = [row["seconds"]["median"] for row in doc["rows"]]
    assert doc["ratios"]["t5-base"] == {"seconds": pytest.approx(medians[3] / medians[2])}


@pytest.mark.slow
def test_a_second_start_reads_what_the_first_compiled(tmp_path):
    names = ["start-train", "start-generate"]
    doc = run(tmp_path / "out.json", "--repeats", "1", "--cases", *names)
    rows = {(row["case"], row["side"]): row for row in doc["rows"]}
    assert [*rows] == [(name, side) for name in names for side in ("first", "second")]
    first, second = (rows["start-train", side]["stages"] for side in ("first", "second"))
    assert [*first] == ["imports", "load", "state", "trace", "compile"]
    assert second["compile"] < 0.5 * first["compile"]
    assert rows["start-train", "second"]["cpu_seconds"] == pytest.approx(sum(second.values()))
    assert doc["ratios"]["start-train"]["cpu_seconds"] < 1
    assert set(doc["ratios"]["start-generate"]) == {"seconds", "cpu_seconds"}
