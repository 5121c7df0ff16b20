"""Token classification: a tag for each word (parts of speech, named entities)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.metrics.tagging import are_entities, entity_metrics, tag_accuracy
from fmjax.tasks.apply import apply_fn, collect_ragged, once
from fmjax.tasks.masking import weigh
from fmjax.tasks.sequence_classification import class_losses
from fmjax.tasks.vocabulary_loss import IGNORED
from fmjax.types import Aux, Batch, LossFn, Mean, Variables


def loss(model: Any, *, train: bool = True, label_smoothing: float = 0.0) -> LossFn:
    """Cross-entropy (nats), a mean over labelled tokens.

    A batch has ``labels`` int [B, T], -100 for special tokens, padding and, as Devlin et al. 2019
    (arXiv:1810.04805, section 5.3) have it, every piece of a word but its first; ``weight`` [B].

    Args:
        model: with the head ``token_classification``.
        train: whether dropout is on.
        label_smoothing: share of probability spread over all classes.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 1)")
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        output, updates = apply(variables, batch, rng, train=train)
        logits, labels = output.logits, jnp.asarray(batch["labels"])  # [B, T, C]
        assert logits is not None
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels have shape {labels.shape}; token classification needs one for each of "
                f"{logits.shape[:-1]} tokens"
            )
        losses = class_losses(logits, labels, label_smoothing)  # [B, T]
        weights = weigh(batch, labels)
        mean = Mean.of(losses, weights)
        accuracy = Mean.of(jnp.argmax(logits, -1) == labels, weights)
        return mean.value, Aux(mean.weight, {"accuracy": accuracy}, updates)

    return loss_fn


def predict(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, T, C]``: probabilities of each token's tags. A word has its first
    token's (`fmjax.data.AlignedWords.by_word`).
    """
    apply = apply_fn(model)

    def predict_fn(variables: Variables, batch: Batch) -> Array:
        logits = apply(variables, batch, None, train=False)[0].logits
        assert logits is not None
        return jax.nn.softmax(logits, axis=-1)

    return predict_fn


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Tags of a whole set, in its order, and what they are worth.

    Args:
        predictions: a list of tags for each text, one for each labelled word.
        labels: the true ones.
        metrics: plain numbers and nested reports, ready for JSON.
    """

    predictions: list[list[str]]
    labels: list[list[str]]
    metrics: dict[str, Any]


def _best(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> int [B, T]``: each token's most probable tag."""
    predict_fn = predict(model)
    return lambda variables, batch: jnp.argmax(predict_fn(variables, batch), axis=-1)


def evaluate(
    model: Any,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    size: int,
    scheme: str | None = None,
) -> Evaluation:
    """Tags a whole set: the accuracy of tags and, where they mark entities, entities' F1.

    A word is scored by its first token: the first with a label or, where the pieces after it have
    labels too, the first of each of the batches' ``word_ids`` [B, T]. Words that were cut off a
    text are not scored.

    Args:
        model: with the head ``token_classification``; ``id2label`` are its tags.
        variables: its variables.
        batches: one epoch with labels [B, T].
        size: N, how many texts there are.
        scheme: see `entity_metrics`.
    """
    names = model.config.id2label
    best = jax.jit(once(_best, model))

    def rows(variables: Variables, batch: Batch) -> list[tuple[list[str], list[str]]]:
        found, labels = np.asarray(best(variables, batch)), np.asarray(batch["labels"])  # [B, T]
        keep = labels != IGNORED
        if "word_ids" in batch:
            words = np.asarray(batch["word_ids"])
            keep[:, 1:] &= words[:, 1:] != words[:, :-1]
        return [
            ([names[tag] for tag in row[kept]], [names[tag] for tag in truth[kept]])
            for row, truth, kept in zip(found, labels, keep, strict=True)
        ]

    found = collect_ragged(rows, variables, batches, size=size)
    predictions, labels = [row[0] for row in found], [row[1] for row in found]
    metrics: dict[str, Any] = {"accuracy": tag_accuracy(predictions, labels)}
    if are_entities(names):
        metrics |= entity_metrics(predictions, labels, scheme=scheme)
    return Evaluation(predictions, labels, metrics)
