"""The experiment on federated training, on a few pictures made here."""

import json

import numpy as np
import pytest
from scripts import experiment

from fmjax.data.images import ImageExamples


def pictures(split):
    """Two classes: bright above, or bright below."""
    draw = np.random.default_rng(len(split))
    labels = draw.integers(0, 2, 48).astype(np.int32)
    images = draw.integers(0, 100, (48, 28, 28, 1))
    images[labels == 0, :14] += 150
    images[labels == 1, 14:] += 150
    return ImageExamples(images.astype(np.uint8), labels, ("above", "below"))


@pytest.mark.slow
def test_federated_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fmjax.data.mnist.load_fashion", pictures)
    experiment("federated_images").main(
        [
            *("--output", str(tmp_path / "run"), "--seeds", "1", "--pictures", "48"),
            *("--clients", "4", "--clients-per-round", "2", "--batch-size", "6"),
            *("--rounds", "8", "--every", "4", "--alphas", "0.5"),
            *("--methods", "FedAvg", "FedAdam"),
        ]
    )
    runs = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    assert list(runs) == ["central", "dirichlet 0.5, FedAvg", "dirichlet 0.5, FedAdam"]
    assert {"round 4", "round 8"} <= runs["central"]["0"].keys()
    assert runs["dirichlet 0.5, FedAvg"]["0"]["round 8"] > 0.8
    for ending in ("png", "svg"):
        assert (tmp_path / "run" / f"curves.{ending}").stat().st_size > 1000
    assert "dirichlet 0.5, FedAdam" in capsys.readouterr().out
