"""Curves of arms over the turns of a loop: kept seed by seed, drawn as one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fmjax.config import write_json

FILE = "curves.json"


def keep_curves(folder: Path, arm: str, seed: int, curves: Mapping[str, Sequence[float]]) -> None:
    """Adds the curves of one run to the folder's curves.json: {name: {arm: {seed: values}}}."""
    file = folder / FILE
    kept = json.loads(file.read_text("utf-8")) if file.exists() else {}
    for name, values in curves.items():
        kept.setdefault(name, {}).setdefault(arm, {})[str(seed)] = [float(v) for v in values]
    write_json(file, kept)


def draw_curves(folder: Path, *, x_label: str) -> Path:
    """Draws curves.json as curves.png: a panel a name, the mean of each arm over seeds, and the
    range of its seeds as a band.

    Args:
        folder: of curves.json; all seeds of a curve have the same length.
        x_label: what is counted along the curves.
    """
    from matplotlib.figure import Figure

    kept = json.loads((folder / FILE).read_text("utf-8"))
    figure = Figure(figsize=(4.6 * len(kept), 3.2), layout="constrained")
    for number, (name, arms) in enumerate(kept.items()):
        axes = figure.add_subplot(1, len(kept), number + 1)
        for arm, by_seed in arms.items():
            values = np.array(list(by_seed.values()))  # [seeds, turns]
            turns = np.arange(1, values.shape[1] + 1)
            (line,) = axes.plot(turns, values.mean(axis=0), label=arm, linewidth=1.6)
            axes.fill_between(
                turns, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(name)
        axes.grid(axis="y", alpha=0.3)
        if number == 0:
            axes.legend(frameon=False)
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    return path
