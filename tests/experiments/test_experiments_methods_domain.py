"""The experiment of domains, on a few lines and a tiny model."""

import json

import pytest
from scripts import experiment

pytestmark = pytest.mark.slow  # half a minute of compiling


def test_domain_shift(tiny_bert, sentence_files, tmp_path, capsys):
    arguments = [
        *("--output", str(tmp_path / "run"), "--model", str(tiny_bert), "--seeds", "1"),
        *("--data", f"{sentence_files}/train.csv", "--target", f"{sentence_files}/test.csv"),
        *("--target-val", f"{sentence_files}/val.csv", "--batch-size", "16", "--max-length", "16"),
        *("--steps", "60", "--pretraining-steps", "3", "--learning-rate", "5e-3"),
        *("--source-texts", "150", "--target-texts", "40", "--threshold", "0.6", "--tau", "0.6"),
        *("--frozen-layers", "0"),
    ]
    experiment("domain_shift").main(arguments)
    assert "| continued pretraining" in capsys.readouterr().out
    runs = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    assert list(runs) == [
        *("source", "DANN", "CORAL", "self-training", "FixMatch", "continued pretraining"),
        "target",
    ]
    for by_seed in runs.values():
        assert 0 < by_seed["0"]["target accuracy"] <= 1
    for name in ("source", "CORAL", "continued pretraining"):  # one domain, really
        assert runs[name]["0"]["target accuracy"] > 0.7
    assert 0 <= runs["self-training"]["0"]["pseudo-labelled"] <= 1
