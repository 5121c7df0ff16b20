"""Pictures that stay in their files until a batch needs them, decoded by processes that work ahead.

The streams are `fmjax.data.batches`': the number of a batch determines its pictures, so a position
is exact with any number of workers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fmjax.data.batches import BatchStream, Plan, Planned, check_options
from fmjax.data.columns import repeated
from fmjax.data.files import raise_problems
from fmjax.data.image_processor import ImageProcessor
from fmjax.data.images import class_files


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """N files of pictures, and what is to be predicted from them.

    Attributes:
        root: the folder.
        names: of the files in it.
        labels: int32 [N] class indices.
        label_names: the classes in the order of their indices.
    """

    root: Path
    names: tuple[str, ...]
    labels: np.ndarray
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of names, sizes and labels; not of what is in the files, which nobody has read."""
        digest = hashlib.sha256()
        for name, label in zip(self.names, self.labels, strict=True):
            digest.update(f"{name}\0{(self.root / name).stat().st_size} {label}\n".encode())
        return digest.hexdigest()[:16]


def find_images(folder: str | Path, *, label_names: Sequence[str] | None = None) -> ImageFiles:
    """The files ``FOLDER/CLASS/*.png`` (or .jpg, ...), in the order of their names.

    Args:
        folder: holds a folder for each class.
        label_names: the classes, such as those of the training pictures; by default the folders'.

    Raises:
        OSError: there is no such folder.
        ValueError: no pictures, or unknown classes.
    """
    root = Path(folder).expanduser()
    files, classes, problems = class_files(root, label_names)
    raise_problems(str(root), problems)
    return ImageFiles(
        root,
        tuple(str(path.relative_to(root)) for path, _ in files),
        np.array([classes.index(name) for _, name in files], np.int32),
        classes,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Assemble:
    """What is planned, decoded; a thing of its own so that it can be sent to a process."""

    files: ImageFiles
    processor: ImageProcessor

    def __call__(self, planned: Planned, mine: slice) -> dict[str, np.ndarray]:
        rows = planned.rows[mine]  # [B]
        real = rows >= 0
        own, chosen = np.unique(repeated(planned.rows)[mine], return_inverse=True)
        decoded = self.processor.batch([self.files.root / self.files.names[row] for row in own])
        batch = {name: values[chosen] for name, values in decoded.items()}
        batch["labels"] = self.files.labels[own][chosen]
        return {**batch, "weight": real.astype(np.float32), "index": rows.astype(np.int32)}


def image_batches(
    files: ImageFiles,
    processor: ImageProcessor,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prefetch: int = 4,
) -> BatchStream:
    """A stream of batches in which every picture appears once an epoch.

    Each has ``pixel_values`` uint8 [B, X, Y, C], labels, weight and index; see `BatchStream`. What
    is broken in a batch's files is named by the ValueError that it raises.

    Args:
        files: N pictures.
        processor: makes them of one size; what it does to values is left to the device, see
            `fmjax.tasks.pixels.normalised`.
        batch_size, seed, shuffle, epochs, process_index, process_count: as in
            `fmjax.data.batches.batches`.
        workers: processes that decode; 0 for a thread. They import the main module again, so a
            script must do its work under ``if __name__ == "__main__"``.
        prefetch: batches prepared ahead, by each worker.

    Raises:
        ValueError: no pictures, or a number out of its range.
    """
    problems = check_options(
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        process_index=process_index,
        process_count=process_count,
        prefetch=prefetch,
    )
    if not len(files):
        problems.append("there are no examples")
    if workers < 0:
        problems.append(f"workers={workers} must be at least 0")
    if problems:
        raise ValueError("; ".join(problems))
    plan = Plan(
        groups=(np.arange(len(files)),),
        buckets=((),),
        after=(-1,),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        total=sys.maxsize if epochs is None else epochs * -(-len(files) // batch_size),
    )
    return BatchStream(
        plan,
        _Assemble(files, processor),
        shapes=[(batch_size // process_count,)],
        identity={
            "data": files.fingerprint,
            "processor": processor.to_json(),
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
        },
        process_index=process_index,
        process_count=process_count,
        prefetch=prefetch,
        workers=workers,
    )
