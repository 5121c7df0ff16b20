"""Videos in memory: frames sampled evenly from animated pictures and from folders of frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fmjax.data.columns import Columns
from fmjax.data.decoding import BROKEN, FILES, FORMATS, Picture, check_pixels, decode
from fmjax.data.files import raise_problems, visible
from fmjax.data.images import class_files

ANIMATED = (".gif", ".webp", ".png", ".apng")
"""Endings of files with several pictures."""


@dataclasses.dataclass(frozen=True, eq=False)
class ClipExamples:
    """Videos of one length and size, each with a class.

    Args:
        clips: uint8 [N, T, X, Y, 3].
        labels: int [N].
        label_names: the classes.
    """

    clips: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.clips)

    def columns(self) -> Columns:
        """As they are batched: ``pixel_values`` uint8 [B, T, X, Y, 3] and ``labels`` [B]."""
        return Columns((), {"pixel_values": self.clips, "labels": self.labels})


def segment_middles(total: int, frames: int) -> np.ndarray:
    """Which of `total` frames stand for a video: the middles of equal segments, int [frames].

    Wang et al. 2016, arXiv:1608.00859, section 3.2, without the random offset; a video with fewer
    frames shows some of them twice.
    """
    return ((np.arange(frames) + 0.5) * total / frames).astype(np.int64)


def read_clips(
    folder: str | Path,
    *,
    frames: int,
    read: Callable[[Picture], np.ndarray] = decode,
    label_names: Sequence[str] | None = None,
) -> ClipExamples:
    """The videos of ``FOLDER/CLASS/*.gif`` (or .webp, ...) or ``FOLDER/CLASS/VIDEO/*.png``.

    Args:
        folder: holds a folder for each class; in it a video is a file with several pictures or a
            folder of pictures in the order of their names.
        frames: T, taken evenly from each video: see `segment_middles`.
        read: a frame as uint8 [X, Y, 3]: as it is, or resized (`ImageProcessor.pixels`).
        label_names: the classes, such as those of the training videos; by default the folders'.

    Raises:
        OSError: there is no such folder.
        ValueError: no videos, unknown classes, files that are no pictures, or frames of different
            sizes; all are listed.
    """
    from PIL import Image

    if frames < 1:
        raise ValueError(f"frames is {frames}; it must be positive")
    root = Path(folder).expanduser()
    files, names, problems = class_files(
        root, label_names, endings=ANIMATED, what="videos", folders=True
    )
    pictures: list[np.ndarray] = []
    for path, _ in files:
        try:
            pictures += _frames_of(path, frames, read)
        except (*BROKEN, Image.DecompressionBombError) as error:
            problems.append(f"{path.relative_to(root)}: {error}")
    if len(sizes := {picture.shape for picture in pictures}) > 1:
        problems.append(
            f"the frames have {len(sizes)} sizes, from {min(sizes)} to {max(sizes)}; resize them"
        )
    raise_problems(str(root), problems)
    clips = np.stack(pictures).reshape(len(files), frames, *pictures[0].shape)
    labels = np.array([names.index(name) for _, name in files], np.int32)
    return ClipExamples(clips, labels, names)


def _frames_of(path: Path, frames: int, read: Callable[[Picture], np.ndarray]) -> list[np.ndarray]:
    """uint8 [X, Y, 3] each."""
    from PIL import Image

    if path.is_dir():
        files = [file for file in visible(path) if file.suffix.lower() in FILES]
        if not files:
            raise ValueError(f"the folder holds no pictures {FILES}")
        return [read(files[place]) for place in segment_middles(len(files), frames)]
    with Image.open(path, formats=FORMATS) as file:
        check_pixels(file.height, file.width, "it has")
        total: int = getattr(file, "n_frames", 1)  # formats of one picture have no such field
        pictures = []
        for place in segment_middles(total, frames):
            file.seek(int(place))
            pictures.append(read(file))
    return pictures
