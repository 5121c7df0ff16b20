"""The experiment on hyper-parameters, on a few lines of data and a tiny model."""

import json

import numpy as np
import pytest
from scripts import experiment

from fmjax.train import warmup_linear


@pytest.mark.slow
def test_search_text(tiny_bert, sentence_files, tmp_path, capsys):
    """And with more trials the study goes on."""
    arguments = [
        *("--output", str(tmp_path / "run"), "--model", str(tiny_bert), "--seeds", "1"),
        *("--data", str(sentence_files / "train.csv"), "--max-length", "16"),
        *("--val", str(sentence_files / "val.csv"), "--test", str(sentence_files / "test.csv")),
        *("--examples", "64", "--evaluations", "2"),
    ]
    main = experiment("search_text").main
    main([*arguments, "--trials", "2"])
    assert "trial 1:" in capsys.readouterr().out
    main([*arguments, "--trials", "3"])
    shown = capsys.readouterr().out
    assert "trial 2:" in shown
    assert "trial 1:" not in shown
    assert "| recipe" in shown
    assert "| found" in shown
    runs = json.loads((tmp_path / "run" / "after 3 trials" / "results.json").read_text())["runs"]
    assert all(0 <= by_seed["0"]["test"] <= 1 for by_seed in runs.values())
    assert all((tmp_path / "run" / f"{name}.png").exists() for name in ("history", "slices"))
    with pytest.raises(ValueError, match="objective/examples: 64 there, 128 here"):
        main([*arguments, "--trials", "3", "--examples", "128"])


@pytest.mark.slow
def test_its_schedule_is_the_recipes(monkeypatch):
    module = experiment("search_text")
    monkeypatch.setattr(module, "adamw", lambda schedule, weight_decay: schedule)
    for steps, warmup in ((20, 0.1), (20, 0.0), (33, 0.5)):
        schedule = module.optimizer(1e-3, 0.0, warmup, float(steps))
        expected = warmup_linear(1e-3, steps=steps, warmup=int(warmup * steps))
        for step in range(steps + 1):
            np.testing.assert_allclose(schedule(step), expected(step), rtol=1e-5, atol=1e-12)
