"""The experiments of distillation and of several tasks, on a few lines and a tiny model."""

import json

import pytest
from scripts import experiment, write_tagged

pytestmark = pytest.mark.slow  # half a minute of compiling each


def test_distill_text(tiny_bert, sentence_files, tmp_path, capsys):
    parts = {"data": "train", "val": "val", "test": "test"}
    files = [
        part
        for name, split in parts.items()
        for part in (f"--{name}", f"{sentence_files}/{split}.csv")
    ]
    experiment("distill_text").main(
        [
            *("--output", str(tmp_path / "run"), "--model", str(tiny_bert), *files, "--seeds", "1"),
            *("--batch-size", "8", "--max-length", "16", "--steps", "4", "--teacher-steps", "30"),
            *("--learning-rate", "1e-2", "--train-texts", "32", "--stride", "1"),
        ]
    )
    assert "soft labels, hidden states" in capsys.readouterr().out
    runs = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    sizes = {by_seed["0"]["parameters"] for by_seed in runs.values()}
    assert len(sizes) == 1  # of one layer, no student is shallower
    for by_seed in runs.values():
        assert 0 <= by_seed["0"]["val accuracy"] <= 1
        assert by_seed["0"]["forward ms"] > 0


def test_multitask_text(tiny_bert, sentence_files, tmp_path, capsys):
    write_tagged(tmp_path)
    experiment("multitask_text").main(
        [
            *("--output", str(tmp_path / "run"), "--model", str(tiny_bert), "--seeds", "1"),
            *("--data", f"{sentence_files}/train.csv", "--val", f"{sentence_files}/val.csv"),
            *("--tagged", f"{tmp_path}/train.conll", "--tagged-val", f"{tmp_path}/val.conll"),
            *("--batch-size", "8", "--max-length", "16", "--steps", "6", "--train-texts", "64"),
            *("--learning-rate", "1e-2"),
        ]
    )
    assert "one trunk, uncertainties" in capsys.readouterr().out
    runs = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    alone = [runs[f"{name} alone"]["0"]["parameters"] for name in ("sentiment", "tags")]
    assert max(alone) < runs["one trunk, drawn"]["0"]["parameters"] < sum(alone)
    for name in ("sentiment", "tags"):
        assert 0 < runs["one trunk, joint"]["0"][f"{name} accuracy"] <= 1
