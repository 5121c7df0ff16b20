"""What every benchmark of cases does: settings, the loop over cases, the table and the JSON."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cases import Case, select
from record import Row, document, measure_peaks, row, show, write

from fmjax.perf.timing import Compiled, Timing


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the run."""

    cases: tuple[str, ...] = ()
    """Names of the cases; none means all."""
    repeats: int = 7
    """Timed turns of each side."""
    peer: bool = True
    """Whether PyTorch runs too, when it is installed."""
    smoke: bool = False
    """Tiny models, for the tests."""
    json: Path | None = None
    """Where the JSON goes; default benchmarks/results/NAME-DEVICE.json."""


def rows_of(
    case: Case,
    timings: Mapping[str, Timing],
    *,
    compiled: Compiled,
    model_flops: int,
    matmul_peak: float,
    max_difference: float | None,
) -> list[Row]:
    """A row for each side of a case."""
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
            compiled=compiled if side == "fmjax" else None,
            max_difference=max_difference,
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
    rows = [entry for case in chosen for entry in run_case(case, settings, peaks[case.dtype])]
    doc = document(
        benchmark,
        rows,
        repeats=settings.repeats,
        smoke=settings.smoke,
        matmul_peak=peaks,
        load=load,
    )
    show(doc)
    if settings.json is not None or not settings.smoke:
        print(f"wrote {write(doc, settings.json)}")
