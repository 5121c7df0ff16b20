"""The experiment on what trains, on a few lines of data and a tiny model."""

import json

import pytest
from scripts import experiment


@pytest.mark.slow
def test_tune_text(tiny_bert, sentence_files, tmp_path, capsys):
    experiment("tune_text").main(
        [
            *("--output", str(tmp_path / "run"), "--model", str(tiny_bert), "--seeds", "1"),
            *("--data", str(sentence_files / "train.csv"), "--max-length", "16"),
            *("--val", str(sentence_files / "val.csv"), "--test", str(sentence_files / "test.csv")),
            *("--steps", "4", "--batch-size", "8", "--virtual-tokens", "2"),
        ]
    )
    runs = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    trained = {name: by_seed["0"]["trained"] for name, by_seed in runs.items()}
    assert trained["head"] == 2 * 16 + 2
    assert trained["prompt"] == trained["head"] + 2 * 16
    assert trained["prefix"] == trained["head"] + 2 * 2 * 16
    assert trained["head"] < trained["bitfit"] < trained["full"] == trained["ulmfit"]
    assert all(0 <= by_seed["0"]["test"] <= 1 for by_seed in runs.values())
    assert "ulmfit" in capsys.readouterr().out
