"""What every benchmark of cases does: settings, the loop over cases, the table and the JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from cases import Case, select
from record import Row, document, measure_peaks, own_document, row, save, show, write

from fmjax.perf.timing import Compiled, Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnSettings:
    """Settings that every benchmark has; all, of those whose rows are their own."""

    cases: tuple[str, ...] = ()
    """Names of the cases; none means all."""
    repeats: int = 5
    """Timed turns of each side."""
    smoke: bool = False
    """Tiny models and inputs, for the tests."""
    json: Path | None = None
    """Where the JSON goes; default benchmarks/results/NAME-DEVICE.json."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(OwnSettings):
    """Settings of the run."""

    repeats: int = 7
    """Timed turns of each side."""
    peer: bool = True
    """Whether PyTorch runs too, when it is installed."""
    flax_python: Path | None = None
    """The Python of an environment with transformers' Flax classes, which then run too; see
    flax_peer.py."""
    profile: Path | None = None
    """Where a trace of a few of our train steps goes, by case; none without."""
    wait_for: Path | None = None
    """A file that all runs on one device share, so that they compile together and time alone."""


@contextlib.contextmanager
def turn(path: Path | None, *, alone: bool) -> Iterator[None]:
    """The file locked: with others that compile, or alone, when none compiles or times."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def difference_of(side: str, differences: Mapping[str, float]) -> float | None:
    """A peer's difference, of what `compare` found; of ours the largest; None without peers."""
    return differences.get(side, max(differences.values(), default=None))


def rows_of(
    case: Case,
    timings: Mapping[str, Timing],
    *,
    compiled: Mapping[str, Compiled],
    model_flops: int,
    matmul_peak: float,
    differences: Mapping[str, float],
    peak_bytes: Mapping[str, int | None] = MappingProxyType({}),
    joules: Mapping[str, float | None] = MappingProxyType({}),
) -> list[Row]:
    """A row for each side of a case; what was compiled, peaks of memory and joules by side, and
    what `compare` found."""
    return [
        row(
            timing,
            case=case.name,
            side=side,
            dtype=case.dtype,
            batch_size=case.batch_size,
            length=case.length,
            model_flops=model_flops,
            matmul_peak=matmul_peak,
            compiled=compiled.get(side),
            max_difference=difference_of(side, differences),
            peak_bytes=peak_bytes.get(side),
            joules=joules.get(side),
        )
        for side, timing in timings.items()
    ]


def run(
    benchmark: str,
    cases: Sequence[Case],
    settings: Settings,
    run_case: Callable[[Case, Settings, float], list[Row]],
) -> None:
    """Run the chosen cases, print the table, write the JSON."""
    load = os.getloadavg()[0]
    chosen = select(cases, settings.cases, smoke=settings.smoke)
    peaks = measure_peaks({case.dtype for case in chosen}, smoke=settings.smoke)
    rows, path = [], None
    for case in chosen:
        rows += run_case(case, settings, peaks[case.dtype])
        doc = document(
            benchmark,
            rows,
            repeats=settings.repeats,
            smoke=settings.smoke,
            matmul_peak=peaks,
            load=load,
        )
        if settings.json is not None or not settings.smoke:
            path = write(doc, settings.json)  # after each: what was measured is kept
        show(doc)
    if path is not None:
        print(f"wrote {path}")


AnyCase = TypeVar("AnyCase")
AnyRow = TypeVar("AnyRow")


def run_own(
    benchmark: str,
    schema: int,
    cases: Sequence[AnyCase],
    settings: OwnSettings,
    run_case: Callable[[AnyCase], Sequence[AnyRow]],
    *,
    ratios_of: Callable[[list[AnyRow]], Mapping[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> None:
    """`run` of a benchmark that has rows of its own.

    Args:
        schema: the version of its rows and ratios.
        cases: the chosen ones.
        run_case: the rows of one.
        ratios_of: what the document's ratios are of all rows so far.
        show: prints the document.
    """
    load = os.getloadavg()[0]
    rows: list[AnyRow] = []
    doc, path = {}, None
    for case in cases:
        rows += run_case(case)
        doc = own_document(
            benchmark,
            schema,
            rows,
            ratios_of(rows),
            repeats=settings.repeats,
            smoke=settings.smoke,
            load=load,
        )
        if settings.json is not None or not settings.smoke:
            path = save(doc, settings.json)  # after each: what was measured is kept
    show(doc)
    if path is not None:
        print(f"wrote {path}")
