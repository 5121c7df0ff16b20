"""How fast are checkpoints written and read, next to the disk they lie on?

    python benchmarks/checkpoint.py                       about 3 minutes, 6 GB of memory and disk
    python benchmarks/checkpoint.py --cases bert-base --folder /mnt/other-disk
    python benchmarks/checkpoint.py --smoke               a tiny model, seconds

`fmjax.train.Checkpoints` (Orbax) with the state of a run with AdamW: weights and both moments in
float32, random so that nothing compresses. "blocking" is how long `save` keeps the run waiting,
"save" until all is on the disk (files synchronised, which the run itself does not wait for; the
checkpoint before it is deleted meanwhile), "restore" reads the newest one into arrays. "write" and
"read" are those of one file of as many bytes, written in pieces of 16 MiB and synchronised, in the
same folder, turn by turn. What is read was dropped from the system's page cache before, where the
system lets a process do so (Linux). First what is restored must equal what was saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from cases import BASE, TINY
from record import named, or_empty, print_rows
from run import OwnSettings, run_own

from fmjax.hub import abstract_variables
from fmjax.models import family_of, gpt2
from fmjax.perf.timing import Timing, time_alternately
from fmjax.train import Checkpoints, Memory, init_state
from fmjax.types import TrainState

SCHEMA = 1  # of this benchmark's own document: the fields of `Row`, and `ratios_of` them
PIECE = 16 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(OwnSettings):
    """Settings of the run."""

    folder: Path | None = None
    """On the disk that is measured; by default where temporary files go."""
    repeats: int = 5
    """Saves and restores."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The model whose training is saved."""

    name: str
    family: str
    config: Any
    head: str


