"""How much memory does the cross-entropy over a large vocabulary take, whole and in chunks?

    python benchmarks/loss_memory.py                      about 6 minutes on 2 cores, 8 GB
    python benchmarks/loss_memory.py --no-time            compiled only: the memory, in a minute
    python benchmarks/loss_memory.py --smoke              a tiny vocabulary, seconds

Loss and gradients (of the hidden states and of the output matrix) from hidden states: "plain" makes
the logits of the whole batch, "chunked" is `fmjax.tasks.vocabulary_loss`. The two vocabularies are
GPT-2's (50,257 words, width 768) and Qwen2.5's (152,064 words; width 896, as its smallest has).
Memory is what the compiler plans, which is exact and needs no idle machine; "temporary" is what is
held beside the arguments and the results. Cases of 8 x 1024 tokens are compiled and not run; those
of 4 x 512 tokens are timed turn by turn. The two must give the same loss and gradients first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from jax import Array
from record import named
from rich.console import Console
from rich.table import Table
from run import OwnSettings, run_own

from fmjax.nn.product import matmul
from fmjax.perf.timing import compile_time, time_alternately
from fmjax.tasks.vocabulary_loss import CHUNK_SIZE, vocabulary_loss

SCHEMA = 1  # of this benchmark's own document: the fields of `Row`, and `ratios_of` them
# Largest difference over the largest value: in bfloat16 the whole batch's gradient of the matrix
# is rounded once and so is the sum over chunks, but the logits' gradients round differently.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(OwnSettings):
    """Settings of the run."""

    chunk_size: int = CHUNK_SIZE
    """Tokens whose logits exist at one time."""
    time: bool = True
    """Whether the small cases run."""
    repeats: int = 3
    """Timed turns of each side."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes: V words, width D, B x T tokens; `timed` says whether it is small enough to run."""

    name: str
    vocab_size: int
    width: int
    batch_size: int
    length: int
    dtype: str
    timed: bool


