"""Questions about pictures, answered by one of the answers that are frequent in training."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fmjax.metrics.visual_question_answering import (
    agreement,
    normalize_answer,
    visual_question_answering_metrics,
)
from fmjax.tasks.apply import apply_fn, collect, once, row_weights
from fmjax.types import Aux, Batch, LossFn, Mean, Variables


def frequent_answers(answers: Iterable[Sequence[str]], *, at_least: int = 9) -> tuple[str, ...]:
    """The answers that a model may give, most frequent first: a config's ``id2label``.

    Teney et al. 2017, arXiv:1708.02711, section 3.2, keep those that occur more than 8 times.

    Args:
        answers: of each question of the training set, those that people gave.
        at_least: how often an answer must have been given.

    Raises:
        ValueError: none is.
    """
    counts = Counter(normalize_answer(one) for several in answers for one in several)
    found = sorted((-count, one) for one, count in counts.items() if count >= at_least and one)
    if not found:
        raise ValueError(f"no answer occurs {at_least} times; {len(counts)} occur")
    return tuple(one for _, one in found)


def targets(answers: Sequence[Sequence[str]], names: Sequence[str]) -> np.ndarray:
    """What each answer is worth for each question, float32 [N, C] from 0 to 1: the ``labels``.

    Args:
        answers: of each question, those that people gave.
        names: the C answers that the model may give, a config's ``id2label``.
    """
    columns = {normalize_answer(name): column for column, name in enumerate(names)}
    result = np.zeros((len(answers), len(names)), np.float32)
    for row, several in enumerate(answers):
        for answer, worth in agreement(several).items():
            if answer in columns:
                result[row, columns[answer]] = worth
    return result


def loss(model: Any, *, train: bool = True, softmax: bool = False) -> LossFn:
    """Binary cross-entropy (nats) of each answer against its worth, summed over answers.

    Teney et al. 2017, arXiv:1708.02711, section 3.8, as Anderson et al. 2018, arXiv:1707.07998,
    take it. A batch has ``labels`` float [B, C], see `targets`, and ``weight`` [B].

    Args:
        model: with logits [B, C]: VisualBERT's head ``question_answering``, or any classifier.
        train: whether dropout is on.
        softmax: the divergence of one softmax over all answers from their worths in its place, as
            VisualBERT's PyTorch class has it.
    """
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        output, updates = apply(variables, batch, rng, train=train)
        logits, labels = output.logits, jnp.asarray(batch["labels"], jnp.float32)  # [B, C]
        assert logits is not None
        if softmax:
            log_worth = jnp.log(jnp.where(labels > 0, labels, 1.0))
            losses = (labels * (log_worth - jax.nn.log_softmax(logits))).sum(axis=-1)
        else:
            losses = optax.sigmoid_binary_cross_entropy(logits, labels).sum(axis=-1)
        weights = row_weights(batch, len(labels))
        chosen = jnp.take_along_axis(labels, jnp.argmax(logits, axis=-1)[:, None], axis=1)[:, 0]
        mean = Mean.of(losses, weights)
        return mean.value, Aux(mean.weight, {"accuracy": Mean.of(chosen, weights)}, updates)

    return loss_fn


def predict(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, C]``: the probability that each answer is right."""
    apply = apply_fn(model)

    def predict_fn(variables: Variables, batch: Batch) -> Array:
        logits = apply(variables, batch, None, train=False)[0].logits
        assert logits is not None
        return jax.nn.sigmoid(logits)

    return predict_fn


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Answers to a whole set, in its order, and what they are worth.

    Args:
        predictions: float32 [N, C], probabilities.
        answers: the most probable ones.
        metrics: see `fmjax.metrics.visual_question_answering`.
    """

    predictions: np.ndarray
    answers: tuple[str, ...]
    metrics: dict[str, float]


def evaluate(
    model: Any,
    variables: Variables,
    batches: Iterable[Batch],
    answers: Sequence[Sequence[str]],
    kinds: Sequence[str] | None = None,
) -> Evaluation:
    """Answers a whole set and measures it against what people said, in any words.

    Args:
        model: as in `loss`; its ``id2label`` are the answers.
        variables: its variables.
        batches: one epoch.
        answers: of each question, those that people gave, in the set's order.
        kinds: of each question, or None.
    """
    rows = collect(jax.jit(once(predict, model)), variables, batches, size=len(answers))
    chosen = tuple(model.config.id2label[column] for column in rows.argmax(axis=1))
    return Evaluation(rows, chosen, visual_question_answering_metrics(chosen, answers, kinds))
