"""A plan for people: a table on the terminal and a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmjax.perf.memory import CLASSES
from fmjax.report.run_folder import atomic_write

SHOWN = 3
"""Plans of a kind that are named without having been compiled; the JSON file has all."""


def print_plan(doc: Mapping[str, Any]) -> None:
    """Prints the plans and, of the best one (or the only one), the details."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    target, counted, settings = doc["target"], doc["counted"], doc["settings"]
    console.print(
        f"[bold]{doc['model']}[/bold] ({settings['head']}, {settings['method']}) on "
        f"[bold]{target['name']}[/bold]: {target['chips']} x {target['kind']}, "
        f"{target['memory_bytes'] / 1e9:.1f} GB each"
    )
    console.print(
        f"counted: {counted['parameters']:,} parameters, {counted['trained']:,} trained; a step is "
        f"{counted['tokens']:,} tokens and {counted['model_flops']:.3e} model FLOPs"
    )
    compiled = [row for row in doc["plans"] if "compiled" in row]
    table = Table(title="plans that were compiled")
    for name in ("mesh", "remat", "status"):
        table.add_column(name)
    for name in ("GB a chip\ncompiled", "GB sent\ncompiled", "ms a step\nbound", "limit\nbound"):
        table.add_column(name, justify="right")
    for row in compiled:
        best = doc["best"] is not None and row is doc["plans"][doc["best"]]
        table.add_row(*_cells(row), style="bold" if best else None)
    if compiled:
        console.print(table)
    for status in ("too large", "refused", "not compiled"):
        rows = [row for row in doc["plans"] if row["status"] == status and "compiled" not in row]
        for row in rows[:SHOWN]:
            name = f"{mesh_name(row['mesh'])}, remat {row['remat']}"
            console.print(f"{status}: {name}: {row['reason']}", markup=False)
        if len(rows) > SHOWN:
            console.print(f"{status}: {len(rows) - SHOWN} more, see --json")
    if doc["best"] is None:
        console.print(
            "[bold]nothing that was compiled fits[/bold]: more chips, a smaller batch, more "
            "microbatches or another method need less; --compiles tries more plans"
        )
    if compiled:
        chosen = compiled[0] if doc["best"] is None else doc["plans"][doc["best"]]
        console.print(_details(chosen, doc))


def mesh_name(mesh: Mapping[str, int]) -> str:
    """As ``--mesh`` takes it, without axes of size 1."""
    return ",".join(f"{name}={size}" for name, size in mesh.items() if size > 1) or "one chip"


def _cells(row: Mapping[str, Any]) -> list[str]:
    compiled, bound = row.get("compiled", {}), row.get("bound", {})

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    giga = {
        name: compiled[name] / 1e9 if name in compiled else None
        for name in ("peak_bytes", "sent_bytes")
    }
    seconds = bound.get("step_seconds")
    return [
        mesh_name(row["mesh"]),
        row["remat"],
        row["status"],
        number(giga["peak_bytes"], ".2f"),
        number(giga["sent_bytes"], ".3f"),
        number(None if seconds is None else seconds * 1e3, ".2f"),
        bound.get("limited_by", ""),
    ]


def _details(row: Mapping[str, Any], doc: Mapping[str, Any]) -> Any:
    from rich.table import Table

    compiled, bound = row["compiled"], row.get("bound", {})
    table = Table(title=f"{mesh_name(row['mesh'])}, remat {row['remat']}, a chip")
    table.add_column("what")
    table.add_column("", justify="right")
    table.add_column("from")
    for name, title in CLASSES.items():
        table.add_row(title, f"{compiled['bytes'][name] / 1e9:.3f} GB", "compiled")
    table.add_row("together", f"{compiled['peak_bytes'] / 1e9:.3f} GB", "compiled", style="bold")
    if compiled["host_bytes"]:
        table.add_row("in the host's memory", f"{compiled['host_bytes'] / 1e9:.3f} GB", "compiled")
    table.add_row("read and written", f"{compiled['moved_bytes'] / 1e9:.2f} GB", "compiled")
    for one in compiled["collectives"]:
        table.add_row(
            f"{one['count']} {one['kind']} over {one['group']}",
            f"{one['sent'] / 1e9:.3f} GB sent",
            "compiled",
        )
    if compiled["unknown_loops"]:
        table.add_row("loops counted once", str(compiled["unknown_loops"]), "compiled")
    for name in ("compute", "memory", "interconnect", "host", "step"):
        if f"{name}_seconds" in bound and (name != "host" or bound["host_seconds"]):
            table.add_row(f"{name} time", f"{bound[f'{name}_seconds'] * 1e3:.2f} ms", "bound")
    if "mfu" in bound:
        rate = f"{bound['tokens_per_second']:,.0f}"
        table.add_row("tokens a second, all chips, at the most", rate, "bound")
        table.add_row("MFU, at the most", f"{bound['mfu']:.1%}", "bound")
    if bound.get("cost_per_billion_tokens") is not None:
        cost = f"{bound['cost_per_billion_tokens']:.2f}"
        table.add_row("cost of 1e9 tokens, at the least", cost, "bound")
    for name, value in row.get("measured", {}).items():
        shown = "not known" if value is None else (
            f"{value / 1e9:.3f} GB" if name == "peak_bytes" else f"{value * 1e3:.1f} ms"
        )  # fmt: skip
        table.add_row(name.replace("_", " "), shown, "measured")
    return table


def draw(doc: Mapping[str, Any], path: Path) -> None:
    """Draws the compiled plans: a chip's memory by class, and the bounds of a step.

    Args:
        doc: from `fmjax.recipes.plan.plan`, with something that was compiled.
        path: .png, .svg or .pdf.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = [row for row in doc["plans"] if "compiled" in row]
    names = [f"{mesh_name(row['mesh'])}\nremat {row['remat']}" for row in rows]
    places = list(range(len(rows)))
    figure = Figure(figsize=(11, 2.2 + 0.7 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    start = [0.0] * len(rows)
    for name, title in CLASSES.items():
        sizes = [row["compiled"]["bytes"][name] / 1e9 for row in rows]
        left.barh(places, sizes, left=start, label=title)
        start = [begin + size for begin, size in zip(start, sizes, strict=True)]
    left.axvline(doc["target"]["memory_bytes"] / 1e9, color="black", linestyle="--", label="a chip")
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.set_xlabel("GB a chip (compiled)")
    bounds = [row.get("bound", {}) for row in rows]
    for number, name in enumerate(("compute", "memory", "interconnect", "host")):
        heights = [bound.get(f"{name}_seconds", 0.0) * 1e3 for bound in bounds]
        right.barh([place + 0.2 * (number - 1.5) for place in places], heights, 0.19, label=name)
    right.set_xlabel("ms a step, at the least (bound)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=4)
    figure.suptitle(f"{doc['model']} on {doc['target']['name']}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=150)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
