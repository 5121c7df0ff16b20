"""Semantic segmentation: a class for each pixel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.metrics.segmentation import segmentation_confusion, segmentation_metrics
from fmjax.nn.vision import resize
from fmjax.tasks.apply import apply_fn, once, row_weights
from fmjax.types import Aux, Batch, LossFn, Mean, Variables


def loss(
    model: Any,
    *,
    train: bool = True,
    ignored: int | None = None,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> LossFn:
    """Cross-entropy (nats) of each pixel's class, a mean over pixels that count.

    Heads at earlier layers, if the model has any, add theirs, by the config's
    ``auxiliary_loss_weight`` (Zhao et al. 2016, arXiv:1612.01105, section 4.3).

    A batch has ``labels`` int [B, X, Y], at the size of the images or any other, to which logits
    are enlarged; a label that is neither a class nor ignored makes the loss nan. And ``weight``
    float [B], 0 for padding rows.

    Args:
        model: with the head ``semantic_segmentation``.
        train: whether dropout is on.
        ignored: the label of pixels that do not count; None is what config.json says
            (``semantic_loss_ignore_index``).
        label_smoothing: share of probability spread over all classes (Szegedy et al. 2016,
            arXiv:1512.00567, section 7).
        class_weights: a number a class, by which its pixels count; None for 1.

    Raises:
        ValueError: settings that do not fit.
    """
    classes = len(model.config.id2label)
    ignored = _ignored(model, ignored)
    problems = []
    if classes < 2:
        problems.append(f"the model has {classes} class; pixels need two, such as object and rest")
    if not 0 <= label_smoothing < 1:
        problems.append(f"label_smoothing is {label_smoothing}; it must be in [0, 1)")
    if class_weights is not None and (
        len(class_weights) != classes or not all(0 <= w < math.inf for w in class_weights)
    ):
        problems.append(
            f"class_weights is {class_weights}; it must be a number, not negative, for each of "
            f"{classes} classes"
        )
    if problems:
        raise ValueError("; ".join(problems))
    apply = apply_fn(model)
    by_class = jnp.ones(classes) if class_weights is None else jnp.array(class_weights, jnp.float32)

    def losses_of(logits: Array, true: Array) -> Array:  # -> [B, X, Y]
        targets = (1 - label_smoothing) * true + label_smoothing / classes
        return -jnp.sum(by_class * targets * jax.nn.log_softmax(logits), axis=-1)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        labels = jnp.asarray(batch["labels"])
        if labels.ndim != 3:
            raise ValueError(f"labels have shape {labels.shape}; they must be [B, X, Y]")
        output, updates = apply(variables, batch, rng, train=train)
        assert output.logits is not None
        logits = resize(output.logits, labels.shape[1:3])  # [B, X, Y, C]
        true = labels[..., None] == jnp.arange(classes)
        losses = losses_of(logits, true)
        for earlier in output.auxiliary_logits or ():
            enlarged = resize(earlier, labels.shape[1:3])
            losses = losses + model.config.auxiliary_loss_weight * losses_of(enlarged, true)
        losses = jnp.where(true.any(axis=-1), losses, jnp.nan)
        rows = row_weights(batch, len(labels))
        counted = (labels != ignored) * rows[:, None, None]
        weight = Mean.of(jnp.sum(by_class * true, axis=-1), counted).total
        mean = Mean(Mean.of(losses, counted).total, weight)
        accuracy = Mean.of(jnp.argmax(logits, axis=-1) == labels, counted)
        return mean.value, Aux(weight, {"accuracy": accuracy}, updates)

    return loss_fn


def _ignored(model: Any, ignored: int | None) -> int:
    return model.config.semantic_loss_ignore_index if ignored is None else ignored


def _enlarged(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, X, Y, C]``: logits at the size of the images."""
    apply = apply_fn(model)

    def logits_fn(variables: Variables, batch: Batch) -> Array:
        logits = apply(variables, batch, None, train=False)[0].logits
        assert logits is not None
        return resize(logits, np.shape(batch["pixel_values"])[1:3])

    return logits_fn


def predict(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, X, Y, C]``: probabilities of each pixel's classes."""
    logits_fn = _enlarged(model)
    return lambda variables, batch: jax.nn.softmax(logits_fn(variables, batch), axis=-1)


def segment(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> int [B, X, Y]``: each pixel's most probable class."""
    logits_fn = _enlarged(model)
    return lambda variables, batch: jnp.argmax(logits_fn(variables, batch), axis=-1)


def evaluate(
    model: Any, variables: Variables, batches: Iterable[Batch], *, ignored: int | None = None
) -> dict[str, Any]:
    """Segments a whole set and measures it, see `fmjax.metrics.segmentation_metrics`.

    Args:
        model: with the head ``semantic_segmentation``; ``id2label`` are its classes.
        variables: its variables.
        batches: one epoch, with ``labels`` int [B, X, Y] at the size of the images.
        ignored: see `loss`.

    Raises:
        ValueError: no pixel counts, or labels that are no classes.
    """
    names, ignored = model.config.id2label, _ignored(model, ignored)
    segment_fn = jax.jit(once(segment, model))
    confusion = np.zeros((len(names), len(names)), np.int64)
    for batch in batches:
        real = np.asarray(row_weights(batch)) != 0
        found = np.asarray(segment_fn(variables, batch))[real]
        labels = np.asarray(batch["labels"])[real]
        confusion += segmentation_confusion(found, labels, len(names), ignored=ignored)
    return segmentation_metrics(confusion, names)
