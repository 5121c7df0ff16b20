"""Classification of whole texts or pictures: one label, several labels or a number for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fmjax.metrics.classification import classification_metrics, multi_label_metrics
from fmjax.metrics.regression import regression_metrics
from fmjax.tasks.apply import apply_fn, collect, once, row_weights
from fmjax.tasks.masking import weigh
from fmjax.tasks.vocabulary_loss import is_known
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


def problem_type_of(model: Any) -> str:
    """What the logits mean: config.json's ``problem_type``; by default one number is a regression
    and several are classes.

    Raises:
        ValueError: config.json names something else.
    """
    stated = model.config.problem_type
    if stated is None:
        return REGRESSION if len(model.config.id2label) == 1 else SINGLE
    if stated not in (SINGLE, MULTI, REGRESSION):
        raise ValueError(
            f"problem_type is {stated!r}; it must be {SINGLE!r}, {MULTI!r} or {REGRESSION!r}"
        )
    return stated


def loss(model: Any, *, train: bool = True, label_smoothing: float = 0.0) -> LossFn:
    """Cross-entropy, binary cross-entropy averaged over labels (both in nats), or squared error.

    As Hugging Face's ``problem_type`` has it. In training, classifiers at earlier layers count too,
    by the config's ``auxiliary_weight`` (Szegedy et al. 2014, arXiv:1409.4842, section 5).

    Batches have ``labels``: int [B], -100 where a row does not count (or the classes' shares, float
    [B, C], where examples are blended), float [B, C] of 0 and 1, or float [B] (or [B, C]); and
    perhaps ``weight`` float [B], 0 for padding rows. Another label that is no class makes the loss
    nan.

    Args:
        model: with the head ``sequence_classification`` or ``image_classification``.
        train: whether dropout is on.
        label_smoothing: share of probability spread over all classes (Szegedy et al. 2016,
            arXiv:1512.00567, section 7); for single labels only.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 1)")
    kind = problem_type_of(model)
    if label_smoothing and kind != SINGLE:
        raise ValueError(f"label_smoothing={label_smoothing} is for single labels, not for {kind}")
    apply = apply_fn(model)

    def losses_of(logits: Array, labels: Array) -> Array:  # [B, C] -> [B]
        if kind == SINGLE:
            if labels.ndim == 1:
                return class_losses(logits, labels, label_smoothing)
            return optax.softmax_cross_entropy(logits, optax.smooth_labels(labels, label_smoothing))
        if kind == MULTI:
            return optax.sigmoid_binary_cross_entropy(logits, labels).mean(axis=-1)
        labels = labels.reshape(logits.shape).astype(jnp.float32)
        return jnp.square(logits - labels).mean(axis=-1)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        output, updates = apply(variables, batch, rng, train=train)
        logits, labels = output.logits, jnp.asarray(batch["labels"])
        assert logits is not None  # [B, C]
        _check_shapes(model, kind, logits, labels)
        weights = row_weights(batch, len(logits))
        metrics = {}
        if kind == SINGLE:
            if labels.ndim == 1:
                true, weights = labels, weigh(batch, labels)
            else:
                true = jnp.argmax(labels, -1)
            metrics["accuracy"] = Mean.of(jnp.argmax(logits, -1) == true, weights)
        elif kind == MULTI:
            right = ((logits > 0) == (labels > 0.5)).all(axis=-1)
            metrics["accuracy"] = Mean.of(right, weights)
        losses = losses_of(logits, labels)
        for earlier in output.auxiliary_logits or ():
            losses = losses + model.config.auxiliary_weight * losses_of(earlier, labels)
        mean = Mean.of(losses, weights)
        return mean.value, Aux(mean.weight, metrics, updates)

    return loss_fn


def _check_shapes(model: Any, kind: str, logits: Array, labels: Array) -> None:
    """Of other shapes products would be broadcast, to a loss of something else."""
    if logits.ndim != 2:
        raise ValueError(
            f"the model has the head {model.head!r}, whose logits {logits.shape} are not [B, C]; "
            "load it with head='sequence_classification' (or whichever classifies a whole input)"
        )
    batch, classes = logits.shape
    right = [(batch,)] if kind == SINGLE or (kind == REGRESSION and classes == 1) else []
    if labels.shape not in (right := [*right, (batch, classes)]):
        raise ValueError(
            f"labels have the shape {labels.shape}; {kind} of {batch} rows and {classes} labels "
            f"takes {' or '.join(map(str, right))}"
        )


def class_losses(logits: Array, labels: Array, label_smoothing: float = 0.0) -> Array:
    """Cross-entropy in nats of classes, [..., C] and int [...] -> [...]; nan where a label is none.

    There it has no gradient, so that rows of weight 0 may have any label.
    """
    classes = logits.shape[-1]
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), label_smoothing)
    losses = optax.softmax_cross_entropy(logits, targets)
    return jnp.where(is_known(labels, classes), losses, jnp.nan)


Predict = Callable[[Variables, Batch], Array]
"""(variables, batch) -> [B, C]."""


def predict(model: Any, *, through: Callable[[Predict], Predict] | None = None) -> Predict:
    """``(variables, batch) -> [B, C]``: probabilities of classes, of labels, or the numbers.

    Args:
        model: with the head ``sequence_classification`` or ``image_classification``.
        through: what makes of the function of the logits another one, such as a mean over views of
            a picture (`fmjax.tasks.pixels.averaged`).
    """
    kind, apply = problem_type_of(model), apply_fn(model)

    def logits_fn(variables: Variables, batch: Batch) -> Array:
        logits = apply(variables, batch, None, train=False)[0].logits
        assert logits is not None
        return logits

    final = logits_fn if through is None else through(logits_fn)

    def predict_fn(variables: Variables, batch: Batch) -> Array:
        logits = final(variables, batch)
        if kind == SINGLE:
            return jax.nn.softmax(logits, axis=-1)
        return jax.nn.sigmoid(logits) if kind == MULTI else logits

    return predict_fn


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Predictions over a whole set, in its order, and what they are worth.

    Args:
        predictions: float32 [N, C], see `predict`.
        labels: as the data has them.
        metrics: plain numbers and nested reports, ready for JSON.
    """

    predictions: np.ndarray
    labels: np.ndarray
    metrics: dict[str, Any]


def evaluate(
    model: Any, variables: Variables, batches: Iterable[Batch], labels: np.ndarray
) -> Evaluation:
    """Predicts a whole set and measures it: accuracy, F1, calibration; or errors of a regression.

    Args:
        model: with the head ``sequence_classification`` or ``image_classification``.
        variables: its variables.
        batches: one epoch, unshuffled.
        labels: the set's labels, in its order.
    """
    rows = collect(jax.jit(once(predict, model)), variables, batches, size=len(labels))
    return Evaluation(rows, labels, metrics_of(model, rows, labels))


def metrics_of(model: Any, rows: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The metrics that fit the problem type, for predictions [N, C]."""
    kind, names = problem_type_of(model), model.config.id2label
    if kind == SINGLE:
        return classification_metrics(rows, labels, names)
    if kind == MULTI:
        return multi_label_metrics(rows, labels, names)
    return dict(regression_metrics(rows.reshape(labels.shape), labels))
