"""Masked language modelling (Devlin et al. 2019, arXiv:1810.04805), alone or with a sentence pair:
the next sentence (BERT) or the sentences' order (ALBERT, Lan et al. 2020, arXiv:1909.11942)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.tasks.apply import apply_fn, means, once, row_weights
from fmjax.tasks.masking import Masked, Masking, gather_labels, mask_tokens, weigh
from fmjax.tasks.vocabulary_loss import (
    CHUNK_SIZE,
    over_vocabulary,
    unembed_fn,
    vocabulary_loss,
)
from fmjax.types import Aux, Batch, LossFn, Mean, Output, Variables


def loss(
    model: Any,
    *,
    masking: Masking | None = None,
    max_predictions: int | None = None,
    train: bool = True,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int = CHUNK_SIZE,
) -> LossFn:
    """Cross-entropy (nats) of the tokens that were masked, a mean over them.

    The head of the vocabulary sees the masked positions only, never [B, T, V].

    A batch's ``next_sentence_label`` or ``sentence_order_label`` int [B] (0: the pair is as it
    was written) adds that cross-entropy, a mean over rows, if the model has the head
    ``pretraining``. The sum of two means over different things has the weight of the first:
    accumulated over pieces, the second counts by the pieces' masked tokens.

    Args:
        model: with the head ``masked_lm`` or ``pretraining``.
        masking: masks the batch here, by the loss's key or, without one, by each example's index.
            None takes batches that are masked: ``labels`` int [B, T], -100 where nothing is
            predicted.
        max_predictions: of batches that are masked: the most labels of a row. None sends every
            position through the head. A row with more labels makes the loss nan.
        train: whether dropout is on.
        label_smoothing, z_loss, chunk_size: see `vocabulary_loss`.

    Raises:
        ValueError: `max_predictions` beside `masking`, which has its own.
    """
    if masking is not None and max_predictions is not None:
        raise ValueError("masking has its own max_predictions; give it there")
    apply = apply_fn(model, output_logits=False)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        rng, mask_rng = (None, None) if rng is None else jax.random.split(rng)
        masked = _masked(mask_rng, batch, masking, max_predictions)
        output, updates = apply(variables, masked.batch, rng, train=train)
        assert output.last_hidden_state is not None
        found = vocabulary_loss(
            unembed_fn(model, variables),
            gather(output.last_hidden_state, masked.positions),
            masked.labels,
            masked.weights,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            chunk_size=chunk_size,
        )
        metrics = {"masked_nll": found.nll, "masked_accuracy": found.accuracy}
        value = found.loss.value
        for name, logits in _pair_logits(model, output, batch).items():
            labels = jnp.asarray(batch[f"{name}_label"])
            rows = row_weights(batch, len(labels))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)  # [B]
            metrics[f"{name}_loss"] = mean = Mean.of(losses, rows)
            metrics[f"{name}_accuracy"] = Mean.of(jnp.argmax(logits, -1) == labels, rows)
            value += mean.value
        return value, Aux(found.loss.weight, metrics, updates)

    return loss_fn


def _masked(
    rng: Array | None, batch: Batch, masking: Masking | None, max_predictions: int | None
) -> Masked:
    if masking is not None:
        return mask_tokens(rng, batch, masking)
    if "labels" not in batch:
        raise ValueError("the batch has no labels [B, T]; give them, or masking=Masking(...)")
    labels = jnp.asarray(batch["labels"])
    if max_predictions is not None:
        return gather_labels(batch, labels, min(max_predictions, labels.shape[1]))
    return Masked(dict(batch), None, labels, weigh(batch, labels))


def gather(hidden: Array, positions: Array | None) -> Array:
    """[B, T, D] at positions [B, M] -> [B, M, D]."""
    if positions is None:
        return hidden
    return jnp.take_along_axis(hidden, positions[..., None], axis=1)


def _pair_logits(model: Any, output: Output, batch: Batch) -> dict[str, Array]:
    """Logits [B, 2] for each label of a pair that the batch has."""
    have = {
        "next_sentence": output.seq_relationship_logits,
        "sentence_order": output.sop_logits,
    }
    found = {}
    for name, logits in have.items():
        if f"{name}_label" not in batch:
            continue
        if logits is None:
            raise ValueError(
                f"the batch has {name}_label, and the model's head {model.head!r} does not predict "
                "it; load the model with head='pretraining' or leave the label out"
            )
        found[name] = logits
    return found


def predict(
    model: Any, *, top_k: int = 5, chunk_size: int = CHUNK_SIZE
) -> Callable[[Variables, Batch], tuple[Array, Array]]:
    """``(variables, batch) -> (token ids, probabilities)``, [B, T, top_k] each, best first."""
    apply = apply_fn(model, output_logits=False)

    def best(logits: Array) -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(logits, top_k)
        log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return ids, jnp.exp(values - log_z)

    def predict_fn(variables: Variables, batch: Batch) -> tuple[Array, Array]:
        hidden = apply(variables, batch, None, train=False)[0].last_hidden_state
        assert hidden is not None
        return over_vocabulary(unembed_fn(model, variables), best, hidden, chunk_size=chunk_size)

    return predict_fn


def evaluate(
    model: Any,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    masking: Masking | None = None,
    max_predictions: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, float]:
    """Losses and accuracies over a whole set; every call masks the same tokens.

    Args:
        model, masking, max_predictions, chunk_size: see `loss`.
        variables: the model's.
        batches: one epoch; the order does not matter.

    Returns:
        "loss" in nats, "masked_nll", "masked_accuracy", "masked_perplexity" (exp of the nll), and
        where a batch has a pair's label its "..._loss" and "..._accuracy".
    """
    loss_fn = once(
        loss,
        model,
        masking=masking,
        max_predictions=max_predictions,
        train=False,
        chunk_size=chunk_size,
    )
    found = {name: total.value for name, total in means(loss_fn, variables, batches).items()}
    return {**found, "masked_perplexity": math.exp(found["masked_nll"])}
