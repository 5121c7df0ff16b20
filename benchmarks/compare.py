"""Devices side by side: what the result files of several machines say of the same cases.

    python benchmarks/compare.py benchmarks/results/*.json
    python benchmarks/compare.py A.json B.json --chart compared.png

A row is one side of one case on one device: tokens (or pictures) a second, the share of the
device's published peak (MFU) and tokens a joule, where the file has them. All of it was measured;
what a compiler plans for a device that was not there is not in these files.
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
    tokens_per_joule: float | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Result files of benchmarks whose rows are models' (forward, train steps, generation)."""
    chart: Path | None = None
    """Where a picture of tokens a second goes."""


def lines(doc: dict[str, Any]) -> list[Line]:
    """The rows of a result file.

    Raises:
        ValueError: its rows are of another kind.
    """
    wanted = {"case", "side", "dtype", "batch_size", "length", "seconds"}
    if missing := wanted - set.intersection(*({*row} for row in doc["rows"])):
        raise ValueError(
            f"rows of {doc['benchmark']!r} have no {sorted(missing)}; give files of forward.py, "
            "train_step.py, generate.py, vision.py or accelerator.py"
        )
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
                tokens / joules if joules else None,
            )
        )
    return found


def show(found: Sequence[Line]) -> None:
    """Print the table, cases together, the quickest first."""
    table = Table(title="measured")
    for name in ("case", "side", "device", "dtype"):
        table.add_column(name)
    for name in ("tokens/s", "MFU", "tokens/J"):
        table.add_column(name, justify="right")
    for line in sorted(found, key=lambda line: (line.case, -line.tokens_per_second)):
        table.add_row(
            line.case,
            line.side,
            line.device,
            line.dtype,
            f"{line.tokens_per_second:,.0f}",
            "" if line.utilisation is None else f"{line.utilisation:.1%}",
            "" if line.tokens_per_joule is None else f"{line.tokens_per_joule:,.0f}",
        )
    Console(width=None if Console().is_terminal else 140).print(table)


def draw(found: Sequence[Line], path: Path) -> None:
    """A bar for each line on a logarithmic axis: devices are orders of magnitude apart."""
    from matplotlib.figure import Figure

    ordered = sorted(found, key=lambda line: (line.case, line.tokens_per_second), reverse=True)
    figure = Figure(figsize=(9, 1 + 0.28 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    sides = {"fmjax": "tab:blue", "torch": "tab:orange"}
    axes.barh(
        [f"{line.case}, {line.side}\n{line.device}" for line in ordered],
        [line.tokens_per_second for line in ordered],
        color=[sides.get(line.side, "tab:gray") for line in ordered],
    )
    axes.set_xscale("log")
    axes.set_xlabel("tokens or pictures a second, measured")
    axes.tick_params(axis="y", labelsize=6)
    figure.savefig(path, dpi=150)


def main(settings: Settings) -> None:
    """Read, print, draw.

    Raises:
        ValueError: no file, or a file whose rows are of another kind.
    """
    if not settings.files:
        raise ValueError("give at least one result file, such as benchmarks/results/*.json")
    found = [line for path in settings.files for line in lines(json.loads(path.read_text()))]
    show(found)
    if settings.chart is not None:
        draw(found, settings.chart)
        print(f"wrote {settings.chart}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
