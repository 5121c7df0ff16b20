"""The experiments on pictures with texts, on coloured squares and tiny models."""

import json

import numpy as np
import pytest
from scripts import experiment

from fmjax.data.image_text import ImageTexts

pytestmark = pytest.mark.slow  # half a minute of compiling each

COLOURS = np.array([(255, 0, 0), (0, 200, 0)], np.uint8)


def squares(split, *, size):
    """What stands for the emoji of a split."""
    labels = np.arange({"train": 32, "val": 8, "test": 8}[split]) % 2
    images = np.broadcast_to(COLOURS[labels][:, None, None], (len(labels), size, size, 3))
    words = ("a bad plot", "a great film")
    texts = [words[i] for i in labels]
    return ImageTexts(np.array(images), texts, labels.astype(np.int32), ("red", "green"))


def test_caption_emoji(tmp_path, capsys, monkeypatch):
    script = experiment("caption_emoji")
    monkeypatch.setattr(script, "load_emoji_names", squares)
    script.main(
        [
            *("--output", str(tmp_path / "run"), "--encoder", "vit/tiny", "--image-size", "8"),
            *("--layers", "1", "--width", "32", "--vocab-size", "30", "--epochs", "10"),
            *("--batch-size", "8", "--learning-rate", "1e-2", "--max-target-length", "16"),
        ]
    )
    assert "test captioner: bleu" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["token_f1"] > 0.9
    for name in ("report.html", "samples.json", "export/preprocessor_config.json"):
        assert (tmp_path / "run" / name).exists(), name


def test_fusion(tiny_bert, tmp_path, capsys, monkeypatch):
    script = experiment("fusion")
    monkeypatch.setattr(script, "load_emoji_names", squares)
    script.main(
        [
            *("--output", str(tmp_path / "run"), "--text", str(tiny_bert), "--image", "vit/tiny"),
            *("--image-size", "8", "--seeds", "1", "--steps", "30", "--batch-size", "8"),
            *("--width", "32", "--learning-rate", "1e-2"),
        ]
    )
    assert "co-attention" in capsys.readouterr().out
    runs = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    assert list(runs) == list(script.ARMS)
    for name in ("text alone", "image alone", "late"):
        assert runs[name]["0"]["test accuracy"] == 1.0, name
    for name in script.ARMS:
        assert 0 <= runs[name]["0"]["test accuracy"] <= 1
