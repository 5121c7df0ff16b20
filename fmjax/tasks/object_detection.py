"""Object detection by sets: each object is matched to one query (Carion et al. 2020,
arXiv:2005.12872).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.nn.boxes import generalised_iou, to_corners
from fmjax.tasks.apply import apply_fn, collect_ragged, means, once, row_weights
from fmjax.tasks.matching import match
from fmjax.types import Aux, Batch, LossFn, Mean, Output, Variables


class Terms(NamedTuple):
    """The parts of a loss, each a mean.

    Args:
        classes: cross-entropy of all queries, by their classes' weights.
        l1: of the boxes' centres and sizes, by objects.
        giou: 1 less the generalised IoU, by objects.
        count: how many objects too many or too few are said, by examples.
    """

    classes: Mean
    l1: Mean
    giou: Mean
    count: Mean


def loss(model: Any, *, auxiliary: bool = True, train: bool = True) -> LossFn:
    """Cross-entropy of every query's class, distance and generalised IoU of the matched boxes.

    Batches have ``pixel_values`` [B, X, Y, C], perhaps ``pixel_mask`` [B, X, Y], ``boxes``
    [B, M, 4] (centre, width and height as shares of the image), ``class_labels`` int [B, M],
    ``object_mask`` [B, M], 0 for padding, and ``weight`` [B], 0 for padding rows. Data are checked
    by `fmjax.data.objects.ObjectExamples`.

    The class term is a mean over queries, of which those without an object weigh
    ``eos_coefficient``, the box terms are means over objects: where a batch is split into parts,
    these count by their examples, which is exact if all have as many objects.

    Args:
        model: with the head ``object_detection``; costs and coefficients are its config's.
        auxiliary: whether every layer of the decoder is trained so (section 3.2); matched anew.
        train: whether dropout is on.
    """
    apply = apply_fn(model, output_intermediate=auxiliary)
    config = model.config

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        inputs, targets = split_targets(batch)
        output, updates = apply(variables, inputs, rng, train=train)
        assert output.logits is not None
        assert output.pred_boxes is not None
        layers = [(output.logits, output.pred_boxes)]
        if output.auxiliary_logits is not None and output.auxiliary_boxes is not None:
            layers += zip(output.auxiliary_logits, output.auxiliary_boxes, strict=True)
        parts = [terms(config, *layer, targets) for layer in layers]
        total = jnp.float32(0)
        for part in parts:
            total += part.classes.value
            total += config.bbox_loss_coefficient * part.l1.value
            total += config.giou_loss_coefficient * part.giou.value
        last = parts[0]
        metrics = {
            "class_loss": last.classes, "l1_loss": last.l1, "giou_loss": last.giou,
            "count_error": last.count,
        }  # fmt: skip
        return total, Aux(jnp.sum(jnp.asarray(targets["weight"], jnp.float32)), metrics, updates)

    return loss_fn


TARGETS = ("boxes", "class_labels", "object_mask")


def split_targets(batch: Batch) -> tuple[Batch, Batch]:
    """What the model is given, and what it is to say."""
    inputs = {name: value for name, value in batch.items() if name not in TARGETS}
    targets = {name: batch[name] for name in TARGETS}
    targets["weight"] = row_weights(batch)
    return inputs, targets


def terms(config: Any, logits: Array, boxes: Array, targets: Batch) -> Terms:
    """The parts of the loss for one layer's predictions.

    Args:
        config: the model's, with costs and ``eos_coefficient``.
        logits: float32 [B, N, C + 1], the last class being none.
        boxes: [B, N, 4], centre, width and height.
        targets: a batch's ``boxes``, ``class_labels``, ``object_mask`` and ``weight``.
    """
    batch, queries, classes = logits.shape
    rows = jnp.asarray(targets["weight"], jnp.float32)  # [B]
    real = jnp.asarray(targets["object_mask"], bool) & (rows > 0)[:, None]  # [B, M]
    # Whatever stands in padding, its loss must be finite: a gradient times 0 is then 0.
    true = jnp.where(real[..., None], jnp.asarray(targets["boxes"]), jnp.float32([0.5, 0.5, 1, 1]))
    labels = jnp.where(real, jnp.asarray(targets["class_labels"]), 0)
    query = match(pair_costs(config, logits, boxes, true, labels), real)  # [B, M]
    row = jnp.arange(batch)[:, None]

    none = classes - 1
    wanted = jnp.full((batch, queries), none).at[row, query].set(jnp.where(real, labels, none))
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    entropy = -jnp.take_along_axis(log_probabilities, wanted[..., None], axis=-1)[..., 0]  # [B, N]
    weights = jnp.where(wanted == none, config.eos_coefficient, 1.0) * rows[:, None]

    said = boxes[row, query]  # [B, M, 4]
    objects = real * rows[:, None]  # [B, M]
    distance = jnp.abs(said - true).sum(axis=-1)
    overlap = generalised_iou(to_corners(said), to_corners(true))
    found = jnp.sum(jnp.argmax(logits, axis=-1) != none, axis=-1)
    return Terms(
        Mean.of(entropy, weights),
        Mean.of(distance, objects),
        Mean.of(1 - overlap, objects),
        Mean.of(jnp.abs(found - real.sum(axis=-1)).astype(jnp.float32), rows),
    )


def pair_costs(config: Any, logits: Array, boxes: Array, true: Array, labels: Array) -> Array:
    """What it costs to match each query and object: [B, N, M] (section 3.1, eq. 1 and 2)."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    said = jnp.take_along_axis(probabilities, labels[:, None, :], axis=-1)  # [B, N, M]
    distance = jnp.abs(boxes[:, :, None] - true[:, None]).sum(axis=-1)
    overlap = generalised_iou(to_corners(boxes)[:, :, None], to_corners(true)[:, None])
    return (
        config.bbox_cost * distance - config.class_cost * said - config.giou_cost * overlap
    )  # [B, N, M]


