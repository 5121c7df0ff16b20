"""The experiment on what classifiers do not know, on a few pictures made here."""

import json

import numpy as np
import pytest
from scripts import experiment

from fmjax.data.images import ImageExamples


def pictures(count, seed, brightness=150):
    """Two classes, bright above or bright below, a tenth of them labelled wrongly."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, count).astype(np.int32)
    images = draw.integers(0, 100, (count, 28, 28, 1))
    images[labels == 0, :14] += brightness
    images[labels == 1, 14:] += brightness
    wrong = draw.random(count) < 0.1
    return ImageExamples(
        images.astype(np.uint8), np.where(wrong, 1 - labels, labels), ("above", "below")
    )


@pytest.mark.slow
def test_ensemble_uncertainty(tmp_path, capsys, monkeypatch):
    sizes = {"train": 64, "val": 40, "test": 40}
    monkeypatch.setattr("fmjax.data.mnist.load_fashion", lambda s: pictures(sizes[s], len(s)))
    monkeypatch.setattr("fmjax.data.mnist.load_digits", lambda s: pictures(sizes[s], 9, 0))
    experiment("ensemble_uncertainty").main(
        [
            *("--output", str(tmp_path / "run"), "--seeds", "1", "--members", "2"),
            *("--samples", "3", "--steps", "24", "--batch-size", "16", "--hidden-sizes", "2"),
            *("--dense-size", "4", "--learning-rate", "3e-2", "--dropout", "0.2"),
        ]
    )
    runs = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    assert list(runs) == [
        "single", "MC dropout", "ensemble", "SWA", "uniform soup", "greedy soup", "of ingredients",
        "blend",
    ]  # fmt: skip
    for run in (by_seed["0"] for by_seed in runs.values()):
        assert run["accuracy"] > 0.7
        assert 0 <= run["AUROC of others"] <= 1
        # Of ten in a hundred wrong labels no net knows; the temperature is from other pictures.
        assert 0.1 < run["NLL, scaled"] < run["NLL"] + 0.2
    assert runs["ensemble"]["0"]["information"] > 0
    assert runs["blend"]["0"]["nets"] >= 1
    assert "| of ingredients" in capsys.readouterr().out
