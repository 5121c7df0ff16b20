"""The experiments on adapters, on a few lines of data and a tiny model."""

import pytest
from scripts import experiment


@pytest.mark.slow
def test_lora_text(tiny_bert, sentence_files, tmp_path, capsys, monkeypatch):
    script = experiment("lora_text")
    every = script.ways
    chosen = ("all", "low-rank, decomposed", "bottlenecks")  # each compiles a step
    monkeypatch.setattr(
        script, "ways", lambda settings: {name: every(settings)[name] for name in chosen}
    )
    results = script.main(
        [
            *("--output", str(tmp_path / "run"), "--model", str(tiny_bert), "--seeds", "1"),
            *("--data", str(sentence_files / "train.csv"), "--max-length", "16"),
            *("--test", str(sentence_files / "test.csv"), "--batch-size", "8"),
            *("--train-texts", "24", "--test-texts", "8", "--epochs", "1"),
        ]
    )
    assert "low-rank, decomposed" in capsys.readouterr().out
    runs = {name: by_seed["0"] for name, by_seed in results["runs"].items()}
    for name, run in runs.items():
        assert 0 <= run["accuracy"] <= 1
        assert run["trainable"] < runs["all"]["trainable"] or name == "all"
        assert run["optimizer MB"] < runs["all"]["optimizer MB"] or name == "all"
