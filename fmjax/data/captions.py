"""Pictures with the texts that say what is on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fmjax.data.files import raise_problems


@dataclasses.dataclass(frozen=True, eq=False)
class Captions:
    """N pictures of one size, each with a text, and perhaps its class.

    Attributes:
      images: uint8 [N, X, Y, C].
      texts: N of them.
      labels: int32 [N] of classes, or None.
      label_names: the classes in the order of their numbers.

    Raises:
      ValueError: pictures of another kind, empty texts, or not as many of each.
    """

    images: np.ndarray
    texts: Sequence[str]
    labels: np.ndarray | None = None
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            problems.append(
                f"images are {self.images.dtype} {self.images.shape}; they must be uint8 "
                "[N, X, Y, C]"
            )
        if len(self.texts) != len(self.images):
            problems.append(f"{len(self.texts)} texts for {len(self.images)} images")
        if empty := [number for number, text in enumerate(self.texts) if not text.strip()]:
            problems.append(f"{len(empty)} texts are empty, the first of image {empty[0]}")
        if self.labels is not None:
            if len(self.labels) != len(self.images):
                problems.append(f"{len(self.labels)} labels for {len(self.images)} images")
            if ((self.labels < 0) | (self.labels >= len(self.label_names))).any():
                problems.append(f"labels are not all of the {len(self.label_names)} classes")
        raise_problems("Captions", problems)

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Sequence[int] | np.ndarray) -> Captions:
        """The examples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[chosen]
        texts = [self.texts[i] for i in chosen]
        return dataclasses.replace(self, images=self.images[chosen], texts=texts, labels=labels)


def load_emoji_captions(split: str, *, size: int) -> Captions:
    """Emoji on white with their names and categories; the first call fetches them.

    Importing what reads them takes about a second, so it is not done above.

    Args:
      split: "train", "val" or "test", as `fmjax.data.emoji.load_emoji` has them.
      size: rows and columns that they are resized to.

    Raises:
      ValueError: there is no such split.
      OSError: the asset cannot be downloaded.
    """
    from fmjax.data.emoji import load_emoji_names

    pairs = load_emoji_names(split, size=size)
    return Captions(pairs.images, pairs.texts, pairs.labels, pairs.label_names)
