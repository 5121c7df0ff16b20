"""Experiments on robustness, with a few pictures."""

import json

import pytest
from scripts import experiment


def test_adversarial_images(stripes, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [
        *("--output", str(run), "--data", str(stripes), "--hidden-sizes", "4"),
        *("--dense-size", "8", "--steps", "40", "--batch-size", "16", "--attack-steps", "2"),
        *("--learning-rate", "2e-2", "--measured-steps", "3", "--epsilon", "0.3"),
    ]
    script = experiment("adversarial_images")
    script.main([*arguments, "--seeds", "1"])
    runs = json.loads((run / "results.json").read_text())["runs"]
    assert list(runs) == ["plain", "FGSM from a random start", "PGD-2", "TRADES"]
    clean, attacked = (runs["plain"]["0"][name] for name in ("clean", "PGD-3"))
    assert clean > 0.85
    assert attacked < clean
    assert runs["PGD-2"]["0"]["PGD-3"] > attacked
    # What is there is not run again; other settings are refused.
    capsys.readouterr()
    script.main([*arguments, "--seeds", "1"])
    printed = capsys.readouterr().out
    assert "seed 0" not in printed
    assert "| TRADES" in printed
    with pytest.raises(ValueError, match="other settings"):
        script.main([*arguments, "--seeds", "1", "--beta", "2.0"])
