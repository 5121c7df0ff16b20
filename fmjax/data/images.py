"""Pictures with labels: from folders of files, one folder a class, or from a set's arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fmjax.data.columns import Columns
from fmjax.data.decoding import FILES, decode, with_channels
from fmjax.data.files import raise_problems, visible


@dataclasses.dataclass(frozen=True, eq=False)
class ImageExamples:
    """N pictures of one size, and what is to be predicted from them.

    Attributes:
      images: uint8 [N, X, Y, C].
      labels: int32 [N] class indices, or None when there are none.
      label_names: the classes in the order of their indices.

    Raises:
      ValueError: images of another kind, or labels that are not theirs.
    """

    images: np.ndarray
    labels: np.ndarray | None
    label_names: tuple[str, ...]

    def __post_init__(self) -> None:
        problems = []
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            problems.append(
                f"images are {self.images.dtype} {self.images.shape}; they must be uint8 "
                "[N, X, Y, C]"
            )
        if self.labels is not None:
            if len(self.labels) != len(self.images):
                problems.append(f"{len(self.labels)} labels for {len(self.images)} images")
            if len(wrong := np.flatnonzero((self.labels < 0) | (self.labels >= self.num_labels))):
                problems.append(
                    f"{len(wrong)} labels are none of the {self.num_labels} classes, the first is "
                    f"{self.labels[wrong[0]]} of image {wrong[0]}"
                )
        raise_problems("ImageExamples", problems)

    @property
    def num_labels(self) -> int:
        """How many classes there are."""
        return len(self.label_names)

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageExamples:
        """The examples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return dataclasses.replace(self, images=self.images[chosen], labels=labels)

    def with_channels(self, channels: int) -> ImageExamples:
        """Gray pictures of coloured ones (ITU-R 601 luma, as Pillow's), or gray ones three times.

        Raises:
          ValueError: another change.
        """
        images = with_channels(self.images, channels)
        return self if images is self.images else dataclasses.replace(self, images=images)

    def columns(self) -> Columns:
        """As they are batched: ``pixel_values`` uint8 [B, X, Y, C] and, if any, ``labels`` [B].

        Pixels stay bytes until they are on the device: see `fmjax.tasks.pixels`.
        """
        labels = {} if self.labels is None else {"labels": self.labels}
        return Columns((), {"pixel_values": self.images, **labels})


def read_images(
    folder: str | Path,
    *,
    read: Callable[[Path], np.ndarray] = decode,
    label_names: Sequence[str] | None = None,
) -> ImageExamples:
    """The pictures of ``FOLDER/CLASS/*.png`` (or .jpg, ...), in the order of their names.

    Args:
      folder: holds a folder for each class.
      read: a file as uint8 [X, Y, C]: as it is, or resized (`resized`, `ImageProcessor.pixels`).
      label_names: the classes, such as those of the training pictures; by default the folders'.

    Raises:
      OSError: there is no such folder.
      ValueError: no pictures, unknown classes, files that are no pictures, or of different sizes;
        all of it is listed.
    """
    root = Path(folder).expanduser()
    files, names, problems = class_files(root, label_names)
    images = []
    for path, _ in files:
        try:
            images.append(read(path))
        except (OSError, ValueError) as error:
            problems.append(f"{path.relative_to(root)}: {error}")
    if len(sizes := {image.shape[:2] for image in images}) > 1:
        problems.append(
            f"the pictures have {len(sizes)} sizes, from {min(sizes)} to {max(sizes)}; resize them"
        )
    raise_problems(str(root), problems)
    labels = np.array([names.index(name) for _, name in files], np.int32)
    return ImageExamples(np.stack(images), labels, names)


def class_files(
    root: Path,
    label_names: Sequence[str] | None,
    *,
    endings: Sequence[str] = FILES,
    what: str = "pictures",
    folders: bool = False,
) -> tuple[list[tuple[Path, str]], tuple[str, ...], list[str]]:
    """The files of ``ROOT/CLASS/*`` with their classes, all classes, and what is wrong with them.

    Args:
      root: holds a folder for each class.
      label_names: the classes; None for the folders', none of which may then be empty.
      endings: of the files that are wanted.
      what: they are, for errors.
      folders: whether a folder may be in a file's place.

    Raises:
      OSError: there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    found = [path.name for path in visible(root) if path.is_dir()]
    names = tuple(found if label_names is None else label_names)
    files = [
        (path, name)
        for name in found
        for path in visible(root / name)
        if path.suffix.lower() in endings or (folders and path.is_dir())
    ]
    problems = [
        f"the folder {name} is none of the classes {names}" for name in found if name not in names
    ]
    if label_names is None and files:
        problems += [
            f"the folder {name} holds no {what}; remove it, or give label_names"
            for name in sorted({*found} - {name for _, name in files})
        ]
    if not files:
        also = ", or folders of pictures in their place" if folders else ""
        problems.append(
            f"there are no {what}; they must be {root}/CLASS/*{{{','.join(endings)}}}{also}"
        )
    return files, names, problems


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of a picture uint8 [X, Y, 3], its shorter side fitted (bicubic): [*size, 3]."""
    if image.shape[:2] == size:
        return image
    from PIL import Image, ImageOps

    picture = ImageOps.fit(Image.fromarray(image), (size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(picture)
