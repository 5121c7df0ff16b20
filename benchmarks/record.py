"""One schema for every benchmark: what a row is, the table it prints, the JSON it becomes.

`python benchmarks/NAME.py` writes `benchmarks/results/NAME-DEVICE.json`:

    {"schema": 3, "benchmark": NAME, "started": ISO time, "repeats": n, "smoke": false,
     "machine": fmjax.perf.device.describe_machine(),
     "commit": of the working tree, with "+" where files differ from it; null outside git,
     "load_before": the machine's load average when the run began; 0 is idle,
     "matmul_peak": {"float32": FLOP/s, ...},           measured in the same run
     "rows": [one object per case and side: the fields of `Row`],
     "ratios": {case: PyTorch's median time / fmjax's},  > 1 means fmjax is faster
     "peak_memory": {"host": bytes, "device": bytes or null}}   of the whole process
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from fmjax.perf.device import describe_machine, measure_matmul_peak, published_peak, slug
from fmjax.perf.timing import Compiled, Timing, peak_memory_bytes

SCHEMA = 3
SMOKE_SHAPES = ((256, 256, 256),)


@dataclasses.dataclass(frozen=True)
class Row:
    """One side of one case.

    Attributes:
        case: its name.
        side: "fmjax", "torch" or "hf-flax"; of a train step's other ways "mesh", "pmap" and
            "accumulate-4".
        dtype: of the matrix products, "float32" or "bfloat16".
        batch_size: B, examples.
        length: T, tokens.
        seconds: {"min", "median", "max", "all"} of a step.
        examples_per_second, tokens_per_second: from the median.
        model_flops: FLOPs of a step, counted from the jaxpr of the plain loss; both sides compute
            the same function, so both carry fmjax's count.
        peak_share: model FLOPs per second, over the measured matmul peak of `dtype`.
        compile_seconds: {"lower", "compile"}; None for the peer, a mesh and pmap.
        planned_bytes: what the compiler plans to hold: arguments, outputs that do not reuse them,
            temporaries; None for the same.
        max_difference: largest difference of the side's logits from ours, over the largest logit
            (of ours, from any side's), measured before anything was timed; None without a peer.
        weight_bytes_per_second: of generation, bytes of all weights times tokens of a text, over
            the median; else None.
        bandwidth_share: the same over that of a matrix-vector product in the same run.
        published_share: model FLOPs per second, over the device's published bf16 peak (MFU,
            Chowdhery et al. 2022, arXiv:2204.02311, appendix B); None where none is published.
        peak_bytes: the most that the side held on the device; None where it does not say. Ours
            includes what was compared before.
        joules: of the device per step, from a run of its own; None where it does not say.
    """

    case: str
    side: str
    dtype: str
    batch_size: int
    length: int
    seconds: dict[str, Any]
    examples_per_second: float
    tokens_per_second: float
    model_flops: int
    peak_share: float
    compile_seconds: dict[str, float] | None
    planned_bytes: int | None
    max_difference: float | None
    weight_bytes_per_second: float | None = None
    bandwidth_share: float | None = None
    published_share: float | None = None
    peak_bytes: int | None = None
    joules: float | None = None


def row(
    timing: Timing,
    *,
    case: str,
    side: str,
    dtype: str,
    batch_size: int,
    length: int,
    model_flops: int,
    matmul_peak: float,
    compiled: Compiled | None,
    max_difference: float | None,
    peak_bytes: int | None = None,
    joules: float | None = None,
) -> Row:
    """A row from what was measured; see `Row`."""
    compile_seconds = planned = None
    if compiled is not None:
        compile_seconds = {"lower": compiled.lower_seconds, "compile": compiled.compile_seconds}
        planned = compiled.planned_bytes
    published = published_peak(jax.devices()[0].device_kind)
    return Row(
        case=case,
        side=side,
        dtype=dtype,
        batch_size=batch_size,
        length=length,
        seconds=dataclasses.asdict(timing),
        examples_per_second=batch_size / timing.median,
        tokens_per_second=batch_size * length / timing.median,
        model_flops=model_flops,
        peak_share=model_flops / timing.median / matmul_peak,
        compile_seconds=compile_seconds,
        planned_bytes=planned,
        max_difference=max_difference,
        published_share=model_flops / timing.median / published.bf16 if published else None,
        peak_bytes=peak_bytes,
        joules=joules,
    )


def measure_peaks(dtypes: set[str], *, smoke: bool) -> dict[str, float]:
    """The measured matmul peak of each dtype, FLOP/s."""
    shapes = SMOKE_SHAPES if smoke else None
    return {dtype: measure_matmul_peak(jnp.dtype(dtype), shapes=shapes) for dtype in sorted(dtypes)}


def commit() -> str | None:
    """The commit that is checked out here, with "+" where tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    if head.returncode or changes.returncode:
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def own_document(
    benchmark: str,
    schema: int,
    rows: Sequence[Any],
    ratios: Mapping[str, Any],
    *,
    repeats: int,
    smoke: bool,
    load: float,
) -> dict[str, Any]:
    """What a benchmark with rows of its own kind writes.

    Args:
        benchmark: its name.
        schema: of its rows and ratios.
        rows: dataclasses.
        ratios: by case.
        repeats, smoke: of its settings.
        load: of the machine before it began.
    """
    return {
        "schema": schema,
        "benchmark": benchmark,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "repeats": repeats,
        "smoke": smoke,
        "machine": describe_machine(),
        "commit": commit(),
        "load_before": load,
        "rows": [json.loads(json.dumps(dataclasses.asdict(r))) for r in rows],
        "ratios": ratios,
        "peak_memory": peak_memory_bytes()._asdict(),
    }


