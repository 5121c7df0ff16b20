"""Pictures with the boxes and classes of the objects in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np

from fmjax.data.columns import Columns
from fmjax.data.files import raise_problems

SLACK = 1e-5
"""By how much of a side a box may leave its picture: float32's rounding."""


@dataclasses.dataclass(frozen=True, eq=False)
class ObjectExamples:
    """N pictures of one size, each with up to M objects.

    Attributes:
      images: uint8 [N, X, Y, C].
      boxes: float32 [N, M, 4], centre (along columns, along rows), width and height as shares of
        the picture's width and height; padding is zero.
      class_labels: int32 [N, M] class indices; padding is zero.
      object_mask: bool [N, M], which are objects and which padding.
      label_names: the classes in the order of their indices.

    Raises:
      ValueError: arrays of other kinds or sizes, and boxes and labels that `box_problems` refuses.
    """

    images: np.ndarray
    boxes: np.ndarray
    class_labels: np.ndarray
    object_mask: np.ndarray
    label_names: tuple[str, ...]

    def __post_init__(self) -> None:
        problems = []
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            problems.append(
                f"images are {self.images.dtype} {self.images.shape}; they must be uint8 "
                "[N, X, Y, C]"
            )
        sizes = {
            "boxes": self.boxes.shape[:-1],
            "class_labels": self.class_labels.shape,
            "object_mask": self.object_mask.shape,
        }
        if len({*sizes.values()}) > 1 or self.boxes.shape != (
            len(self.images),
            *sizes["boxes"][1:],
            4,
        ):
            problems.append(
                f"for {len(self.images)} images there are {sizes}; all must be [N, M], boxes "
                f"[N, M, 4] and not {list(self.boxes.shape)}"
            )
        else:
            problems += box_problems(
                self.boxes, self.class_labels, self.object_mask, self.num_labels
            )
        raise_problems(type(self).__name__, problems)

    @property
    def num_labels(self) -> int:
        """How many classes there are."""
        return len(self.label_names)

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The examples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del arrays["label_names"]
        return dataclasses.replace(self, **{name: of[chosen] for name, of in arrays.items()})

    def columns(self) -> Columns:
        """As they are batched: ``pixel_values`` uint8 [B, X, Y, C], ``boxes`` [B, M, 4],
        ``class_labels`` [B, M] and ``object_mask`` [B, M]."""
        return Columns(
            (),
            {
                "pixel_values": self.images,
                "boxes": self.boxes,
                "class_labels": self.class_labels,
                "object_mask": self.object_mask,
            },
        )


def box_problems(
    boxes: np.ndarray, class_labels: np.ndarray, object_mask: np.ndarray, num_labels: int
) -> list[str]:
    """What is wrong with objects, one line each: image, object, box, and which rule it breaks.

    A box must be finite, have an area and lie in its picture; a label must be a class.

    Args:
      boxes: [N, M, 4], centre, width and height as shares of the picture.
      class_labels: int [N, M].
      object_mask: bool [N, M]; padding is not looked at.
      num_labels: how many classes there are.
    """
    finite = np.asarray(np.isfinite(boxes).all(axis=-1))  # [N, M]
    # What is not finite breaks that rule alone.
    known = np.where(finite[..., None], boxes, np.array([0.5, 0.5, 1, 1]))
    centre, size = known[..., :2], known[..., 2:]
    outside = ((centre - size / 2 < -SLACK) | (centre + size / 2 > 1 + SLACK)).any(axis=-1)
    rules = {
        "is not finite": ~finite,
        "has no area; width and height must be positive": (size <= 0).any(axis=-1),
        "leaves the picture; it must lie in 0 to 1": outside,
    }
    problems = [
        (image, one, f"image {image}, object {one}: box {boxes[image, one].tolist()} {rule}")
        for rule, broken in rules.items()
        for image, one in np.argwhere(broken & object_mask).tolist()
    ]
    unknown = ((class_labels < 0) | (class_labels >= num_labels)) & object_mask
    problems += [
        (
            image,
            one,
            f"image {image}, object {one}: label {class_labels[image, one]} is none of the "
            f"{num_labels} classes",
        )
        for image, one in np.argwhere(unknown).tolist()
    ]
    return [line for _, _, line in sorted(problems)]
