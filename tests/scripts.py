"""Scripts of experiments/ as modules, whose `main` takes the ordinary arguments."""

import importlib.util
import sys
from pathlib import Path

import numpy as np

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
    for split, count in (("train", 120), ("val", 10), ("test", 10)):
        lines = []
        for _ in range(count):
            for _ in range(rng.integers(2, 7)):  # with [CLS] and [SEP], one bucket
                tag = str(rng.choice(["A", "N"]))
                lines.append(f"{rng.choice(kinds[tag])} {tag}")
            lines.append("")
        (folder / f"{split}.conll").write_text("\n".join(lines))
