"""Pictures with labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fmjax.data.columns import Columns
from fmjax.data.files import raise_problems


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

    def columns(self) -> Columns:
        """As they are batched: ``pixel_values`` uint8 [B, X, Y, C] and, if any, ``labels`` [B].

        Pixels stay bytes until they are on the device: see `fmjax.tasks.pixels`.
        """
        labels = {} if self.labels is None else {"labels": self.labels}
        return Columns((), {"pixel_values": self.images, **labels})
