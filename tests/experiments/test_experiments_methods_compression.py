"""The experiment on compression, on a few lines and a tiny model."""

import pytest
from scripts import experiment


@pytest.mark.slow  # a program for each way to be smaller
def test_compress_text(tiny_bert, sentence_files, tmp_path, capsys, monkeypatch):
    script = experiment("compress_text")
    every = script.arms
    chosen = ("before", "80% of weights", "heads and units", "low rank", "4 bits, trained for")

    def some(settings):
        return {name: arm for name, arm in every(settings).items() if name in chosen}

    monkeypatch.setattr(script, "arms", some)
    results = script.main(
        [
            *("--output", str(tmp_path / "run"), "--model", str(tiny_bert)),
            *("--data", f"{sentence_files}/train.csv", "--test", f"{sentence_files}/test.csv"),
            *("--batch-size", "8", "--max-length", "16", "--steps", "4", "--base-steps", "4"),
            *("--learning-rate", "1e-2", "--sparsities", "0.8", "--removed", "0.5"),
            *("--measured-texts", "16", "--rank", "4", "--group", "8", "--repeats", "1"),
        ]
    )
    assert "4 bits, trained for" in capsys.readouterr().out
    runs = {name: by_seed["0"] for name, by_seed in results["runs"].items()}
    before = runs["before"]
    for name, run in runs.items():
        assert 0 <= run["accuracy"] <= 1
        assert run["texts/s"] > 0
        assert name == "before" or run["zipped MB"] < before["zipped MB"], name
    assert runs["80% of weights"]["MB"] == before["MB"]
    for name in ("heads and units", "low rank", "4 bits, trained for"):
        assert runs[name]["MB"] < before["MB"]
    for name in ("heads and units", "low rank"):
        assert runs[name]["M parameters"] < before["M parameters"]
    assert (tmp_path / "run" / "frontier.png").stat().st_size > 0
