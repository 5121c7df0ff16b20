"""Every experiment, run on a few lines of data and a tiny model by its ordinary arguments."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "experiments"
sys.path.append(str(FOLDER))  # as when a script is run


def experiment(name):
    """A script of experiments/ as a module."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def write_tagged(folder):
    """Words of two kinds, whose tag is their kind, in three files in columns."""
    rng = np.random.default_rng(0)
    kinds = {"A": "wonderful lovely great".split(), "N": "film story actor plot".split()}
    for split, count in (("train", 60), ("val", 10), ("test", 10)):
        lines = []
        for _ in range(count):
            for _ in range(rng.integers(1, 8)):
                tag = str(rng.choice(["A", "N"]))
                lines.append(f"{rng.choice(kinds[tag])} {tag}")
            lines.append("")
        (folder / f"{split}.conll").write_text("\n".join(lines))


def test_pos_tagging(tiny_bert, tmp_path, capsys):
    write_tagged(tmp_path)
    run = tmp_path / "run"
    files = [
        part
        for split, name in (("data", "train"), ("val", "val"), ("test", "test"))
        for part in (f"--{split}", str(tmp_path / f"{name}.conll"))
    ]
    experiment("pos_tagging").main(
        [
            *("--output", str(run), "--model", str(tiny_bert), *files, "--epochs", "12"),
            *("--batch-size", "8", "--learning-rate", "1e-2", "--max-length", "16"),
        ]
    )
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["accuracy"] > 0.9
    assert "accuracy" in capsys.readouterr().out
    for name in ("report.html", "samples.json", "export/model.safetensors"):
        assert (run / name).exists(), name


TEXTS = [
    f"the {adjective} {noun} is {mood}, and the {noun} was {adjective} .\nit is {mood} ."
    for adjective in ("old", "new", "red", "long")
    for noun in ("film", "story", "plot", "scene", "actor")
    for mood in ("good", "bad", "quiet")
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Arguments that name three small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    parts = {"data": TEXTS[6:] * 3, "val": TEXTS[:3], "test": TEXTS[3:6]}
    arguments = []
    for name, texts in parts.items():
        (folder / f"{name}.txt").write_text("\n\n".join(texts) + "\n")
        arguments += [f"--{name}", str(folder / f"{name}.txt")]
    return arguments


def test_pretrain_gpt(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    experiment("pretrain_gpt").main(
        [
            *("--output", str(run), *corpus, "--vocab-size", "300", "--layers", "1"),
            *("--width", "32", "--length", "32", "--batch-size", "4", "--epochs", "4"),
            *("--learning-rate", "1e-2", "--sample-tokens", "8", "--ngram", "3"),
        ]
    )
    results = json.loads((run / "results.json").read_text())
    bits = results["test"]["bits_per_byte"]
    assert 0 < bits < 2  # a random model of 300 tokens has about 3
    assert results["baselines"]["byte 3-gram"]["test"]["bits_per_byte"] < 2
    assert len(results["samples"]) >= 1
    assert "bits per byte" in capsys.readouterr().out
    assert (run / "export" / "tokenizer.json").exists()


def test_pretrain_bert(corpus, tmp_path, capsys):
    write_tagged(tmp_path)
    run = tmp_path / "run"
    tagged = {"tagged": "train", "tagged-val": "val", "tagged-test": "test"}
    files = [
        part
        for name, split in tagged.items()
        for part in (f"--{name}", f"{tmp_path}/{split}.conll")
    ]
    experiment("pretrain_bert").main(
        [
            *("--output", str(run), *corpus, *files, "--vocab-size", "120", "--layers", "1"),
            *("--width", "32", "--max-length", "24", "--batch-size", "8", "--copies", "6"),
            *("--learning-rate", "1e-2", "--tagged-epochs", "2"),
        ]
    )
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["masked_accuracy"] > 0.3
    assert 0 <= results["test"]["next_sentence_accuracy"] <= 1
    for name in ("pretrained", "random"):
        assert 0 < results["tagging"][name]["test"]["accuracy"] <= 1
        assert (run / f"tagged-{name}" / "report.html").exists()
    assert "tagging from pretrained weights" in capsys.readouterr().out
