"""Experiments that make images, of a few small ones."""

import json

import numpy as np
import pytest
from scripts import experiment

import fmjax


@pytest.mark.slow
@pytest.mark.parametrize("game", ["dcgan", "wgan-gp"])
def test_gan_fashion(game, stripes, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [
        *("--output", str(run), "--data", str(stripes), "--game", game, "--hidden-sizes", "8"),
        *("--latent-size", "8", "--steps", "24", "--batch-size", "8", "--evaluations", "2"),
        *("--measured", "16", "--feature-model", "cnn/tiny", "--learning-rate", "1e-3"),
    ]
    script = experiment("gan_fashion")
    script.main(arguments)
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["fid"] > 0
    assert "of real pictures" in capsys.readouterr().out
    assert sorted(path.stem for path in (run / "samples").iterdir()) == ["12", "24"]
    assert (run / "report.html").read_text().count("<img") == 2
    generator, variables = fmjax.load(run / "export" / "generator")
    images = generator.apply(variables, latents=np.zeros((1, 8))).images
    assert images.shape == (1, 8, 8, 3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("generator/loss" in line for line in lines)
    # The run is over: nothing is trained again.
    script.main(arguments)
    assert json.loads((run / "results.json").read_text()) == results
