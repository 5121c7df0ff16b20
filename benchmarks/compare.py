"""Devices side by side: what the result files of several machines say of the same cases.

    python benchmarks/compare.py benchmarks/results/*.json
    python benchmarks/compare.py A.json B.json --chart compared.png

A row is one side of one case on one device: tokens (or pictures) a second, the share of the
device's published peak (MFU), that of the pace of a plain matrix product in the same run, and
tokens a joule, where the file has them. All of it was measured; what a compiler plans for a device
that was not there is not in these files. Files with rows of another kind are left out, and named.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from record import device_slug
from rich.console import Console
from rich.table import Table


class Line(NamedTuple):
    """One side of one case on one device; None where the file does not say."""

    case: str
    side: str
    device: str
    dtype: str
    tokens_per_second: float
    utilisation: float | None
    peak_share: float | None
    tokens_per_joule: float | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Result files of benchmarks whose rows are models' (forward, train steps, generation)."""
    chart: Path | None = None
    """Where a picture of tokens a second goes."""


WANTED = frozenset(("case", "side", "dtype", "batch_size", "length", "seconds"))
KINDS = (
    "give files of forward.py, train_step.py, generate.py, vision.py, speech.py, accelerator.py or "
    "attention.py"
)


def missing_fields(doc: dict[str, Any]) -> list[str]:
    """What the rows of a result file lack to be compared."""
    rows = [set(row) for row in doc["rows"]]
    return sorted(WANTED - set.intersection(*rows) if rows else WANTED)


def lines(doc: dict[str, Any]) -> list[Line]:
    """The rows of a result file.

    Raises:
        ValueError: its rows are of another kind.
    """
    if missing := missing_fields(doc):
        raise ValueError(f"rows of {doc['benchmark']!r} have no {missing}; {KINDS}")
    device = device_slug(doc["machine"])
    found = []
    for row in doc["rows"]:
        tokens, joules = row["batch_size"] * row["length"], row.get("joules")
        found.append(
            Line(
                row["case"],
                row["side"],
                device,
                row["dtype"],
                tokens / row["seconds"]["median"],
                row.get("published_share"),
                row.get("peak_share"),
                tokens / joules if joules else None,
            )
        )
    return found


def show(found: Sequence[Line]) -> None:
    """Print the table, cases together, the quickest first."""
    table = Table(title="measured")
    for name in ("case", "side", "device", "dtype"):
        table.add_column(name)
    for name in ("tokens/s", "MFU", "of measured peak", "tokens/J"):
        table.add_column(name, justify="right")
    for line in sorted(found, key=lambda line: (line.case, -line.tokens_per_second)):
        table.add_row(
            line.case,
            line.side,
            line.device,
            line.dtype,
            f"{line.tokens_per_second:,.0f}",
            "" if line.utilisation is None else f"{line.utilisation:.1%}",
            "" if line.peak_share is None else f"{line.peak_share:.1%}",
            "" if line.tokens_per_joule is None else f"{line.tokens_per_joule:,.0f}",
        )
    Console(width=None if Console().is_terminal else 140).print(table)


def draw(found: Sequence[Line], path: Path) -> None:
    """A picture: bars of tokens a second and a joule, on logarithmic axes because devices are
    orders of magnitude apart, and of the shares, where there are some."""
    from matplotlib.figure import Figure

    ordered = sorted(found, key=lambda line: (line.case, line.tokens_per_second), reverse=True)
    panels: list[tuple[str, list[float | None]]] = [
        ("tokens or pictures a second", [line.tokens_per_second for line in ordered]),
        ("share of the published peak (MFU)", [line.utilisation for line in ordered]),
        ("share of the measured peak", [line.peak_share for line in ordered]),
        ("tokens or pictures a joule", [line.tokens_per_joule for line in ordered]),
    ]
    panels = [(title, values) for title, values in panels if any(values)]
    size = (5 + 4 * len(panels), 1 + 0.28 * len(ordered))
    figure = Figure(figsize=size, layout="constrained")
    sides = {"fmjax": "tab:blue", "torch": "tab:orange", "hf-flax": "tab:green"}
    names = [f"{line.case}, {line.side}\n{line.device}" for line in ordered]
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for place, (title, values) in zip(axes, panels, strict=True):
        place.barh(
            range(len(ordered)),
            [value or 0.0 for value in values],
            color=[sides.get(line.side, "tab:gray") for line in ordered],
        )
        place.set_xlabel(f"{title}, measured")
        if title.startswith("tokens"):
            place.set_xscale("log")
    axes[0].set_ylim(-0.5, len(ordered) - 0.5)
    axes[0].set_yticks(range(len(ordered)), names, fontsize=6)
    figure.savefig(path, dpi=150)


def main(settings: Settings) -> None:
    """Read, print, draw.

    Raises:
        ValueError: no file, or none whose rows are models'.
    """
    if not settings.files:
        raise ValueError("give at least one result file, such as benchmarks/results/*.json")
    found, others = [], []
    for path in settings.files:
        doc = json.loads(path.read_text())
        if missing_fields(doc):
            others.append(path.name)
        else:
            found += lines(doc)
    if others:
        print(f"left out, as their rows are of another kind: {', '.join(others)}")
    if not found:
        raise ValueError("none of the files has rows of models; " + KINDS)
    show(found)
    if settings.chart is not None:
        draw(found, settings.chart)
        print(f"wrote {settings.chart}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
