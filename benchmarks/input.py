"""Do pictures come as fast as a train step takes them?

    python benchmarks/input.py                            about 4 minutes on 2 idle cores
    python benchmarks/input.py --cases memory jpeg-256-workers-2
    python benchmarks/input.py --smoke                    few and small pictures, seconds

Pictures a second, turn by turn in each case: "input" makes batches of 128 pictures of 28 x 28
bytes, "step" trains the MNIST CNN on a batch that lies on the device (AdamW, normalised there), and
"fed" is that step on the batches of the input, as in a run. Input comes from memory, from PNG files
of 28 x 28 gray pixels, and from JPEG files of 256 x 256 coloured ones, decoded and resized by the
training process's thread or by one or two processes. "augment" is what is drawn for each picture on
the device (flips, shifts, RandAugment, erasing); its "fed" does that before the step. On a CPU all
of them share its cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from typing import cast as cast_type

import jax
import numpy as np
import optax
import tyro
from record import named
from rich.console import Console
from rich.table import Table
from run import OwnSettings, run_own

import fmjax
from fmjax.data.augment import each_image, erase, flip, shift_crop
from fmjax.data.augment_policy import rand_augment
from fmjax.data.batches import batches
from fmjax.data.image_files import find_images, image_batches
from fmjax.data.image_processor import ImageProcessor, Size
from fmjax.data.images import ImageExamples
from fmjax.models import family_of
from fmjax.perf.timing import Timing, time_alternately
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.pixels import augmented, normalised, to_floats
from fmjax.train import gradient, init_state, jit_step, make_train_step
from fmjax.types import Batch

SCHEMA = 1  # of this benchmark's own document: the fields of `Row`, and `ratios_of` them
MEAN, STD = (0.3,), (0.3,)
PREFETCH = 4  # batches that are prepared ahead, by each worker
AUGMENT = each_image(flip(), shift_crop(2), rand_augment(), erase())


@dataclasses.dataclass(frozen=True)
class Case:
    """Where pictures come from.

    Attributes:
        name: what `--cases` calls it.
        format: of the files; "memory" and "augment" have none.
        side: rows and columns of the files' pictures.
        workers: processes that decode.
    """

    name: str
    format: str
    side: int = 28
    workers: int = 0


CASES = (
    Case("memory", "memory"),
    Case("augment", "augment"),
    *(
        Case(f"{format}-{side}-workers-{workers}", format, side, workers)
        for format, side in (("png", 28), ("jpeg", 256))
        for workers in (0, 1, 2)
    ),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One side of one case.

    Attributes:
        case: its name.
        side: "input", "step" or "fed".
        workers: processes that decode.
        batch_size: pictures of a batch.
        batches: of a timed turn.
        seconds: {"min", "median", "max", "all"} of a turn.
        images_per_second: from the median.
    """

    case: str
    side: str
    workers: int
    batch_size: int
    batches: int
    seconds: dict[str, Any]
    images_per_second: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is done: B pictures a batch, batches a turn, pictures that there are."""

    batch_size: int = 128
    batches: int = 8
    pictures: int = 1024
    model: str = "mnist"


SMOKE = Sizes(batch_size=4, batches=2, pictures=10, model="tiny")


def pictures(count: int, side: int, channels: int) -> Iterator[np.ndarray]:
    """Smooth noise, uint8 [X, Y, C]: of pure noise a JPEG would be larger than its pixels."""
    from PIL import Image

    random = np.random.default_rng(0)
    for _ in range(count):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        pixels = np.asarray(image if channels == 3 else image.convert("L"))
        yield pixels.reshape(side, side, channels)


@contextlib.contextmanager
def stream_of(case: Case, sizes: Sizes, side: int) -> Iterator[Iterator[Batch]]:
    """Batches without an end, of pictures `side` x `side` x 1."""
    if case.format in ("memory", "augment"):
        images = np.stack([*pictures(sizes.pictures, side, 1)])
        labels = (np.arange(len(images)) % 10).astype(np.int32)
        examples = ImageExamples(images, labels, tuple("0123456789"))
        with contextlib.closing(batches(examples.columns(), batch_size=sizes.batch_size)) as stream:
            yield stream
        return
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        channels = 1 if case.side == 28 else 3
        for number, pixels in enumerate(pictures(sizes.pictures, case.side, channels)):
            folder = root / str(number % 10)
            folder.mkdir(exist_ok=True)
            image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            image.save(folder / f"{number}.{case.format}")
        processor = ImageProcessor(size=Size(side, side), image_mean=MEAN, image_std=STD)
        with contextlib.closing(
            image_batches(
                find_images(root),
                processor,
                batch_size=sizes.batch_size,
                workers=case.workers,
                prefetch=PREFETCH,
            )
        ) as stream:
            yield stream


@functools.lru_cache
def stepper(sizes: Sizes, augment: bool) -> Callable[[Batch], None]:
    """Takes a train step on a batch and waits for it; the same one for all cases."""
    model, variables = fmjax.create(
        "cnn", sizes.model, head="image_classification", rng=jax.random.key(0), num_labels=10
    )
    loss = normalised(task.loss(model), MEAN, STD)
    if augment:
        loss = augmented(loss, AUGMENT)
    tx = optax.adamw(1e-3)
    state = init_state(variables, tx, jax.random.key(0))
    step = cast_type(Callable[..., Any], jit_step(make_train_step(gradient(loss), tx)))

    def take(batch: Batch) -> None:
        nonlocal state
        state, _ = step(state, batch)
        jax.block_until_ready(state)

    return take


def sides_of(case: Case, sizes: Sizes, stream: Iterator[Batch]) -> dict[str, Callable[[], None]]:
    """A turn of each side."""
    on_device = jax.device_put(next(stream))
    plain, fed = stepper(sizes, False), stepper(sizes, case.format == "augment")
    augment = jax.jit(
        lambda key, batch: AUGMENT(key, {**batch, "pixel_values": to_floats(batch["pixel_values"])})
    )

    def turn(take: Callable[[], object], more: int = 0) -> Callable[[], None]:
        def run() -> None:
            for _ in range(sizes.batches + more):
                take()

        return run

    # What workers had prepared while the other sides ran must not count as their speed: a turn
    # takes it too, and is as long as making the others takes.
    ahead = case.workers * PREFETCH

    def drawn() -> None:
        jax.block_until_ready(augment(jax.random.key(0), on_device))

    return {
        "input": turn(drawn if case.format == "augment" else lambda: next(stream), ahead),
        "step": turn(lambda: plain(on_device)),
        "fed": turn(lambda: fed(next(stream))),
    }


def run_case(case: Case, settings: OwnSettings) -> list[Row]:
    """Time one case."""
    sizes = SMOKE if settings.smoke else Sizes()
    side = family_of("cnn").VARIANTS[sizes.model].image_size
    with stream_of(case, sizes, side) as stream:
        timings = time_alternately(sides_of(case, sizes, stream), repeats=settings.repeats)
    return [row_of(case, sizes, name, timing) for name, timing in timings.items()]


def row_of(case: Case, sizes: Sizes, side: str, timing: Timing) -> Row:
    """A row from what was measured."""
    return Row(
        case=case.name,
        side=side,
        workers=case.workers,
        batch_size=sizes.batch_size,
        batches=sizes.batches,
        seconds=dataclasses.asdict(timing),
        images_per_second=sizes.batch_size * sizes.batches / timing.median,
    )


def ratios_of(rows: list[Row]) -> dict[str, dict[str, float]]:
    """{case: {"input", "fed"}}: pictures a second over the step's own; an input above 1 is faster
    than the step takes it, and fed by it the step keeps this share of its speed."""
    rates = {(row.case, row.side): row.images_per_second for row in rows}
    return {
        case: {side: rates[case, side] / rates[case, "step"] for side in ("input", "fed")}
        for case in dict.fromkeys(row.case for row in rows)
    }


def show(doc: dict[str, Any]) -> None:
    """Print a document as a table."""
    machine = doc["machine"]
    table = Table(
        title=f"input on {machine['devices'][0]['kind']} "
        f"({machine['cpu']}, {machine['cores']} cores)",
        caption=f"load before {doc['load_before']:.1f}; ratios are to the step alone",
    )
    table.add_column("case")
    for column in ("input images/s", "step images/s", "fed images/s", "input / step", "fed / step"):
        table.add_column(column, justify="right")
    for case, ratios in doc["ratios"].items():
        rates = {
            row["side"]: row["images_per_second"] for row in doc["rows"] if row["case"] == case
        }
        table.add_row(
            case,
            *(f"{rates[side]:,.0f}" for side in ("input", "step", "fed")),
            *(f"{ratios[side]:.2f}" for side in ("input", "fed")),
        )
    Console(width=None if Console().is_terminal else 120).print(table)


def main(settings: OwnSettings) -> None:
    """Run the chosen cases, print the table, write the JSON."""
    run_own(
        "input",
        SCHEMA,
        named(CASES, settings.cases),
        settings,
        lambda case: run_case(case, settings),
        ratios_of=ratios_of,
        show=show,
    )


if __name__ == "__main__":
    main(tyro.cli(OwnSettings, description=__doc__))
