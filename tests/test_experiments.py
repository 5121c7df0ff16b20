"""Every experiment, run on a few lines of data and a tiny model by its ordinary arguments."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent.parent / "experiments"


def experiment(name):
    """A script of experiments/ as a module."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_pos_tagging(tiny_bert, tmp_path, capsys):
    """Words of two kinds, whose tag is their kind."""
    rng = np.random.default_rng(0)
    kinds = {"A": "wonderful lovely great".split(), "N": "film story actor plot".split()}
    for split, count in (("train", 60), ("val", 10), ("test", 10)):
        lines = []
        for _ in range(count):
            for _ in range(rng.integers(1, 8)):
                tag = str(rng.choice(["A", "N"]))
                lines.append(f"{rng.choice(kinds[tag])} {tag}")
            lines.append("")
        (tmp_path / f"{split}.conll").write_text("\n".join(lines))
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
