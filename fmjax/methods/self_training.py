"""Self-training: a model's own confident predictions are labels of rows that have none.

Pseudo-labels (Lee 2013, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for
Deep Neural Networks") in every step, or in rounds of training anew; FixMatch (Sohn et al. 2020,
arXiv:2001.07685), where what is predicted of a weakly changed input is learnt of a strongly changed
one. Batches are those of `fmjax.methods.partly_labelled`; the ratio of unlabelled to labelled rows
(FixMatch's mu, 7 in the paper) is that of the two streams' batch sizes.

    weak, strong = picture_views(rows=32, columns=32)  # texts: fmjax.tasks.text_views
    loss = fix_match(task.loss, model, weak=weak, strong=strong)
    stream = Mixture({LABELLED: few, UNLABELLED: many})
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fmjax.data.augment import BatchFn, each_image, erase, flip, shift_crop
from fmjax.data.augment_policy import rand_augment
from fmjax.methods.partly_labelled import (
    LOGITS,
    Strength,
    TaskLoss,
    both,
    run_once,
    strength_now,
    strength_problems,
)
from fmjax.tasks.apply import row_weights
from fmjax.tasks.pixels import to_floats
from fmjax.tasks.sequence_classification import SINGLE, problem_type_of
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

ATTACHES = ("loss", "program")


def _threshold_problems(threshold: float) -> list[str]:
    if 0 < threshold <= 1:
        return []
    return [f"threshold={threshold} must be above 0 and at most 1: it is a probability"]


def _check(model: Any, threshold: float, strength: Strength) -> None:
    problems = [*_threshold_problems(threshold), *strength_problems("strength", strength)]
    if (kind := problem_type_of(model)) != SINGLE:
        problems.append(f"pseudo-labels are single classes, and the model's problem_type is {kind}")
    if problems:
        raise ValueError("; ".join(problems))


class _Confident(NamedTuple):
    """What rows without labels count.

    Args:
        loss: cross-entropy of the pseudo-labels, nats; a row below the threshold has 0, and is
            counted.
        chosen: the share of rows at or above the threshold.
    """

    loss: Mean
    chosen: Mean


def _confident(said: Array, logits: Array, weight: Array, threshold: float) -> _Confident:
    """Of the logits [B, C] that give pseudo-labels, and of those that learn them."""
    said = jax.lax.stop_gradient(said)
    mask = jnp.max(jax.nn.softmax(said), axis=-1) >= threshold
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(said, axis=-1))
    return _Confident(Mean.of(jnp.where(mask, losses, 0.0), weight), Mean.of(mask, weight))


def _added(
    loss: Array, aux: Aux, found: _Confident, strength: Strength, variables: Variables
) -> tuple[Array, Aux]:
    metrics = {
        **aux.metrics,
        "supervised": Mean(loss * aux.weight, aux.weight),
        "unsupervised": found.loss,
        "chosen": found.chosen,
    }
    total = loss + strength_now(strength, variables) * found.loss.value
    return total, aux._replace(metrics=metrics)


def ramped(highest: float = 3.0, *, begin: int, end: int) -> optax.Schedule:
    """alpha(t) of pseudo-labels: 0 until `begin`, then on a line to `highest` at `end` (Lee 2013,
    equation 16; 3, 100 and 600 there).

    Raises:
        ValueError: steps that do not follow each other, or a negative coefficient.
    """
    if not 0 <= begin < end or not highest >= 0:
        raise ValueError(
            f"begin={begin} and end={end} must be steps, one after the other, and "
            f"highest={highest} at least 0"
        )
    return optax.linear_schedule(0.0, highest, end - begin, begin)


def pseudo_labelled(
    task_loss: TaskLoss, model: Any, *, threshold: float, strength: Strength = 1.0
) -> LossFn:
    """The task's loss, plus ``strength`` times the cross-entropy of the classes that this very pass
    finds most probable for the rows without labels (Lee 2013, equation 15).

    Accumulated over pieces, each piece counts by its labelled rows' weight.

    Args:
        task_loss: model -> LossFn of labelled rows.
        model: a classifier of single labels.
        threshold: the least probability of a class that counts; Lee has none, so any that is at
            most 1 / C.
        strength: alpha: a number, or `ramped`, which needs `with_progress` and `counting` of
            `fmjax.methods.partly_labelled`.

    Raises:
        ValueError: a threshold outside (0, 1], a negative strength, a model of something else; when
            called, no unlabelled rows.
    """
    _check(model, threshold, strength)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        parts = both(batch)
        loss, aux, (_, logits) = run_once(task_loss, model, LOGITS, variables, parts, rng)
        found = _confident(logits, logits, row_weights(parts[1]), threshold)
        return _added(loss, aux, found, strength, variables)

    return loss_fn


def fix_match(
    task_loss: TaskLoss,
    model: Any,
    *,
    weak: BatchFn,
    strong: BatchFn,
    threshold: float = 0.95,
    strength: Strength = 1.0,
) -> LossFn:
    """FixMatch (Sohn et al. 2020, equations 3 and 4): the task's loss of weakly changed labelled
    rows, plus ``strength`` times the cross-entropy of strongly changed rows to the classes that are
    predicted, at or above the threshold, of the same rows weakly changed.

    The mean is over all unlabelled rows, chosen or not. Labelled, weak and strong rows go through
    the model together, in training mode, as in the authors' program. Accumulated over pieces, each
    piece counts by its labelled rows' weight.

    Args:
        task_loss: model -> LossFn of labelled rows.
        model: a classifier of single labels.
        weak, strong: ``(rng, batch) -> batch``, such as `picture_views` or those of
            `fmjax.tasks.text_views`. Pixels reach them as floats from 0 to 1; normalise in
            `task_loss`, as ``lambda model: normalised(task.loss(model), mean, std)``.
        threshold: tau.
        strength: lambda_u.

    Raises:
        ValueError: a threshold outside (0, 1], a negative strength, a model of something else; when
            called, no unlabelled rows, or no key.
    """
    _check(model, threshold, strength)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        if rng is None:
            raise ValueError("FixMatch draws how it changes inputs: give it a key")
        labelled, unlabelled = (_floats(rows) for rows in both(batch))
        *keys, rng = jax.random.split(rng, 4)
        parts = [
            view(key, rows)
            for view, key, rows in zip(
                (weak, weak, strong), keys, (labelled, unlabelled, unlabelled), strict=True
            )
        ]
        loss, aux, (_, said, logits) = run_once(task_loss, model, LOGITS, variables, parts, rng)
        found = _confident(said, logits, row_weights(unlabelled), threshold)
        return _added(loss, aux, found, strength, variables)

    return loss_fn


def _floats(rows: Batch) -> Batch:
    if "pixel_values" not in rows:
        return rows
    return {**rows, "pixel_values": to_floats(rows["pixel_values"])}


def picture_views(rows: int, columns: int) -> tuple[BatchFn, BatchFn]:
    """FixMatch's (weak, strong) (Sohn et al. 2020, section 2.3): mirrored and moved by up to an
    eighth; and two operations of RandAugment, then a square of half the side painted gray (Cutout).

    RandAugment has one magnitude, where the paper draws it.

    Args:
        rows, columns: of the pictures, pixels from 0 to 1.
    """
    moved = (flip(), shift_crop(max(rows, columns) // 8))
    painted = erase(share=1.0, area=(0.25, 0.25), ratio=(1.0, 1.0), value=0.5)
    return each_image(*moved), each_image(*moved, rand_augment(), painted)


def pseudo_labels(probabilities: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(rows [K] whose most probable class reaches the threshold, that class [K]).

    Args:
        probabilities: [N, C] of rows without labels.
        threshold: the least probability.

    Raises:
        ValueError: no rows, numbers that are no probabilities, or a threshold outside (0, 1].
    """
    problems = _threshold_problems(threshold)
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2 or not probabilities.size:
        problems.append(f"probabilities are {probabilities.shape}; there are no unlabelled rows")
    elif not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3) or probabilities.min() < 0:
        problems.append("rows of probabilities must be at least 0 and have the sum 1")
    if problems:
        raise ValueError("; ".join(problems))
    chosen = np.flatnonzero(probabilities.max(axis=1) >= threshold)
    return chosen, probabilities[chosen].argmax(axis=1)


