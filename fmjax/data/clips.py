"""Videos in memory: frames sampled evenly from animated pictures and from folders of frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.data.columns import Columns
from fmjax.data.images import FILES, on_white, resized
from fmjax.data.records import raise_problems

ANIMATED = (".gif", ".webp", ".png", ".apng", ".tif", ".tiff")
"""Endings of files with several pictures that Pillow reads."""


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
    size: tuple[int, int],
    label_names: Sequence[str] | None = None,
) -> ClipExamples:
    """The videos of ``FOLDER/CLASS/*.gif`` (or .webp, ...) or ``FOLDER/CLASS/VIDEO/*.png``, as RGB.

    Args:
        folder: holds a folder for each class; in it a video is a file with several pictures or a
            folder of pictures in the order of their names.
        frames: T, taken evenly from each video: see `segment_middles`.
        size: rows and columns that frames are resized to: the shorter side fitted, the middle cut
            out.
        label_names: the classes, such as those of the training videos; by default the folders'.

    Raises:
        OSError: there is no such folder.
        ValueError: no videos, unknown classes, or files that are no pictures; all are listed.
    """
    if frames < 1:
        raise ValueError(f"frames is {frames}; it must be positive")
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    found = sorted(path.name for path in root.iterdir() if path.is_dir())
    names = tuple(found if label_names is None else label_names)
    problems = [
        f"the folder {name} is none of the classes {names}" for name in found if name not in names
    ]
    clips, labels = [], []
    for name in found:
        for path in sorted((root / name).iterdir()):
            if not path.is_dir() and path.suffix.lower() not in ANIMATED:
                continue
            try:
                clips.append(_frames_of(path, frames, size))
                labels.append(names.index(name) if name in names else -1)
            except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow raises
                problems.append(f"{path.relative_to(root)}: {error}")
    if not clips and not problems:
        problems.append(
            f"there are no videos; they must be {root}/CLASS/*{{{','.join(ANIMATED)}}}, or folders "
            "of pictures in their place"
        )
    raise_problems(str(root), problems)
    return ClipExamples(np.stack(clips), np.array(labels, np.int32), names)


def _frames_of(path: Path, frames: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [T, *size, 3]."""
    from PIL import Image

    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in FILES)
        if not files:
            raise ValueError(f"the folder holds no pictures {FILES}")
        chosen = [files[place] for place in segment_middles(len(files), frames)]
        pictures = []
        for file in chosen:
            with Image.open(file) as picture:
                pictures.append(_pixels(picture, size))
        return np.stack(pictures)
    with Image.open(path) as file:
        total: int = getattr(file, "n_frames", 1)  # formats of one picture have no such field
        pictures = []
        for place in segment_middles(total, frames):
            file.seek(int(place))
            pictures.append(_pixels(file, size))
    return np.stack(pictures)


def _pixels(picture: Any, size: tuple[int, int]) -> np.ndarray:
    """uint8 [*size, 3]; transparent pixels are white."""
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    return resized(on_white(np.asarray(picture.convert(mode))), size)
