"""The benchmark of the input, tiny: every kind of source feeds the step and is written down."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "input.py"


@pytest.mark.slow
def test_each_source_is_measured(tmp_path):
    path = tmp_path / "out.json"
    names = ["augment", "png-28-workers-0", "jpeg-256-workers-1"]
    command = [sys.executable, str(SCRIPT), "--smoke", "--repeats", "2", "--cases"]
    done = subprocess.run([*command, *names, "--json", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    doc = json.loads(path.read_text())
    assert [(row["case"], row["side"]) for row in doc["rows"]] == [
        (name, side) for name in names for side in ("input", "step", "fed")
    ]
    for row in doc["rows"]:
        assert len(row["seconds"]["all"]) == 2
        rate = row["batch_size"] * row["batches"] / row["seconds"]["median"]
        assert row["images_per_second"] == pytest.approx(rate)
    last = {row["side"]: row["images_per_second"] for row in doc["rows"][-3:]}
    assert doc["ratios"]["jpeg-256-workers-1"] == {
        side: pytest.approx(last[side] / last["step"]) for side in ("input", "fed")
    }
    assert all(name in done.stdout for name in names)
    wrong = subprocess.run([*command, "huge"], capture_output=True, text=True)
    assert "unknown cases ['huge']" in wrong.stderr
