"""Metrics of detected objects: mean average precision as COCO's evaluation computes it.

Lin et al. 2014, arXiv:1405.0312. The numbers are those of faster-coco-eval, a maintained successor
of pycocotools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fmjax.metrics.optional import optional_library

STATISTICS = {
    "map": 0, "map_50": 1, "map_75": 2, "map_small": 3, "map_medium": 4, "map_large": 5,
    "recall": 8,
}  # fmt: skip
"""Where COCO's evaluation puts them; sizes are below 32 x 32 pixels, below 96 x 96, and above."""


def detection_metrics(
    detections: Sequence[tuple[Any, Any, Any]],
    truths: Sequence[tuple[Any, ...]],
    *,
    label_names: Sequence[str],
) -> dict[str, Any]:
    """Mean average precision of the boxes found in images, over IoUs from 0.5 to 0.95.

    Args:
      detections: for each image boxes [N, 4] in pixels, (left, top, right, bottom), their scores
        [N] and labels [N]. Of an image the 100 of the highest scores count.
      truths: for each image boxes [M, 4], labels [M] and, if any stand for crowds, bool [M]: what
        is found there counts neither way.
      label_names: the classes.

    Returns:
      "map", "map_50" and "map_75" (at one IoU), "map_small", "map_medium" and "map_large" (of
      objects of a size), "recall" (its mean over classes and IoUs), and "classes", {name: map}.
      What has no object to be found is NaN.

    Raises:
      ValueError: parts of different lengths, boxes that are none, labels that are no classes, or
        classes of one name.
      ImportError: faster-coco-eval is not installed.
    """
    problems = _problems(detections, truths, label_names)
    if problems:
        raise ValueError("; ".join(problems[:10]))
    coco: Any = optional_library("faster_coco_eval", "faster-coco-eval", "vision")
    true = coco.COCO(_dataset(truths, label_names))
    found = [
        {
            "image_id": image,
            "category_id": int(label) + 1,
            "bbox": _placed(box),
            "score": float(score),
        }
        for image, part in enumerate(detections)
        for box, score, label in zip(*map(np.asarray, part), strict=True)
    ]
    evaluation = coco.COCOeval_faster(true, true.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    result: dict[str, Any] = {
        name: _value(evaluation.stats[place]) for name, place in STATISTICS.items()
    }
    # [IoUs, recalls, classes, sizes, most detections]: all sizes, and 100 detections.
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    result["classes"] = {
        name: float(part[part >= 0].mean()) if (part := precision[:, :, number]).max() >= 0 else
        float("nan")
        for number, name in enumerate(label_names)
    }  # fmt: skip
    return result


def _value(statistic: float) -> float:
    """COCO's -1 says that there was nothing to be found."""
    return float("nan") if statistic < 0 else float(statistic)


def _placed(box: Any) -> list[float]:
    """(left, top, width, height) of corners."""
    left, top, right, bottom = map(float, box)
    return [left, top, right - left, bottom - top]


def _dataset(truths: Sequence[tuple[Any, ...]], label_names: Sequence[str]) -> dict[str, Any]:
    """The truths as COCO's files have them; its numbers start from 1."""
    annotations: list[dict[str, Any]] = []
    for image, (boxes, labels, *rest) in enumerate(truths):
        crowds = rest[0] if rest else np.zeros(len(labels), bool)
        for box, label, crowd in zip(boxes, labels, crowds, strict=True):
            placed = _placed(box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(label) + 1,
                    "bbox": placed,
                    "area": placed[2] * placed[3],
                    "iscrowd": int(crowd),
                }
            )
    return {
        "images": [{"id": image} for image in range(len(truths))],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(label_names)],
        "annotations": annotations,
    }


def _are_boxes(boxes: np.ndarray) -> bool:
    return (
        boxes.shape[1:] == (4,)
        and bool(np.isfinite(boxes).all())
        and bool((boxes[:, 2:] >= boxes[:, :2]).all())
    )


def _problems(
    detections: Sequence[tuple[Any, ...]],
    truths: Sequence[tuple[Any, ...]],
    label_names: Sequence[str],
) -> list[str]:
    if len(detections) != len(truths):
        return [f"there are detections of {len(detections)} images and truths of {len(truths)}"]
    problems, classes = [], len(label_names)
    if len(set(label_names)) != classes:
        problems.append(f"label_names {list(label_names)} name a class twice")
    for kind, parts, at in (("detections", detections, 2), ("truths", truths, 1)):
        for image, part in enumerate(parts):
            if len({len(values) for values in part}) > 1:
                problems.append(f"{kind} of image {image} differ in number: {[*map(len, part)]}")
            labels = np.asarray(part[at])
            if len(labels) and not (
                labels.dtype.kind in "iu" and labels.min() >= 0 and labels.max() < classes
            ):
                problems.append(
                    f"{kind} of image {image} have labels other than 0 to {classes - 1}"
                )
            if len(part[0]) and not _are_boxes(np.asarray(part[0])):
                problems.append(
                    f"{kind} of image {image} have boxes other than finite (left, top, right, "
                    "bottom), right not below left and bottom not below top"
                )
    return problems
