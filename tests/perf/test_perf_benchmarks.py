"""The benchmark scripts on a tiny model: they run, compare first, and write their schema."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules that the scripts share, imported as the scripts import them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import cases
    import record

    return cases, record


@pytest.mark.parametrize(
    ("script", "case", "dtype"),
    [
        ("forward", "base-bfloat16", "bfloat16"),
        pytest.param("vision", "step-resnet-50-float32", "float32", marks=pytest.mark.slow),
    ],
)
def test_script_writes_the_schema(benchmarks, tmp_path, capsys, script, case, dtype) -> None:
    _, record = benchmarks
    import run

    path = tmp_path / "out.json"
    settings = run.Settings(cases=(case,), repeats=2, smoke=True, json=path)
    module = importlib.import_module(script)
    run.run(script, module.CASES, settings, module.run_case)
    doc = json.loads(path.read_text())
    record.check(doc)
    assert [(row["case"], row["side"]) for row in doc["rows"]] == [(case, "fmjax"), (case, "torch")]
    ours, theirs = doc["rows"]
    assert ours["dtype"] == dtype
    assert ours["compile_seconds"]["compile"] > 0
    assert ours["planned_bytes"] > 0
    assert 0 < ours["max_difference"] <= 5e-2
    ratio = theirs["seconds"]["median"] / ours["seconds"]["median"]
    assert doc["ratios"] == {case: pytest.approx(ratio)}
    assert case in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_step_is_timed_in_all_its_ways(benchmarks, tmp_path) -> None:
    _, record = benchmarks
    path = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / "train_step.py"), "--smoke", "--repeats", "2"]
    done = subprocess.run(
        [*command, "--no-peer", "--cases", "minilm-ways-float32", "--json", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    doc = json.loads(path.read_text())
    record.check(doc)
    rows = {row["side"]: row for row in doc["rows"]}
    assert [*rows] == ["fmjax", "mesh", "pmap", "accumulate-4"]
    assert len({row["model_flops"] for row in rows.values()}) == 1
    # In pieces less is alive at a time.
    assert 0 < rows["accumulate-4"]["planned_bytes"] < rows["fmjax"]["planned_bytes"]


@pytest.mark.slow
def test_generate_writes_the_schema(benchmarks, tmp_path) -> None:
    _, record = benchmarks
    path = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / "generate.py"), "--smoke", "--repeats", "2"]
    done = subprocess.run(
        [*command, "--cases", "gpt2-batch-8", "--json", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    doc = json.loads(path.read_text())
    record.check(doc)
    ours, theirs = doc["rows"]
    assert (ours["case"], ours["side"], theirs["side"]) == ("gpt2-batch-8", "fmjax", "torch")
    assert ours["compile_seconds"]["compile"] > 0
    assert theirs["compile_seconds"] is None
    for row in (ours, theirs):
        weights = 4 * (128 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32)
        rate = weights * row["length"] / row["seconds"]["median"]
        assert row["weight_bytes_per_second"] == pytest.approx(rate)
        assert row["bandwidth_share"] > 0
        tokens = 2 * row["length"] / row["seconds"]["median"]  # two rows
        assert row["tokens_per_second"] == pytest.approx(tokens)


@pytest.mark.slow
def test_speech_writes_the_schema(benchmarks, tmp_path) -> None:
    _, record = benchmarks
    path = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / "speech.py"), "--smoke", "--repeats", "2"]
    done = subprocess.run(
        [*command, "--cases", "whisper-batch-8", "--json", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    doc = json.loads(path.read_text())
    record.check(doc)
    ours, theirs = doc["rows"]
    assert (ours["case"], ours["side"], theirs["side"]) == ("whisper-batch-8", "fmjax", "torch")
    assert ours["compile_seconds"]["compile"] > 0
    assert ours["max_difference"] < 1e-4  # of the frames
    assert ours["model_flops"] == theirs["model_flops"] > 0


def test_a_wrong_model_is_not_timed(benchmarks) -> None:
    cases, _ = benchmarks
    case = cases.Case("tiny", cases.SMOKE, "masked_lm", 2, 8, "float32")
    model, variables = cases.create(case)
    batch = cases.make_batch(case)
    with cases.peers_of(case, model, variables, batch, torch=True) as peers:
        assert cases.compare(case, model, variables, batch, peers)["torch"] < 1e-5
        wrong = jax.tree.map(lambda leaf: leaf * 1.01, variables)
        with pytest.raises(ValueError, match="not comparable"):
            cases.compare(case, model, wrong, batch, peers)


def test_a_python_without_flax_classes_says_what_to_install(benchmarks, capfd) -> None:
    """As that of the tests, which has transformers 5."""
    cases, _ = benchmarks
    case = cases.Case("tiny", cases.SMOKE, "masked_lm", 2, 8, "float32")
    flax_python = Path(sys.executable)
    others = cases.peers_of(
        case, *cases.create(case), cases.make_batch(case), torch=False, flax_python=flax_python
    )
    with pytest.raises(ValueError, match="ended before it answered"), others:
        pass
    assert "install transformers==4.57.6" in capfd.readouterr().err


def test_train_step_flops_by_hand(benchmarks) -> None:
    cases, _ = benchmarks
    import train_step

    from fmjax.perf.flops import count_flops

    for name, head in (("float32", "masked_lm"), ("bfloat16", "masked_lm")):
        case = cases.Case("tiny", cases.SMOKE, head, 2, 8, name)
        model, variables = cases.create(case)
        batch = cases.make_batch(case)
        c = case.config
        d, f, layers, n, t = c.hidden_size, c.intermediate_size, c.num_hidden_layers, 16, 8
        forward = layers * (2 * n * (4 * d * d + 2 * d * f) + 4 * n * t * d)
        forward += 2 * n * (d * d + d * c.vocab_size)
        loss_fn = train_step.loss_of(case, model)
        rng = jax.random.key(0)
        count = count_flops(jax.value_and_grad(lambda v: loss_fn(v, batch, rng)[0]), variables)  # noqa: B023
        # bias gradients may be products with a row of ones, far below one percent
        assert 3 * forward <= count.total <= 3.03 * forward


def test_unknown_case_is_named(benchmarks) -> None:
    cases, _ = benchmarks
    case = cases.Case("tiny", cases.SMOKE, "model", 2, 8, "float32")
    with pytest.raises(ValueError, match=r"unknown cases \['huge'\]; choose from \['tiny'\]"):
        cases.select([case], ["huge"], smoke=False)


def test_schema_problems_are_all_listed(benchmarks) -> None:
    _, record = benchmarks
    timing = record.Timing(1.0, 2.0, 3.0, (1.0, 2.0, 3.0))
    row = record.row(
        timing,
        case="a",
        side="fmjax",
        dtype="float32",
        batch_size=4,
        length=8,
        model_flops=100,
        matmul_peak=10.0,
        compiled=None,
        max_difference=None,
    )
    assert row.examples_per_second == 2.0
    assert row.tokens_per_second == 16.0
    assert row.peak_share == 5.0
    peer = dataclasses.replace(row, side="torch", seconds={**row.seconds, "median": 3.0})
    doc = record.document(
        "x", [row, peer], repeats=3, smoke=True, matmul_peak={"float32": 10.0}, load=0.0
    )
    record.check(doc)
    assert doc["ratios"] == {"a": 1.5}
    doc["schema"], doc["repeats"] = 0, 2
    del doc["machine"]
    with pytest.raises(ValueError, match=r"\['machine'\].*schema is 0.*row 0: 3 times, not 2"):
        record.check(doc)
    assert np.isfinite(row.peak_share)


def test_file_names_say_the_device(benchmarks) -> None:
    _, record = benchmarks
    gpu = {"devices": [{"platform": "gpu", "kind": "NVIDIA H200", "count": 1}]}
    assert record.device_slug(gpu) == "nvidia-h200-x1"
    cpu = {"devices": [{"platform": "cpu", "kind": "cpu"}], "cpu": "AMD EPYC", "cores": 2}
    assert record.device_slug(cpu) == "amd-epyc-2-cores"


def test_compare_puts_devices_side_by_side(benchmarks, tmp_path, capsys) -> None:
    """The committed files, among them a GPU's, with its share of the peak and its joules."""
    import compare

    results = FOLDER / "results"
    names = ("accelerator-gpt2-medium-nvidia-h200-x1", "train_step-amd-epyc-2-cores")
    files = tuple(results / f"{name}.json" for name in names)
    compare.main(compare.Settings(files, chart=tmp_path / "chart.png"))
    out = capsys.readouterr().out
    for words in ("gpt2-medium", "nvidia-h200-x1", "gpt2-clm-float32", "amd-epyc-2-cores"):
        assert words in out
    from PIL import Image

    with Image.open(tmp_path / "chart.png") as chart:
        assert chart.width == 150 * (5 + 4 * 4)  # a panel each for pace, both shares and joules
    doc = json.loads((results / "accelerator-gpt2-medium-nvidia-h200-x1.json").read_text())
    for row, line in zip(doc["rows"], compare.lines(doc), strict=True):
        assert line.tokens_per_second == pytest.approx(row["tokens_per_second"])
        rate = row["model_flops"] / row["seconds"]["median"]
        assert line.utilisation == pytest.approx(rate / 989e12)
        assert line.tokens_per_joule == pytest.approx(16 * 1024 / row["joules"])
        assert line.peak_share == row["peak_share"]
    # As the page says it: with all files, those of another kind are left out.
    compare.main(compare.Settings(tuple(sorted(results.glob("*.json")))))
    everything = capsys.readouterr().out
    (left_out,) = (line for line in everything.splitlines() if "another kind: " in line)
    for name in ("compile_time", "input", "loss_memory"):
        assert f"{name}-amd-epyc-2-cores.json" in left_out
    assert "train_step" not in left_out
    assert "of measured peak" in everything
    with pytest.raises(ValueError, match="none of the files has rows of models"):
        compare.main(compare.Settings((results / "input-amd-epyc-2-cores.json",)))
    other = json.loads((results / "input-amd-epyc-2-cores.json").read_text())
    with pytest.raises(ValueError, match="rows of 'input' have no"):
        compare.lines(other)
    with pytest.raises(ValueError, match="at least one result file"):
        compare.main(compare.Settings(()))
