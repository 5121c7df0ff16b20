"""The benchmark of attention, tiny: all kernels and PyTorch give the same, and are written down."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MASKS = ("none", "causal", "padding", "window", "grouped")


@pytest.fixture
def attention(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import attention

    return attention


@pytest.mark.slow
def test_every_mask_is_measured(tmp_path):
    path = tmp_path / "out.json"
    names = [f"{mask}-128-{way}" for mask in MASKS for way in ("forward", "gradient")]
    command = [sys.executable, str(FOLDER / "attention.py"), "--smoke", "--repeats", "2"]
    done = subprocess.run(
        [*command, "--cases", *names, "--json", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    doc = json.loads(path.read_text())
    small = [name.replace("128", "32") for name in names]
    assert [(row["case"], row["side"]) for row in doc["rows"]] == [
        (name, side) for name in small for side in ("plain", "xla", "blocked", "torch")
    ]
    pairs = 2 * 4 * 32 * 32 * 8  # B H T S K
    for row in doc["rows"]:
        assert len(row["seconds"]["all"]) == 2
        assert row["max_difference"] < 1e-4
        assert row["model_flops"] == (12 if row["case"].endswith("gradient") else 4) * pairs
        assert row["flops_per_second"] == pytest.approx(
            row["model_flops"] / row["seconds"]["median"]
        )
        assert (row["temporary_bytes"] is None) == (row["side"] == "torch")
        assert row["chosen"] == (row["side"] == "plain")  # on a CPU
    ours, _, _, theirs = doc["rows"][:4]
    ratio = theirs["seconds"]["median"] / ours["seconds"]["median"]
    assert doc["ratios"][small[0]] == pytest.approx(ratio)


def test_sides_that_differ_are_not_timed(attention):
    """Unmarked: kernels agree on a mask each; a peer that ignores it is found out."""
    case = attention.Case("causal", 16, True, 4, 2, 8)

    class Wrong:
        def begin(self, case, dtype, arrays):
            return [np.zeros_like(arrays[name]) for name in ("query", "key", "value")]

        def run(self):
            raise AssertionError("it was timed")

    options = {"tokens": 32, "dtype": "float32", "repeats": 1, "peak": 1e9}
    rows = attention.run_case(case, **options, peer=None)
    assert [row.side for row in rows] == ["plain", "xla", "blocked"]
    assert max(row.max_difference for row in rows) < 1e-5
    with pytest.raises(ValueError, match=r"grouped-16-gradient: .*'torch'.*not comparable"):
        attention.run_case(case, **options, peer=Wrong())
