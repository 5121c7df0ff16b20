"""What does it cost to divide one train step over devices, and over processes?

    python benchmarks/scaling.py                          about 5 minutes on 2 cores
    python benchmarks/scaling.py --cases devices-1-data devices-4-fsdp processes-2-data
    python benchmarks/scaling.py --smoke                  a tiny model, seconds

A step of BERT-small (4 layers, width 512; masked language modelling, 16 x 64 tokens, AdamW,
float32) on 1, 2, 4 and 8 devices that one process pretends to have, and in 1, 2 and 4 processes of
one device on this machine, which talk over loopback (gloo). The batch is the same whole one, so
each device has less of it; "data" divides examples, "fsdp" the state too. All must have the same
first loss.

These devices are no more than the machine's cores, all of which a single one may use: no speed is
to be gained where there are no cores for it, and the JSON says how many there are. What can be read
from it on any machine is work, seconds of processors an example in all processes together: above
that of one device it is what dividing costs (collectives, copies, smaller products, and waiting
that spins).
"""

from __future__ import annotations

import dataclasses
import os
import socket
from concurrent.futures import ThreadPoolExecutor, as_completed
from statistics import median
from typing import Any, Literal

import tyro
from child import answer, begin
from record import named, print_rows
from run import OwnSettings, run_own

from fmjax.perf.timing import Timing

SCHEMA = 1  # of this benchmark's own document: the fields of `Row`, and `ratios_of` them
SAME_LOSS = 1e-4
Axis = Literal["data", "fsdp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(OwnSettings):
    """Settings of the run."""

    cases: tuple[str, ...] = ()
    """Names of the cases; none means all. The first is what the others are compared with."""
    repeats: int = 7
    """Timed steps."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Processes, devices of each, and what the mesh's only axis divides."""

    name: str
    processes: int
    devices: int
    axis: Axis
    variant: str = "small"
    batch_size: int = 16
    length: int = 64


AXES: tuple[Axis, ...] = ("data", "fsdp")
CASES = (
    *(Case(f"devices-{n}-{axis}", 1, n, axis) for axis in AXES for n in (1, 2, 4, 8)),
    *(Case(f"processes-{n}-{axis}", n, 1, axis) for axis in AXES for n in (2, 4)),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        case: its name.
        parallelism: what is divided, "data" or "fsdp".
        processes, devices: how many; devices of all processes together.
        cores: of the machine.
        batch_size, length: B and T, over all devices.
        seconds: {"min", "median", "max", "all"} of a step, by the slowest process.
        examples_per_second: from the median.
        cpu_seconds_per_example: of processors, all processes together, the median step's.
        state_bytes: on one device.
        loss: the first.
    """

    case: str
    parallelism: str
    processes: int
    devices: int
    cores: int
    batch_size: int
    length: int
    seconds: dict[str, Any]
    examples_per_second: float
    cpu_seconds_per_example: float
    state_bytes: int
    loss: float


def run_case(case: Case, settings: Settings) -> Row:
    """Run all processes of one case.

    Raises:
        ValueError: one of them failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = os.environ.get("XLA_FLAGS", "")
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={case.devices}".strip(),
    }
    what = [case.variant, case.batch_size, case.length, case.axis, settings.repeats, case.processes]
    started = [
        begin("scale_once.py", [*map(str, what), str(index), str(port)], environment)
        for index in range(case.processes)
    ]
    with ThreadPoolExecutor(len(started)) as pool:  # all are read, lest one waits to be
        try:
            answers = [pool.submit(answer, process) for process in started]
            for one in as_completed(answers):
                one.result()  # the first that fails, whichever it is
            found = [one.result() for one in answers]
        finally:
            for process in started:
                process.kill()  # one that waits for another that has failed
    steps = [max(times) for times in zip(*(one["seconds"] for one in found), strict=True)]
    used = [sum(times) for times in zip(*(one["cpu_seconds"] for one in found), strict=True)]
    timing = Timing.of(steps)
    return Row(
        case=case.name,
        parallelism=case.axis,
        processes=case.processes,
        devices=found[0]["devices"],
        cores=os.cpu_count() or 1,
        batch_size=case.batch_size,
        length=case.length,
        seconds=dataclasses.asdict(timing),
        examples_per_second=case.batch_size / timing.median,
        cpu_seconds_per_example=median(used) / case.batch_size,
        state_bytes=found[0]["state_bytes"],
        loss=found[0]["loss"],
    )


def ratios_of(rows: list[Row]) -> dict[str, dict[str, float]]:
    """{case: {"speed", "work"}}: examples a second, and seconds of processors an example, over
    those of the first case.

    Raises:
        ValueError: a case has another loss: it computed something else.
    """
    first = rows[0]
    for row in rows:
        if abs(row.loss - first.loss) > SAME_LOSS * abs(first.loss):
            raise ValueError(
                f"{row.case} begins with a loss of {row.loss} and {first.case} with {first.loss}; "
                "their times are not comparable"
            )
    return {
        row.case: {
            "speed": row.examples_per_second / first.examples_per_second,
            "work": row.cpu_seconds_per_example / first.cpu_seconds_per_example,
        }
        for row in rows
    }


def select(settings: Settings) -> list[Case]:
    """The chosen cases; for a smoke run, made tiny.

    Raises:
        ValueError: an unknown name.
    """
    chosen = named(CASES, settings.cases)
    if settings.smoke:
        tiny = {"variant": "tiny", "batch_size": 8, "length": 8}
        chosen = [dataclasses.replace(case, **tiny) for case in chosen]
    return chosen


def show(doc: dict[str, Any]) -> None:
    """Print a document as a table."""
    ratios = doc["ratios"]
    print_rows(
        doc,
        {
            "case": lambda row: row["case"],
            "processes": lambda row: str(row["processes"]),
            "devices": lambda row: str(row["devices"]),
            "median ms": lambda row: f"{1e3 * row['seconds']['median']:,.1f}",
            "examples/s": lambda row: f"{row['examples_per_second']:,.1f}",
            "CPU ms an example": lambda row: f"{1e3 * row['cpu_seconds_per_example']:,.1f}",
            "state MB a device": lambda row: f"{row['state_bytes'] / 1e6:,.1f}",
            "speed": lambda row: f"{ratios[row['case']]['speed']:.2f}",
            "work": lambda row: f"{ratios[row['case']]['work']:.2f}",
        },
        caption="speed and work are over those of the first case",
        words=1,
    )


def main(settings: Settings) -> None:
    """Run the chosen cases, print the table, write the JSON."""
    run_own(
        "scaling",
        SCHEMA,
        select(settings),
        settings,
        lambda case: [run_case(case, settings)],
        ratios_of=ratios_of,
        show=show,
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
