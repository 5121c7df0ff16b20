"""Metrics of classes given to pixels, from one confusion matrix that sums over any pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def segmentation_confusion(
    predictions: ArrayLike, labels: ArrayLike, num_classes: int, *, ignored: int = 255
) -> np.ndarray:
    """Counts of pixels by their true class (rows) and the predicted one (columns).

    Those of several batches are added up before anything is divided: a mean of pictures' scores is
    another number.

    Args:
      predictions: integers of any shape, each in 0..C-1 where the label is not ignored.
      labels: integers of the same shape, each in 0..C-1 or `ignored`.
      num_classes: C.
      ignored: the label of pixels that do not count, none of the classes.

    Returns:
      int64 [C, C].

    Raises:
      ValueError: lists every shape, type or class that is wrong.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    problems = []
    if num_classes < 1:
        problems.append(f"num_classes is {num_classes}; it must be positive")
    if 0 <= ignored < num_classes:
        problems.append(
            f"ignored is {ignored}, one of {num_classes} classes; give another, such as -1"
        )
    if predictions.shape != labels.shape:
        problems.append(
            f"predictions have shape {predictions.shape}, labels {labels.shape}; they must agree"
        )
    named = {"predictions": predictions, "labels": labels}
    problems += [
        f"{name} are {array.dtype}; they must be integers"
        for name, array in named.items()
        if array.dtype.kind not in "iu"
    ]
    if not problems:
        counted = labels != ignored
        for name, array in named.items():
            classes = array[counted]
            wrong = classes[(classes < 0) | (classes >= num_classes)]
            if len(wrong):
                problems.append(
                    f"{len(wrong)} {name} are outside 0..{num_classes - 1}, the first is {wrong[0]}"
                )
    if problems:
        raise ValueError("cannot count these pixels: " + "; ".join(problems))
    pairs = labels[counted].astype(np.int64) * num_classes + predictions[counted].astype(np.int64)
    counts = np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def segmentation_metrics(confusion: ArrayLike, label_names: Sequence[str]) -> dict[str, Any]:
    """The field's scores (Long et al. 2015, arXiv:1411.4038, section 5).

    Args:
      confusion: [C, C] counts of `segmentation_confusion`, summed over all pictures.
      label_names: C different names, in class order.

    Returns:
      A JSON-serialisable dictionary: "pixel_accuracy", the share of pixels that are right;
      "mean_accuracy", the mean over classes of the share of the class's pixels that are right;
      "mean_iou", the mean over classes of the intersection of the predicted and the true pixels by
      their union; "classes": by name, "iou" and "accuracy". A class that no pixel has and none is
      predicted to have is in no mean, and its scores are None; one that is predicted alone has an
      IoU of 0 and no accuracy.

    Raises:
      ValueError: no square of counts, no pixels, or names that do not fit.
    """
    matrix = np.asarray(confusion)
    problems = []
    if matrix.ndim != 2 or len(set(matrix.shape)) != 1 or matrix.dtype.kind not in "iu":
        problems.append(f"confusion is {matrix.dtype} {matrix.shape}; it must be integers [C, C]")
    elif (matrix < 0).any() or not matrix.any():
        problems.append("confusion must be counts of some pixels")
    names = list(label_names)
    if len(names) != len(set(names)) or len(names) != len(matrix):
        problems.append(f"{names} must be different names, one for each of {len(matrix)} classes")
    if problems:
        raise ValueError("cannot score this confusion: " + "; ".join(problems))
    right, true, said = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)  # each [C]
    ious = [_share(*pair) for pair in zip(right, true + said - right, strict=True)]
    accuracies = [_share(*pair) for pair in zip(right, true, strict=True)]
    return {
        "mean_iou": _mean(ious),
        "mean_accuracy": _mean(accuracies),
        "pixel_accuracy": float(right.sum() / matrix.sum()),
        "classes": {
            name: {"iou": iou, "accuracy": accuracy}
            for name, iou, accuracy in zip(names, ious, accuracies, strict=True)
        },
    }


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def _mean(shares: Sequence[float | None]) -> float:
    return float(np.mean([share for share in shares if share is not None]))
