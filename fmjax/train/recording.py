"""What a run leaves in its folder and shows while it runs: metrics.jsonl, TensorBoard, progress."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmjax.train.events import EventFile
from fmjax.train.loop import Event, Hook, Memory

if TYPE_CHECKING:
    from rich.console import Console


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made if it is missing, proved to be writable.

    Raises:
        OSError: it cannot be made or written to; names it.
    """
    folder = Path(path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write here ({error.strerror}); choose another folder", str(folder)
        ) from error
    return folder


class Recorder:
    """metrics.jsonl (one JSON object a line) and TensorBoard events (``tb/``) of a run folder.

    A line is ``{"step": 20, "split": "train", "loss": 0.61, ...}``; what is not finite is null.
    Both are on disk when `write` returns, so nothing up to a later checkpoint can be lost.

    Args:
        folder: of the run.
        step: where the run starts or resumes. What was recorded after it, by a run that died
            before its next checkpoint, is dropped, as is a line that was cut off.

    Raises:
        OSError: the folder is not writable.
        ValueError: metrics.jsonl has lines that are not records.
    """

    def __init__(self, folder: str | os.PathLike[str], *, step: int = 0) -> None:
        self.folder = writable_folder(folder)
        path = self.folder / "metrics.jsonl"
        _drop_after(path, step)
        self._lines = path.open("a", encoding="utf-8")
        self._events = EventFile(self.folder / "tb", step=step + 1)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends one line, and a TensorBoard scalar ``{split}/{name}`` for every value."""
        numbers = {name: float(value) for name, value in values.items()}
        shown = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        self._lines.write(json.dumps({"step": step, "split": split, **shown}) + "\n")
        self._lines.flush()
        self._events.scalars(step, {f"{split}/{name}": x for name, x in numbers.items()})

    def close(self) -> None:
        """Closes both files."""
        self._lines.close()
        self._events.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in the order written; a last line cut off is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: lines that are not records; all are named.
    """
    # A text that ends in a newline splits into its lines and an empty rest: the rest is no line.
    *lines, _ = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    records, wrong = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            wrong.append(number)
    if wrong:
        raise ValueError(
            f"{path}: lines {wrong[:10]} ({len(wrong)} in all) are not JSON objects with a step; "
            "remove them, or start a new run folder"
        )
    return records


def _drop_after(path: Path, step: int) -> None:
    """Rewrites metrics.jsonl without what came after `step`; at 0 a run starts, with nothing."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if step and record["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)


def recording(recorder: Recorder, schedule: Callable[[int], Any] | None = None) -> Hook:
    """A hook that writes the training metrics, throughput and learning rate.

    The line has, beside the metrics, ``learning_rate`` (of the update this step made),
    ``examples_per_second``, ``tokens_per_second`` (if there are tokens) and ``seconds`` (of
    training since the line before, evaluation and saving not counted).

    Args:
        schedule: updates made before -> learning rate, as Optax counts.
    """

    def hook(event: Event) -> None:
        values = dict(event.metrics)
        if schedule is not None:
            values["learning_rate"] = float(schedule(event.step - 1))
        values["examples_per_second"] = event.examples / event.seconds
        if event.tokens:
            values["tokens_per_second"] = event.tokens / event.seconds
        values["seconds"] = event.seconds
        recorder.write(event.step, "train", values)

    return hook


@contextlib.contextmanager
def progress(
    steps: int, memory: Memory | None = None, *, console: Console | None = None
) -> Iterator[Hook]:
    """A progress bar on a terminal, one plain line a call elsewhere.

    Both show the step, the means of the metrics, examples per second, the time left, and the best
    evaluation so far.

    Args:
        steps: where the run ends.
        memory: the one given to `fit`, for the best evaluation.
        console: where to; standard error by default, so that output can be piped.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True) if console is None else console
    bar = Progress(
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=console
    )
    task = bar.add_task("compiling", total=steps)
    first: tuple[int, float] | None = None

    def time_left(step: int) -> str:
        nonlocal first
        now = time.monotonic()
        if first is None:  # what came before was mostly compiling, and says nothing of the rest
            first = step, now
        if step == first[0]:
            return "?"
        seconds = (steps - step) * (now - first[1]) / (step - first[0])
        return str(datetime.timedelta(seconds=round(seconds)))

    def hook(event: Event) -> None:
        parts = [f"{name} {value:.4g}" for name, value in event.metrics.items()]
        parts.append(f"{event.examples / event.seconds:.1f} examples/s")
        if memory is not None and memory.best_value is not None:
            parts.append(f"best {memory.best_value:.4g} at {memory.best_step}")
        parts.append(f"left {time_left(event.step)}")
        text = "  ".join(parts)
        if console.is_terminal:
            bar.update(task, completed=event.step, description=text)
        else:
            console.print(f"step {event.step}/{steps}  {text}", soft_wrap=True, highlight=False)

    with bar if console.is_terminal else contextlib.nullcontext():
        yield hook
