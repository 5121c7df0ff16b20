"""How long do train steps compile, and what does the compile cache leave of a second start?

    python benchmarks/compile_time.py                     about 10 minutes on 2 cores
    python benchmarks/compile_time.py --cases bert-base start-train
    python benchmarks/compile_time.py --smoke             tiny models, seconds

Of families, the whole train step with AdamW in float32 (masked or causal language modelling, T5's
sequences, pictures), as JAX compiles it without its cache: layers one after the other ("loop"), and
one layer scanned ("scan"). "trace" is Python, tracing and lowering, "compile" is XLA.

The cases "start-..." are two processes in a cache folder that is empty before the first: a training
run of BERT-base (8 x 128 tokens) until its step is compiled, with what each stage took, and the
whole command ``fmjax generate`` of GPT-2 small for 4 tokens. Another one before them lets Python
keep the bytecode of what they import, as most installations have it from the beginning. Seconds of
processors are beside those of the clock, which other work on the machine moves more.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, cast

import jax
import tyro
from cases import TINY
from child import last_line, run_command
from record import named, or_empty, print_rows
from run import OwnSettings, run_own

import fmjax
from fmjax.data import train_tokenizer
from fmjax.models import family_of
from fmjax.perf.timing import Timing, compile_time
from fmjax.recipes.planned_step import Work, describe
from fmjax.train import gradient, jit_step, make_train_step

SCHEMA = 1  # of this benchmark's own document: the fields of `Row`, and `ratios_of` them
HERE = Path(__file__).parent
# Where JAX would keep what it compiles; what would have every process compile all that it imports.
UNSET = ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE")
WORDS = 300
TEXTS = ("the film was quiet and stays with you for days",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(OwnSettings):
    """Settings of the run."""

    repeats: int = 3
    """Compilations, and pairs of starts."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model as `fmjax plan` names it, and B x T tokens; what starts has a kind of its own."""

    name: str
    model: str
    head: str
    batch_size: int
    length: int
    start: str | None = None