CASES = (
    Case("bert-base", "bert", BASE, "masked_lm"),
    Case("gpt2-small", "gpt2", gpt2.VARIANTS["base"], "causal_lm"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One side of one case.

    Attributes:
        case: its name.
        side: "blocking", "save", "restore", "write" or "read".
        bytes: of the state.
        stored_bytes: of its files, or of the plain file.
        seconds: {"min", "median", "max", "all"}.
        bytes_per_second: of the state, from the median.
    """

    case: str
    side: str
    bytes: int
    stored_bytes: int
    seconds: dict[str, Any]
    bytes_per_second: float


def state_of(case: Case) -> TrainState:
    """The state of a run in which every number is random."""
    model = family_of(case.family).Model(case.config, head=case.head)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_variables(model))
    random = np.random.default_rng(0)

    def drawn(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.array(random.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(drawn, init_state(zeros, optax.adamw(1e-4), jax.random.key(0)))


def write_plain(path: Path, count: int) -> None:
    """A file of random bytes, on the disk when it returns."""
    piece = np.random.default_rng(0).bytes(min(PIECE, count))
    with path.open("wb", buffering=0) as file:
        for start in range(0, count, len(piece)):
            file.write(piece[: count - start])
        os.fsync(file.fileno())


def read_plain(path: Path) -> None:
    """All of a file, piece by piece into the same memory."""
    held = bytearray(PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(held):
            pass


def files_of(folder: Path) -> list[Path]:
    """Every file in a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def synchronise(folder: Path) -> None:
    """Returns when the folder's files are on the disk."""
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def drop_pages(folder: Path) -> None:
    """Takes the folder's files out of the page cache, where the system has a call for it."""
    if sys.platform != "linux":
        return
    for path in files_of(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def same(one: TrainState, other: TrainState) -> bool:
    """Whether two states are bitwise equal."""

    def bits(leaf: jax.Array) -> np.ndarray:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(bits(a).tobytes() == bits(b).tobytes() for a, b in pairs)


def run_case(case: Case, settings: Settings) -> list[Row]:
    """Save, compare, and time one case.

    Raises:
        ValueError: what is restored is not what was saved.
    """
    # Orbax warns of every wait for a save, and that wait is what is measured.
    logging.getLogger("absl").setLevel(logging.ERROR)
    state = state_of(case)
    abstract = jax.eval_shape(lambda: state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=settings.folder)))
        plain, saved = folder / "plain", folder / "saved"
        checkpoints = stack.enter_context(Checkpoints(saved))
        blocking: list[float] = []

        def save() -> None:
            nonlocal state
            state = dataclasses.replace(state, step=state.step + 1)
            start = time.perf_counter()
            checkpoints.save(state, {}, Memory())
            blocking.append(time.perf_counter() - start)
            checkpoints.wait()
            synchronise(saved)

        def restore() -> TrainState:
            restored = checkpoints.restore_last(abstract)
            assert restored is not None
            return jax.block_until_ready(restored.state)

        def cold(read: Callable[[], object], place: Path) -> Callable[[], object]:
            def dropped_and_read() -> object:
                return (drop_pages(place), read())[1]

            return dropped_and_read

        save()
        if not same(restore(), state):
            raise ValueError(f"{case.name}: what is restored is not what was saved")
        plain.mkdir()
        write_plain(plain / "file", size)
        blocking.clear()
        timings = time_alternately(
            {
                "save": save,
                "write": lambda: write_plain(plain / "file", size),
                "restore": cold(restore, saved),
                "read": cold(lambda: read_plain(plain / "file"), plain),
            },
            repeats=settings.repeats,
            warmup=0,
        )
        stored = sum(path.stat().st_size for path in files_of(saved))
    sides = {"blocking": Timing.of(blocking), **timings}
    return [
        Row(
            case=case.name,
            side=side,
            bytes=size,
            stored_bytes=size if side in ("write", "read") else stored,
            seconds=dataclasses.asdict(timing),
            bytes_per_second=size / timing.median,
        )
        for side, timing in sides.items()
    ]


def ratios_of(rows: list[Row]) -> dict[str, dict[str, float]]:
    """{case: {"save", "restore"}}: their pace over the disk's own in writing and reading."""
    rates = {(row.case, row.side): row.bytes_per_second for row in rows}
    return {
        case: {
            "save": rates[case, "save"] / rates[case, "write"],
            "restore": rates[case, "restore"] / rates[case, "read"],
        }
        for case in dict.fromkeys(row.case for row in rows)
    }


def select(settings: Settings) -> list[Case]:
    """The chosen cases; for a smoke run, made tiny.

    Raises:
        ValueError: an unknown name.
    """
    chosen = named(CASES, settings.cases)
    if settings.smoke:
        chosen = [dataclasses.replace(case, config=TINY[case.family]) for case in chosen]
    return chosen


def show(doc: dict[str, Any]) -> None:
    """Print a document as a table."""

    def of_disk(row: dict[str, Any]) -> str:
        return or_empty(doc["ratios"][row["case"]].get(row["side"]), lambda share: f"{share:.2f}")

    print_rows(
        doc,
        {
            "case": lambda row: row["case"],
            "side": lambda row: row["side"],
            "GB": lambda row: f"{row['bytes'] / 1e9:.3f}",
            "stored GB": lambda row: f"{row['stored_bytes'] / 1e9:.3f}",
            "min s": lambda row: f"{row['seconds']['min']:.3f}",
            "median s": lambda row: f"{row['seconds']['median']:.3f}",
            "max s": lambda row: f"{row['seconds']['max']:.3f}",
            "GB/s": lambda row: f"{row['bytes_per_second'] / 1e9:.2f}",
            "of the disk": of_disk,
        },
        caption="of the disk is the pace of write and read",
    )


def main(settings: Settings) -> None:
    """Run the chosen cases, print the table, write the JSON."""
    run_own(
        "checkpoint",
        SCHEMA,
        select(settings),
        settings,
        lambda case: run_case(case, settings),
        ratios_of=ratios_of,
        show=show,
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
