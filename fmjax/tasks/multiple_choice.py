"""Multiple choice: which of N texts goes with a context."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.tasks.apply import apply_fn, collect, once
from fmjax.tasks.masking import weigh
from fmjax.tasks.sequence_classification import class_losses
from fmjax.types import Aux, Batch, LossFn, Mean, Variables


def loss(model: Any, *, train: bool = True) -> LossFn:
    """Cross-entropy (nats) of the right choice, a mean over examples.

    Radford et al. 2018 and Devlin et al. 2019 (arXiv:1810.04805, section 4.4): every choice is
    scored on its own, and a softmax is taken over the scores. A batch has model inputs [B, N, T],
    ``labels`` int [B], -100 where a row does not count, and perhaps ``weight`` [B]. Another label
    that is no choice makes the loss nan.

    Args:
        model: with the head ``multiple_choice``.
        train: whether dropout is on.
    """
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        output, updates = apply(variables, batch, rng, train=train)
        logits, labels = output.logits, jnp.asarray(batch["labels"])  # [B, N]
        assert logits is not None
        if labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels have the shape {labels.shape}; they must be one for each of the "
                f"{len(logits)} examples"
            )
        weights = weigh(batch, labels)
        mean = Mean.of(class_losses(logits, labels), weights)
        accuracy = Mean.of(jnp.argmax(logits, axis=-1) == labels, weights)
        return mean.value, Aux(mean.weight, {"accuracy": accuracy}, updates)

    return loss_fn


def predict(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, N]``: probabilities of the choices."""
    apply = apply_fn(model)

    def predict_fn(variables: Variables, batch: Batch) -> Array:
        logits = apply(variables, batch, None, train=False)[0].logits
        assert logits is not None
        return jax.nn.softmax(logits, axis=-1)

    return predict_fn


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Choices over a whole set, in its order, and what they are worth.

    Args:
        predictions: float32 [S, N], probabilities.
        labels: int [S].
        metrics: plain numbers, ready for JSON.
    """

    predictions: np.ndarray
    labels: np.ndarray
    metrics: dict[str, float]


def evaluate(
    model: Any, variables: Variables, batches: Iterable[Batch], labels: np.ndarray
) -> Evaluation:
    """Chooses for a whole set: the share of right choices, and the right ones' mean probability.

    Args:
        model: with the head ``multiple_choice``.
        variables: its variables.
        batches: one epoch.
        labels: int [S], the set's labels, in its order.
    """
    rows = collect(jax.jit(once(predict, model)), variables, batches, size=len(labels))
    metrics = {
        "accuracy": float((rows.argmax(axis=1) == labels).mean()),
        "probability": float(np.take_along_axis(rows, np.asarray(labels)[:, None], axis=1).mean()),
    }
    return Evaluation(rows, labels, metrics)