CASES = (
    Case("bert-base", "bert/base", "masked_lm", 8, 128),
    Case("gpt2-small", "gpt2/base", "causal_lm", 4, 256),
    Case("llama-1b", "llama/3.2-1b", "causal_lm", 1, 512),
    Case("t5-base", "t5/base", "seq2seq_lm", 8, 128),
    Case("vit-b16", "vit/b16", "image_classification", 8, 1),
    Case("start-train", "bert/base", "masked_lm", 8, 128, start="train"),
    Case("start-generate", "gpt2/base", "causal_lm", 1, 4, start="generate"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One side of one case.

    Attributes:
        case: its name.
        side: "loop" or "scan"; of a start, "first" or "second".
        seconds: {"min", "median", "max", "all"} of tracing and compiling, or of the start.
        cpu_seconds: of processors, the median; None where only the clock was read.
        stages: seconds of the parts, medians, by name; of a start in seconds of processors.
        planned_bytes: what the compiled step plans to hold; None of starts.
    """

    case: str
    side: str
    seconds: dict[str, Any]
    cpu_seconds: float | None
    stages: dict[str, float]
    planned_bytes: int | None


def run_case(case: Case, settings: Settings) -> list[Row]:
    """Compile or start one case."""
    if case.start is None:
        return [compiled_row(case, scan, settings) for scan in (False, True)]
    return started_rows(case, settings)


def compiled_row(case: Case, scan: bool, settings: Settings) -> Row:
    """A row of compilations, each from nothing."""
    work = Work(
        batch=case.batch_size, length=case.length, head=case.head, precision="float32", scan=scan
    )
    step = describe(case.model, work)
    train_step = make_train_step(gradient(step.loss(remat="none")), step.tx)
    found = []
    for _ in range(settings.repeats):
        jax.clear_caches()
        jitted = cast(jax.stages.Wrapped, jit_step(train_step))
        found.append(compile_time(jitted, step.state, step.batch))
    return Row(
        case=case.name,
        side="scan" if scan else "loop",
        seconds=dataclasses.asdict(
            Timing.of([one.lower_seconds + one.compile_seconds for one in found])
        ),
        cpu_seconds=None,
        stages={
            "trace": median(one.lower_seconds for one in found),
            "compile": median(one.compile_seconds for one in found),
        },
        planned_bytes=found[-1].planned_bytes,
    )


def started_rows(case: Case, settings: Settings) -> list[Row]:
    """Rows of a first and a second process; every pair has a cache folder of its own."""
    name = case.model.partition("/")[0]
    tiny = dataclasses.replace(TINY[name], vocab_size=WORDS)
    config = tiny if settings.smoke else family_of(name).VARIANTS["base"]
    model, variables = fmjax.create(name, config, head=case.head, rng=jax.random.key(0))
    starts: dict[str, list[dict[str, tuple[float, float]]]] = {"first": [], "second": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch) / "model")
        tokenizer = train_tokenizer(TEXTS, kind="bytebpe", vocab_size=WORDS)
        fmjax.save(folder, model, variables, tokenizer)
        del variables
        kept = {name: value for name, value in os.environ.items() if name not in UNSET}
        start(case, folder, kept | {"FMJAX_HOME": str(Path(scratch) / "not-measured")})
        for pair in range(settings.repeats):
            environment = kept | {"FMJAX_HOME": str(Path(scratch) / f"cache-{pair}")}
            for found in starts.values():
                found.append(start(case, folder, environment))
    return [started_row(case, side, found) for side, found in starts.items()]


def start(case: Case, folder: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """{stage: (seconds by the clock, seconds of processors)} of a process."""
    if case.start == "train":
        script = [str(HERE / "start_once.py"), folder, case.head]
        ran = run_command(
            [sys.executable, *script, str(case.batch_size), str(case.length)], environment
        )
        stages = last_line(ran.printed)
        del stages["step"]
        return stages
    options = ["generate", folder, TEXTS[0], "--max-new-tokens", str(case.length)]
    ran = run_command([sys.executable, "-m", "fmjax", *options], environment)
    return {"command": (ran.seconds, ran.cpu_seconds)}


def started_row(case: Case, side: str, found: list[dict[str, Any]]) -> Row:
    """A row from what each process took."""
    totals = [[sum(times) for times in zip(*one.values(), strict=True)] for one in found]
    return Row(
        case=case.name,
        side=side,
        seconds=dataclasses.asdict(Timing.of([clock for clock, _ in totals])),
        cpu_seconds=median(used for _, used in totals),
        stages={stage: median(one[stage][1] for one in found) for stage in found[0]},
        planned_bytes=None,
    )


def ratios_of(rows: list[Row]) -> dict[str, dict[str, float]]:
    """{case: {"seconds", "cpu_seconds"}}: of a scanned step over one that is not, and of the second
    start over the first; < 1 means that scanning, or the cache, saves time."""
    sides = {(row.case, row.side): row for row in rows}
    ratios = {}
    for (case, side), row in sides.items():
        before = sides.get((case, {"scan": "loop", "second": "first"}.get(side, "")))
        if before is None:
            continue
        ratios[case] = {"seconds": row.seconds["median"] / before.seconds["median"]}
        if row.cpu_seconds is not None and before.cpu_seconds is not None:
            ratios[case]["cpu_seconds"] = row.cpu_seconds / before.cpu_seconds
    return ratios


def select(settings: Settings) -> list[Case]:
    """The chosen cases; for a smoke run, made tiny.

    Raises:
        ValueError: an unknown name.
    """
    chosen = named(CASES, settings.cases)
    if settings.smoke:
        chosen = [
            dataclasses.replace(
                case,
                model=f"{case.model.partition('/')[0]}/tiny",
                batch_size=2,
                length=min(case.length, 16),
            )
            for case in chosen
        ]
    return chosen


def show(doc: dict[str, Any]) -> None:
    """Print a document as a table."""

    def ratio(row: dict[str, Any]) -> str:
        found = doc["ratios"][row["case"]] if row["side"] in ("scan", "second") else {}
        return " and ".join(f"{value:.2f}" for value in found.values())

    print_rows(
        doc,
        {
            "case": lambda row: row["case"],
            "side": lambda row: row["side"],
            "median s": lambda row: f"{row['seconds']['median']:.2f}",
            "CPU s": lambda row: or_empty(row["cpu_seconds"], lambda time: f"{time:.2f}"),
            "parts s": lambda row: ", ".join(f"{k} {v:.2f}" for k, v in row["stages"].items()),
            "planned GB": lambda row: or_empty(
                row["planned_bytes"], lambda size: f"{size / 1e9:.2f}"
            ),
            "of the row above": ratio,
        },
        caption="parts of starts, and the second of their ratios, are in seconds of processors",
    )


def main(settings: Settings) -> None:
    """Run the chosen cases, print the table, write the JSON."""
    jax.config.update("jax_enable_compilation_cache", False)
    run_own(
        "compile_time",
        SCHEMA,
        select(settings),
        settings,
        lambda case: run_case(case, settings),
        ratios_of=ratios_of,
        show=show,
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
