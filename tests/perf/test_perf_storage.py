"""The benchmarks of checkpoints and of loading, tiny: they compare first and write all down."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """A script as a module, by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def run(tmp_path, script, *arguments):
    path = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--smoke", "--json", str(path)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_checkpoints_are_timed_beside_the_disk(tmp_path, scripts):
    checkpoint = scripts("checkpoint")
    settings = checkpoint.Settings(cases=("bert-base",), repeats=2, smoke=True, folder=tmp_path)
    (case,) = checkpoint.select(settings)
    rows = {row.side: row for row in checkpoint.run_case(case, settings)}
    assert list(rows) == ["blocking", "save", "write", "restore", "read"]
    for row in rows.values():
        assert len(row.seconds["all"]) == 2
        assert row.bytes_per_second == pytest.approx(row.bytes / row.seconds["median"])
    for part, whole in zip(
        *(rows[side].seconds["all"] for side in ("blocking", "save")), strict=True
    ):
        assert part < whole
    # weights and two moments in float32, the step, the count, and the key
    assert (rows["save"].bytes - 4 - 4 - 8) % 12 == 0
    assert rows["save"].stored_bytes > 0.9 * rows["save"].bytes  # nothing compresses
    assert list(tmp_path.iterdir()) == []
    ratio = rows["save"].bytes_per_second / rows["write"].bytes_per_second
    assert checkpoint.ratios_of([*rows.values()])["bert-base"]["save"] == pytest.approx(ratio)


def test_what_is_restored_is_compared(scripts):
    checkpoint = scripts("checkpoint")
    (case,) = checkpoint.select(checkpoint.Settings(cases=("gpt2-small",), smoke=True))
    state = checkpoint.state_of(case)
    assert checkpoint.same(state, state)
    assert not checkpoint.same(state, dataclasses.replace(state, step=state.step + 1))


@pytest.mark.slow
def test_loads_are_timed_in_their_own_processes(tmp_path):
    names = ["bert-base", "gpt2-small-sharded"]
    doc = run(tmp_path, "load", "--repeats", "2", "--cases", *names)
    assert [(row["case"], row["side"]) for row in doc["rows"]] == [
        (name, side) for name in names for side in ("fmjax", "torch")
    ]
    assert [row["files"] > 1 for row in doc["rows"]] == [False, False, True, True]
    for row in doc["rows"]:
        assert len(row["seconds"]["all"]) == 2
        assert 0 < row["seconds"]["min"] <= row["look_seconds"]["min"]
        assert row["peak_bytes"] > row["before_bytes"] > 10 * 2**20
    ours, theirs = doc["rows"][:2]
    ratio = theirs["seconds"]["median"] / ours["seconds"]["median"]
    assert doc["ratios"]["bert-base"]["seconds"] == pytest.approx(ratio)


def test_other_numbers_are_not_compared(scripts):
    load = scripts("load")
    (case,) = load.select(load.Settings(cases=("bert-base",)))
    found = {
        "fmjax": [{"numbers": 10, "squares": 2.0}],
        "torch": [{"numbers": 10, "squares": 2.00001}],
    }
    load.check_same(case, found)
    for wrong in ({"numbers": 11, "squares": 2.0}, {"numbers": 10, "squares": 2.1}):
        with pytest.raises(ValueError, match=r"bert-base: torch found 1.* not comparable"):
            load.check_same(case, found | {"torch": [wrong]})


def test_a_child_that_fails_is_named(scripts):
    child = scripts("child")
    process = child.begin("load_once.py", ["nobody", "folder", "head"])
    with pytest.raises(ValueError, match=r"load_once.py nobody .*ended with 1:(.|\n)*Key"):
        child.answer(process)