CASES = tuple(
    Case(f"{name}-{batch_size}x{length}-{dtype}", words, width, batch_size, length, dtype, timed)
    for name, words, width in (("gpt2", 50257, 768), ("qwen2.5", 152064, 896))
    for batch_size, length, timed in ((4, 512, True), (8, 1024, False))
    for dtype in ("float32", "bfloat16")
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One loss of one case.

    Attributes:
        case: its name.
        loss: "plain" or "chunked".
        dtype, vocab_size, width, batch_size, length: of the case.
        chunk_size: tokens whose logits exist at one time; None for the plain loss.
        logits_bytes: of the whole batch's logits in float32.
        temporary_bytes: what the compiler plans to hold beside arguments and results.
        planned_bytes: all that it plans to hold.
        compile_seconds: {"lower", "compile"}.
        seconds: {"min", "median", "max", "all"} of loss and gradients; None if it was not run.
        max_difference: between the two losses' values and gradients, over the largest; None if
            they were not run.
    """

    case: str
    loss: str
    dtype: str
    vocab_size: int
    width: int
    batch_size: int
    length: int
    chunk_size: int | None
    logits_bytes: int
    temporary_bytes: int
    planned_bytes: int
    compile_seconds: dict[str, float]
    seconds: dict[str, Any] | None
    max_difference: float | None


Loss = Callable[[Array, Array, Array], Array]


def losses(chunk_size: int) -> dict[str, Loss]:
    """Both losses: (kernel [D, V], hidden [B, T, D], labels [B, T]) -> mean, nats."""

    def plain(kernel: Array, hidden: Array, labels: Array) -> Array:
        logits = matmul(hidden, kernel)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def chunked(kernel: Array, hidden: Array, labels: Array) -> Array:
        return vocabulary_loss(
            lambda hidden: matmul(hidden, kernel),
            hidden,
            labels,
            jnp.ones(labels.shape),
            chunk_size=chunk_size,
        ).loss.value

    return {"plain": plain, "chunked": chunked}


def arrays_of(case: Case) -> tuple[Array, Array, Array]:
    """Random weights, states and labels, from seed 0."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape, dtype = (case.batch_size, case.length), jnp.dtype(case.dtype)
    kernel = 0.02 * jax.random.normal(keys[0], (case.width, case.vocab_size), dtype)
    hidden = jax.random.normal(keys[1], (*shape, case.width), dtype)
    return kernel, hidden, jax.random.randint(keys[2], shape, 0, case.vocab_size, jnp.int32)


def difference(a: Any, b: Any) -> float:
    """The largest difference of two trees' leaves, each over its leaf's largest value."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        float(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max() / jnp.abs(x).max())
        for x, y in pairs
    )


def run_case(case: Case, settings: Settings) -> list[Row]:
    """Compile both losses, and compare and time them if the case is small enough.

    Raises:
        ValueError: they differ by more than `TOLERANCE`.
    """
    timed = case.timed and settings.time
    arrays = arrays_of(case) if timed else jax.eval_shape(lambda: arrays_of(case))
    compiled = {
        name: compile_time(jax.jit(jax.value_and_grad(loss, (0, 1))), *arrays)
        for name, loss in losses(settings.chunk_size).items()
    }
    timings, apart = {}, None
    if timed:
        results = [compiled[name].call(*arrays) for name in ("plain", "chunked")]
        apart = difference(*results)
        del results
        if not apart <= TOLERANCE[case.dtype]:
            raise ValueError(f"{case.name}: the losses differ by {apart:.2g} of the largest value")
        thunks = {
            name: lambda call=side.call: jax.block_until_ready(call(*arrays))
            for name, side in compiled.items()
        }
        timings = time_alternately(thunks, repeats=settings.repeats)
    rows = []
    for name, side in compiled.items():
        memory = side.memory
        held = memory["arguments"] + memory["outputs"] - memory["aliased"]
        rows.append(
            Row(
                case=case.name,
                loss=name,
                dtype=case.dtype,
                vocab_size=case.vocab_size,
                width=case.width,
                batch_size=case.batch_size,
                length=case.length,
                chunk_size=settings.chunk_size if name == "chunked" else None,
                logits_bytes=4 * case.batch_size * case.length * case.vocab_size,
                temporary_bytes=memory["temporaries"],
                planned_bytes=held + memory["temporaries"],
                compile_seconds={"lower": side.lower_seconds, "compile": side.compile_seconds},
                seconds=dataclasses.asdict(timings[name]) if name in timings else None,
                max_difference=apart,
            )
        )
    return rows


def select(settings: Settings) -> list[Case]:
    """The chosen cases; for a smoke run, made tiny.

    Raises:
        ValueError: an unknown name.
    """
    chosen = named(CASES, settings.cases)
    if settings.smoke:
        tiny = {"vocab_size": 4096, "width": 16, "batch_size": 2, "length": 512}
        chosen = [dataclasses.replace(case, **tiny) for case in chosen]
    return chosen


def show(doc: dict[str, Any]) -> None:
    """Print a document as a table."""
    machine = doc["machine"]
    table = Table(
        title=f"loss_memory on {machine['devices'][0]['kind']} "
        f"({machine['cpu']}, {machine['cores']} cores)",
        caption=f"load before {doc['load_before']:.1f}; ratios are plain / chunked",
    )
    table.add_column("case")
    table.add_column("loss")
    for column in (
        "logits GB", "temporary GB", "planned GB", "compile s", "median ms", "memory", "time",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for entry in doc["rows"]:
        ratio = doc["ratios"][entry["case"]] if entry["loss"] == "chunked" else None
        seconds = entry["seconds"]
        table.add_row(
            entry["case"],
            entry["loss"],
            *(f"{entry[f'{key}_bytes'] / 1e9:.2f}" for key in ("logits", "temporary", "planned")),
            f"{sum(entry['compile_seconds'].values()):.1f}",
            f"{1e3 * seconds['median']:,.0f}" if seconds else "",
            f"{ratio['temporary_bytes']:.1f}" if ratio else "",
            f"{ratio['seconds']:.2f}" if ratio and ratio["seconds"] else "",
        )
    Console(width=None if Console().is_terminal else 160).print(table)


def ratios_of(rows: list[Row]) -> dict[str, dict[str, float | None]]:
    """{case: {"temporary_bytes", "seconds"}}: the plain loss's over the chunked one's; > 1 means
    that chunks take less."""
    by_case = {(row.case, row.loss): row for row in rows}
    found = {}
    for case in dict.fromkeys(row.case for row in rows):
        plain, chunked = by_case[case, "plain"], by_case[case, "chunked"]
        time = None
        if plain.seconds is not None and chunked.seconds is not None:
            time = plain.seconds["median"] / chunked.seconds["median"]
        memory = plain.temporary_bytes / chunked.temporary_bytes
        found[case] = {"temporary_bytes": memory, "seconds": time}
    return found


def main(settings: Settings) -> None:
    """Run the chosen cases, print the table, write the JSON."""
    run_own(
        "loss_memory",
        SCHEMA,
        select(settings),
        settings,
        lambda case: run_case(case, settings),
        ratios_of=ratios_of,
        show=show,
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
