"""The experiment on private training, on a few sentences and a tiny model."""

import json

import pytest
from scripts import experiment


@pytest.mark.slow
def test_private_text(tiny_bert, sentence_files, tmp_path, capsys):
    pytest.importorskip("jax_privacy", reason="needs fmjax[privacy]")
    experiment("private_text").main(
        [
            *("--output", str(tmp_path / "run"), "--seeds", "1", "--model", str(tiny_bert)),
            *("--data", str(sentence_files / "train.csv")),
            *("--val", str(sentence_files / "val.csv")),
            *("--test", str(sentence_files / "test.csv")),
            *("--parts", "head", "biases", "--epsilons", "8", "--steps", "12"),
            *("--batch-size", "48", "--microbatch-size", "8", "--max-length", "24"),
            *("--audited", "40", "--shadows", "4", "--encoder-learning-rate", "0.03"),
        ]
    )
    runs = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    assert list(runs) == ["head, epsilon 8", "biases, epsilon 8"]
    private = runs["head, epsilon 8"]["0"]
    assert 7.9 < private["spent"] <= 8
    assert private["epsilon at least"] <= 8
    assert runs["biases, epsilon 8"]["0"]["noise"] == private["noise"]
    assert "audit auc" in capsys.readouterr().out