class Round(NamedTuple):
    """What came out of a round of self-training.

    Args:
        variables: trained.
        chosen: the unlabelled rows that it was trained on, int [K].
        labels: their pseudo-labels, int [K].
    """

    variables: Variables
    chosen: np.ndarray
    labels: np.ndarray


def self_train(
    train: Callable[[np.ndarray, np.ndarray], Variables],
    predict: Callable[[Variables], np.ndarray],
    *,
    rounds: int,
    threshold: float,
) -> list[Round]:
    """Trains on what is labelled, labels the rest, and trains anew on both, several times.

    It ends early where no row reaches the threshold.

    Args:
        train: (unlabelled rows [K], their pseudo-labels [K]) -> variables, trained from the
            beginning on these and on all labelled rows; at first there are none.
        predict: variables -> probabilities [N, C] of all unlabelled rows.
        rounds: how often pseudo-labels are made.
        threshold: see `pseudo_labels`.

    Returns:
        The first training, and each round's.

    Raises:
        ValueError: no rounds, or what `pseudo_labels` refuses.
    """
    problems = _threshold_problems(threshold)
    if rounds < 1:
        problems.append(f"rounds={rounds} must be at least 1")
    if problems:
        raise ValueError("; ".join(problems))
    none = np.zeros(0, np.int64)
    done = [Round(train(none, none), none, none)]
    for _ in range(rounds):
        chosen, labels = pseudo_labels(predict(done[-1].variables), threshold)
        if not len(chosen):
            break
        done.append(Round(train(chosen, labels), chosen, labels))
    return done
