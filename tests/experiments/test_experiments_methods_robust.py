"""Experiments on robustness and on few examples, with a few of them."""

import json

import numpy as np
import pytest
from scripts import experiment


@pytest.mark.slow
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


@pytest.mark.slow
def test_fewshot(tiny_bert, tmp_path, capsys, monkeypatch):
    """Made-up domains, each with a word of its own."""
    from conftest import BAD, GOOD, WORDS

    from fmjax.data import TextExamples

    words = [*WORDS, *GOOD, *BAD]
    rng = np.random.default_rng(0)
    labels = np.arange(150) % 15
    texts = [" ".join([words[label], *rng.choice(words, 2)]) for label in labels]
    names = tuple(map(str, range(15)))
    script = experiment("fewshot")
    made = TextExamples(texts=texts, labels=labels, label_names=names, ids=list(map(str, labels)))
    monkeypatch.setattr(script, "load_domains", lambda split: made)
    run = tmp_path / "run"
    script.main(
        [
            *("--output", str(run), "--model", str(tiny_bert), "--ways", "2", "--shots", "2"),
            *("--queries", "2", "--steps", "12", "--measured", "8", "--seeds", "1"),
            *("--learning-rate", "2e-2", "--max-length", "8", "--inner-rate", "0.5"),
        ]
    )
    runs = json.loads((run / "results.json").read_text())["runs"]
    assert len(runs) == 4
    assert runs["prototypes"]["0"]["accuracy"] > 0.7
    assert "| Reptile" in capsys.readouterr().out
