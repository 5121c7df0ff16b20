"""How long does it take to load a checkpoint, and in how much memory, next to transformers?

    python benchmarks/load.py                             about 5 minutes on 2 cores
    python benchmarks/load.py --cases bert-base gpt2-small-sharded
    python benchmarks/load.py --smoke                     tiny models, seconds

`fmjax.load` of safetensors in float32, in one file and in pieces of 200 MB, beside transformers'
`from_pretrained` of the same folder; weights are random and were written by `fmjax.save`, so they
are in the system's page cache. Each load is a process of its own, the two sides in turns on the
CPU. "load" is the call alone; "and look" goes on until every number was read once, for a tensor
that lies in a mapped file has not been read when the call returns. "peak" is the most that was
resident, mapped files included, and "grown" that without what the imports had left. Both sides must
have found the same numbers.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import jax
import tyro
from cases import BASE, TINY, torch_is_there
from child import answer, begin
from record import named, or_empty, print_rows
from run import OwnSettings, run_own

import fmjax
from fmjax.models import family_of, gpt2
from fmjax.perf.timing import Timing
from fmjax.tree import flatten

SCHEMA = 1  # of this benchmark's own document: the fields of `Row`, and `ratios_of` them
PIECE = "200MB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(OwnSettings):
    """Settings of the run."""

    repeats: int = 5
    """Loads by each side."""
    peer: bool = True
    """Whether transformers loads too, when PyTorch is installed."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is loaded, from files of at most `piece`."""

    name: str
    family: str
    config: Any
    head: str
    piece: str = "5GB"