def document(
    benchmark: str,
    rows: Sequence[Row],
    *,
    repeats: int,
    smoke: bool,
    matmul_peak: Mapping[str, float],
    load: float,
) -> dict[str, Any]:
    """The JSON document of a run, in the schema above."""
    medians = {(r.case, r.side): r.seconds["median"] for r in rows}
    ratios = {
        case: seconds / medians[case, "fmjax"]
        for (case, side), seconds in medians.items()
        if side == "torch"
    }
    doc = own_document(benchmark, SCHEMA, rows, ratios, repeats=repeats, smoke=smoke, load=load)
    return doc | {"matmul_peak": dict(matmul_peak)}


def check(doc: Mapping[str, Any]) -> None:
    """Whether a document has the schema.

    Raises:
        ValueError: it does not; every problem is listed.
    """
    problems = []
    keys = {
        "schema", "benchmark", "started", "repeats", "smoke", "machine", "commit", "load_before",
        "matmul_peak", "rows", "ratios", "peak_memory",
    }  # fmt: skip
    if wrong := keys ^ doc.keys():
        problems.append(f"keys {sorted(wrong)} are missing or unknown")
    if doc.get("schema") != SCHEMA:
        problems.append(f"schema is {doc.get('schema')!r}, this code writes {SCHEMA}")
    fields = {field.name for field in dataclasses.fields(Row)}
    for i, entry in enumerate(doc.get("rows", ())):
        if wrong := fields ^ entry.keys():
            problems.append(f"row {i}: fields {sorted(wrong)} are missing or unknown")
            continue
        seconds = entry["seconds"]
        if not 0 < seconds["min"] <= seconds["median"] <= seconds["max"]:
            problems.append(f"row {i}: seconds {seconds} are not in order")
        if len(seconds["all"]) != doc.get("repeats"):
            problems.append(f"row {i}: {len(seconds['all'])} times, not {doc.get('repeats')}")
        if entry["model_flops"] <= 0 or entry["peak_share"] <= 0:
            problems.append(f"row {i}: no FLOPs")
    if problems:
        raise ValueError("not a benchmark document: " + "; ".join(problems))


def device_slug(machine: Mapping[str, Any]) -> str:
    """The device in a file name: its kind; for a CPU its model and core count."""
    device = machine["devices"][0]
    if device["platform"] == "cpu":
        name = f"{machine['cpu']} {machine['cores']} cores"
    else:
        name = f"{device['kind']} x{device['count']}"
    return slug(name)


def write(doc: Mapping[str, Any], path: Path | None) -> Path:
    """Check a document and `save` it."""
    check(doc)
    return save(doc, path)


class Named(Protocol):
    """What is chosen by its name."""

    @property
    def name(self) -> str: ...


AnyCase = TypeVar("AnyCase", bound=Named)


