"""How fast is a BERT forward pass, next to PyTorch sdpa in the same run?

    python benchmarks/forward.py                          about 2 minutes on 2 cores
    python benchmarks/forward.py --cases base-float32 --repeats 11
    python benchmarks/forward.py --smoke                  a tiny model, seconds

BERT-base (12 layers, width 768), 8 sequences of 128 tokens, no dropout, the bare encoder with its
pooler. Weights are float32 on both sides; bfloat16 casts them inside the call, as PyTorch's
autocast does. Run it on an idle machine: other load slows the two sides unequally.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

import jax
import tyro
from cases import (
    BASE,
    Case,
    compare,
    create,
    forward_fn,
    inputs_of,
    make_batch,
    select,
    start_peer,
    torch_is_there,
)
from record import Row, document, measure_peaks, row, show, write

from fmjax.perf.flops import count_flops
from fmjax.perf.timing import compile_time, time_alternately

CASES = tuple(
    Case(f"base-{dtype}", BASE, "model", 8, 128, dtype) for dtype in ("float32", "bfloat16")
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the run."""

    cases: tuple[str, ...] = ()
    """Names of the cases; none means all."""
    repeats: int = 7
    """Timed rounds; in each, fmjax and PyTorch take turns."""
    peer: bool = True
    """Whether PyTorch runs too, when it is installed."""
    smoke: bool = False
    """Tiny models, for the tests."""
    json: Path | None = None
    """Where the JSON goes; default benchmarks/results/forward-DEVICE.json."""


def run_case(case: Case, settings: Settings, peak: float) -> list[Row]:
    """Compare, compile and time one case."""
    model, variables = create(case)
    batch = make_batch(case)
    inputs = jax.device_put(inputs_of(batch))
    forward = forward_fn(model, case)
    compiled = compile_time(jax.jit(forward), variables, inputs)
    thunks = {"fmjax": lambda: jax.block_until_ready(compiled.call(variables, inputs))}
    difference = None
    with contextlib.ExitStack() as stack:
        if settings.peer and torch_is_there():
            peer = stack.enter_context(start_peer(case, model, variables, batch))
            difference = compare(case, model, variables, batch, peer)
            thunks["torch"] = peer.forward
        timings = time_alternately(thunks, repeats=settings.repeats)
    flops = count_flops(forward, variables, inputs).total
    return [
        row(
            timing,
            case=case.name,
            side=side,
            dtype=case.dtype,
            batch_size=case.batch_size,
            length=case.length,
            model_flops=flops,
            matmul_peak=peak,
            compiled=compiled if side == "fmjax" else None,
            max_difference=difference,
        )
        for side, timing in timings.items()
    ]


def main(settings: Settings) -> None:
    """Run the cases, print the table, write the JSON."""
    load = os.getloadavg()[0]
    cases = select(CASES, settings.cases, smoke=settings.smoke)
    peaks = measure_peaks({case.dtype for case in cases}, smoke=settings.smoke)
    rows = [entry for case in cases for entry in run_case(case, settings, peaks[case.dtype])]
    doc = document(
        "forward",
        rows,
        repeats=settings.repeats,
        smoke=settings.smoke,
        matmul_peak=peaks,
        load=load,
    )
    show(doc)
    if settings.json is not None or not settings.smoke:
        print(f"wrote {write(doc, settings.json)}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