def predict(model: Any) -> Callable[[Variables, Batch], dict[str, Array]]:
    """``(variables, batch) -> scores [B, N], labels int [B, N] and boxes [B, N, 4]``, one of each
    for a query: its likeliest class that is not none, and its box by corners as shares of the
    image, (left, top, right, bottom).
    """
    apply = apply_fn(model)

    def predict_fn(variables: Variables, batch: Batch) -> dict[str, Array]:
        inputs = {name: value for name, value in batch.items() if name not in TARGETS}
        output, _ = apply(variables, inputs, None, train=False)
        return detections(output)

    return predict_fn


def detections(output: Output) -> dict[str, Array]:
    """Scores, labels and boxes of a model's output; see `predict`."""
    assert output.logits is not None
    assert output.pred_boxes is not None
    probabilities = jax.nn.softmax(output.logits.astype(jnp.float32), axis=-1)[..., :-1]
    return {
        "scores": probabilities.max(axis=-1),
        "labels": probabilities.argmax(axis=-1),
        "boxes": to_corners(output.pred_boxes),
    }


class Detections(NamedTuple):
    """What was found in one image, the likeliest first.

    Args:
        boxes: float32 [N, 4], (left, top, right, bottom) in pixels.
        scores: float32 [N].
        labels: int [N].
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def detect(
    model: Any,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    size: int,
    predict_fn: Callable[[Variables, Batch], dict[str, Array]] | None = None,
    threshold: float = 0.0,
) -> list[Detections]:
    """What is found in every image of a set, in the order of the data.

    Boxes are in the pixels of ``pixel_values``, of which the padding, where a ``pixel_mask`` says
    that there is some, is no part of the picture that boxes are shares of.

    Args:
        model: with the head ``object_detection``.
        variables: its variables.
        batches: each example once, with ``index``.
        size: how many examples there are.
        predict_fn: in place of ``predict(model)``, such as one of pixels that are bytes; jitted.
        threshold: detections of lower scores are left out.
    """
    function = once(_jitted_predict, model) if predict_fn is None else predict_fn

    def of_batch(variables: Variables, batch: Batch) -> Iterable[Detections]:
        shape = batch["pixel_values"].shape[:3]
        mask = np.asarray(batch.get("pixel_mask", np.ones(shape, bool))) > 0  # [B, X, Y]
        sizes = zip(mask.any(axis=2).sum(axis=1), mask.any(axis=1).sum(axis=1), strict=True)
        found = {name: np.asarray(value) for name, value in function(variables, batch).items()}
        for scores, labels, boxes, size in zip(
            found["scores"], found["labels"], found["boxes"], sizes, strict=True
        ):
            yield above(in_pixels(scores, labels, boxes, size), threshold)

    return collect_ragged(of_batch, variables, batches, size=size)


def in_pixels(
    scores: np.ndarray, labels: np.ndarray, boxes: np.ndarray, size: tuple[int, int]
) -> Detections:
    """One image's row of `predict`, the likeliest first.

    Args:
        scores: [N].
        labels: int [N].
        boxes: [N, 4], corners as shares of the image.
        size: its rows and columns.
    """
    rows, columns = size
    order = np.argsort(-scores, kind="stable")
    pixels = boxes[order] * np.array([columns, rows, columns, rows], np.float32)
    return Detections(pixels, scores[order], labels[order])


def above(found: Detections, threshold: float) -> Detections:
    """Detections of at least a score."""
    return Detections(*(values[found.scores >= threshold] for values in found))


def _jitted_predict(model: Any) -> Callable[[Variables, Batch], dict[str, Array]]:
    return jax.jit(predict(model))


def evaluate(model: Any, variables: Variables, batches: Iterable[Batch]) -> dict[str, float]:
    """The loss of the last layer and its terms over a whole set."""
    totals = means(once(loss, model, auxiliary=False, train=False), variables, batches)
    return {name: total.value for name, total in totals.items()}