def named(cases: Sequence[AnyCase], names: Sequence[str]) -> list[AnyCase]:
    """The cases with these names, all if none are given.

    Raises:
        ValueError: an unknown name.
    """
    known = {case.name: case for case in cases}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown cases {unknown}; choose from {list(known)}")
    return [known[name] for name in names] if names else list(cases)


def save(doc: Mapping[str, Any], path: Path | None) -> Path:
    """Write a document; the default place is `benchmarks/results/NAME-DEVICE.json`."""
    if path is None:
        name = f"{doc['benchmark']}-{device_slug(doc['machine'])}.json"
        path = Path(__file__).parent / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(doc, indent=1) + "\n")
    os.replace(partial, path)
    return path


def show(doc: Mapping[str, Any]) -> None:
    """Print a document as a table."""
    machine = doc["machine"]
    device = machine["devices"][0]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    peaks = ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in doc["matmul_peak"].items())
    table = Table(
        title=f"{doc['benchmark']} on {device['count']} x {device['kind']} "
        f"({machine['cpu']}, {machine['cores']} cores)",
        caption=f"Python {machine['python']}, {versions}\nmeasured matmul peak: {peaks}; "
        f"peak resident memory {doc['peak_memory']['host'] / 1e9:.2f} GB; "
        f"load before {doc['load_before']:.1f}",
    )
    table.add_column("case")
    table.add_column("side")
    for column in (
        "min ms", "median ms", "max ms", "examples/s", "tokens/s", "GFLOP", "of peak",
        "MFU", "tokens/J", "weights GB/s", "of matvec", "compile s", "planned GB", "peak GB",
        "of fmjax",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    medians = {
        row["case"]: row["seconds"]["median"] for row in doc["rows"] if row["side"] == "fmjax"
    }
    for entry in doc["rows"]:
        seconds, compiling = entry["seconds"], entry["compile_seconds"]
        table.add_row(
            entry["case"],
            entry["side"],
            *(f"{1e3 * seconds[key]:,.1f}" for key in ("min", "median", "max")),
            f"{entry['examples_per_second']:,.1f}",
            f"{entry['tokens_per_second']:,.0f}",
            f"{entry['model_flops'] / 1e9:,.1f}",
            f"{entry['peak_share']:.0%}",
            or_empty(entry["published_share"], lambda x: f"{x:.1%}"),
            or_empty(
                entry["joules"],
                lambda x, entry=entry: f"{entry['batch_size'] * entry['length'] / x:,.0f}",
            ),
            or_empty(entry["weight_bytes_per_second"], lambda x: f"{x / 1e9:.1f}"),
            or_empty(entry["bandwidth_share"], lambda x: f"{x:.0%}"),
            f"{sum(compiling.values()):.1f}" if compiling else "",
            f"{entry['planned_bytes'] / 1e9:.2f}" if entry["planned_bytes"] else "",
            or_empty(entry["peak_bytes"], lambda x: f"{x / 1e9:.1f}"),
            f"{seconds['median'] / medians[entry['case']]:.2f}",
        )
    # A pipe has no width of its own; 80 columns would fold every cell.
    Console(width=None if Console().is_terminal else 240).print(table)


def or_empty(value: float | None, show: Callable[[float], str]) -> str:
    """A number as it is shown, or nothing where it is not known."""
    return "" if value is None else show(value)


def print_rows(
    doc: Mapping[str, Any],
    columns: Mapping[str, Callable[[dict[str, Any]], str]],
    *,
    caption: str,
    words: int = 2,
) -> None:
    """Print a document of a benchmark's own rows as a table.

    Args:
        columns: by title, what a row has there.
        caption: what else must be known to read it.
        words: how many columns, the first ones, are words; the others are numbers.
    """
    machine = doc["machine"]
    device = machine["devices"][0]
    table = Table(
        title=f"{doc['benchmark']} on {device['count']} x {device['kind']} "
        f"({machine['cpu']}, {machine['cores']} cores)",
        caption=f"load before {doc['load_before']:.1f}; {caption}",
    )
    for place, title in enumerate(columns):
        table.add_column(title, justify="left" if place < words else "right")
    for entry in doc["rows"]:
        table.add_row(*(cell(entry) for cell in columns.values()))
    Console(width=None if Console().is_terminal else 200).print(table)