CASES = tuple(
    Case(f"{name}{suffix}", family, config, head, piece)
    for name, family, config, head in (
        ("bert-base", "bert", BASE, "masked_lm"),
        ("gpt2-small", "gpt2", gpt2.VARIANTS["base"], "causal_lm"),
    )
    for suffix, piece in (("", "5GB"), ("-sharded", PIECE))
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One side of one case.

    Attributes:
        case: its name.
        side: "fmjax" or "torch".
        files: that the weights are in.
        bytes: of the weights.
        seconds: {"min", "median", "max", "all"} of the load.
        look_seconds: the same of the load and one look at every number.
        import_seconds: the median of the imports.
        bytes_per_second: from the median of the load and the look.
        before_bytes: resident behind the imports, the median; None where the system does not say.
        peak_bytes: the most that was resident, the median; None where the system does not say.
    """

    case: str
    side: str
    files: int
    bytes: int
    seconds: dict[str, Any]
    look_seconds: dict[str, Any]
    import_seconds: float
    bytes_per_second: float
    before_bytes: float | None
    peak_bytes: float | None


def run_case(case: Case, settings: Settings) -> list[Row]:
    """Write a checkpoint, and load it in turns.

    Raises:
        ValueError: the sides found different numbers.
    """
    family = family_of(case.family)
    model, variables = fmjax.create(case.family, case.config, head=case.head, rng=jax.random.key(0))
    size = sum(leaf.nbytes for leaf in flatten(variables).values())
    sides = {"fmjax": f"{case.family}/{case.head}"}
    if settings.peer and torch_is_there():
        sides["torch"] = f"{case.family}/{family.HEADS[case.head]}"
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        fmjax.save(name, model, variables, max_shard_size=case.piece)
        del variables
        files = len([*Path(name).glob("*.safetensors")])
        for _ in range(settings.repeats):
            for side, what in sides.items():
                found[side].append(answer(begin("load_once.py", [side, name, what], ON_CPU)))
    check_same(case, found)
    return [row_of(case, side, files, size, loads) for side, loads in found.items()]


ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def check_same(case: Case, found: dict[str, list[dict[str, Any]]]) -> None:
    """Both sides have found as many numbers, of the same squares.

    Raises:
        ValueError: they have not: their times are not comparable.
    """
    ours = found["fmjax"][0]
    for side, loads in found.items():
        for load in loads:
            apart = abs(load["squares"] - ours["squares"]) / ours["squares"]
            if load["numbers"] != ours["numbers"] or not apart < 1e-4:  # summed in float32
                raise ValueError(
                    f"{case.name}: {side} found {load['numbers']:,} numbers, squares of which sum "
                    f"to {load['squares']:.6g}; fmjax found {ours['numbers']:,} and "
                    f"{ours['squares']:.6g}: their times are not comparable"
                )


def row_of(case: Case, side: str, files: int, size: int, loads: list[dict[str, Any]]) -> Row:
    """A row from what the processes said."""

    def of(key: str) -> list[float]:
        return [load[key] for load in loads]

    known = loads[0]["peak_bytes"] is not None
    look = Timing.of(of("look_seconds"))
    return Row(
        case=case.name,
        side=side,
        files=files,
        bytes=size,
        seconds=dataclasses.asdict(Timing.of(of("load_seconds"))),
        look_seconds=dataclasses.asdict(look),
        import_seconds=median(of("import_seconds")),
        bytes_per_second=size / look.median,
        before_bytes=median(of("before_bytes")) if known else None,
        peak_bytes=median(of("peak_bytes")) if known else None,
    )


def ratios_of(rows: list[Row]) -> dict[str, dict[str, float | None]]:
    """{case: {"seconds", "look_seconds", "grown_bytes"}}: the peer's over fmjax's; > 1 means that
    fmjax takes less."""

    def grown(row: Row) -> float | None:
        if row.peak_bytes is None or row.before_bytes is None:
            return None
        return row.peak_bytes - row.before_bytes

    sides = {(row.case, row.side): row for row in rows}
    ratios = {}
    for (case, side), theirs in sides.items():
        if side != "torch":
            continue
        ours = sides[case, "fmjax"]
        more, less = grown(theirs), grown(ours)
        ratios[case] = {
            "seconds": theirs.seconds["median"] / ours.seconds["median"],
            "look_seconds": theirs.look_seconds["median"] / ours.look_seconds["median"],
            "grown_bytes": more / less if more is not None and less else None,
        }
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
                config=TINY[case.family],
                piece="40KB" if case.piece == PIECE else case.piece,
            )
            for case in chosen
        ]
    return chosen


def show(doc: dict[str, Any]) -> None:
    """Print a document as a table."""

    def gigabytes(value: float | None) -> str:
        return or_empty(value, lambda size: f"{size / 1e9:.2f}")

    def grown(row: dict[str, Any]) -> str:
        peak = row["peak_bytes"]
        return gigabytes(None if peak is None else peak - row["before_bytes"])

    def ratio(row: dict[str, Any]) -> str:
        return f"{doc['ratios'][row['case']]['look_seconds']:.2f}" if row["side"] == "torch" else ""

    print_rows(
        doc,
        {
            "case": lambda row: row["case"],
            "side": lambda row: row["side"],
            "files": lambda row: str(row["files"]),
            "GB": lambda row: f"{row['bytes'] / 1e9:.3f}",
            "imports s": lambda row: f"{row['import_seconds']:.2f}",
            "load s": lambda row: f"{row['seconds']['median']:.3f}",
            "and look s": lambda row: f"{row['look_seconds']['median']:.3f}",
            "GB/s": lambda row: f"{row['bytes_per_second'] / 1e9:.2f}",
            "peak GB": lambda row: gigabytes(row["peak_bytes"]),
            "grown GB": grown,
            "torch / fmjax": ratio,
        },
        caption="the ratio is that of load and look",
    )


def main(settings: Settings) -> None:
    """Run the chosen cases, print the table, write the JSON."""
    run_own(
        "load",
        SCHEMA,
        select(settings),
        settings,
        lambda case: run_case(case, settings),
        ratios_of=ratios_of,
        show=show,
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
