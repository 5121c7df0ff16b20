"""Sentence embeddings: vectors in which a query is near its passage, trained by contrast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.metrics.retrieval import Relevant, retrieval_metrics
from fmjax.tasks.apply import collect, once
from fmjax.tasks.feature_extraction import embed, encoder
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

QUERY, PASSAGE = "query_", "passage_"
FAR = -1e9
"""The score of a passage that is no negative; finite, as minus infinity has no gradient."""


def loss(
    model: Any,
    *,
    pooling: str = "mean",
    temperature: float = 0.05,
    symmetric: bool = False,
    train: bool = True,
) -> LossFn:
    """InfoNCE (nats): each query's own passage against all others of the batch, by cosine.

    van den Oord et al. 2018, arXiv:1807.03748, equation 4, with the negatives of the batch
    (Henderson et al. 2017, arXiv:1705.00652). A batch has ``query_input_ids`` and
    ``query_attention_mask`` [B, S], ``passage_input_ids`` and ``passage_attention_mask`` [B, T], or
    [B, 1 + n, T] with n hard negatives behind the right passage; ``weight`` [B]. Passages of rows
    of weight 0 are no negatives. With ``labels`` int [B], nor are the passages of rows of the same
    label, which are right for one another's queries.

    More examples are more negatives: accumulated over pieces, each sees those of its own, and over
    devices mapped by `pmap` each those of its own; under a sharded `jit` all are seen.

    Args:
        model: with the head ``model``.
        pooling: see `feature_extraction.embed`.
        temperature: what cosines are divided by.
        symmetric: whether passages also look for their queries; the loss is the mean of both.
        train: whether dropout is on.

    Raises:
        ValueError: an unknown pooling, or a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    encode = encoder(model, pooling=pooling, normalize=True)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        keys = (None, None) if rng is None else jax.random.split(rng)
        queries, updates = encode(variables, _side(batch, QUERY), keys[0], train=train)  # [B, D]
        side = _side(batch, PASSAGE)
        several = side["input_ids"].ndim == 3
        if several:  # [B, 1 + n, T] -> [B * (1 + n), T]
            side = {name: value.reshape(-1, value.shape[-1]) for name, value in side.items()}
        variables = {**variables, **updates}
        passages, updates = encode(variables, side, keys[1], train=train)
        rows, width = queries.shape
        passages = passages.reshape(rows, -1, width)  # [B, 1 + n, D]
        passages = jnp.swapaxes(passages, 0, 1).reshape(-1, width)  # the right ones first
        weights = jnp.asarray(batch.get("weight", jnp.ones(rows)), jnp.float32)
        scores = queries @ passages.T / temperature  # [B, B * (1 + n)]

        own = jnp.eye(rows, dtype=bool)
        hidden = jnp.broadcast_to(weights == 0, (rows, rows))  # [queries, rows of passages]
        if "labels" in batch:
            labels = jnp.asarray(batch["labels"])
            hidden |= labels[:, None] == labels[None, :]
        hidden &= ~own
        # A hard negative is one for its own query, whatever the labels say.
        scores = jnp.where(jnp.tile(hidden, (1, len(passages) // rows)), FAR, scores)

        def contrast(scores: Array) -> Mean:
            right = jnp.arange(rows)
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, right)
            return Mean.of(losses, weights)

        mean = contrast(scores)
        value = mean.value
        if symmetric:
            value = (value + contrast(jnp.where(hidden, FAR, scores[:, :rows].T)).value) / 2
        first = jnp.argmax(scores, axis=-1) == jnp.arange(rows)
        return value, Aux(mean.weight, {"accuracy": Mean.of(first, weights)}, updates)

    return loss_fn


def _side(batch: Batch, prefix: str) -> dict[str, Array]:
    """One side's inputs, under the names that a model has for them."""
    found = {
        name.removeprefix(prefix): jnp.asarray(value)
        for name, value in batch.items()
        if name.startswith(prefix)
    }
    if missing := {"input_ids", "attention_mask"} - found.keys():
        raise ValueError(f"the batch has no {', '.join(prefix + name for name in sorted(missing))}")
    return found


def predict(
    model: Any, *, pooling: str = "mean", prefix: str = ""
) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, D]``: vectors of length 1.

    Args:
        model: with the head ``model``.
        pooling: see `feature_extraction.embed`.
        prefix: "query_" or "passage_" embeds that side of a batch of pairs.
    """
    embed_fn = embed(model, pooling=pooling, normalize=True)
    if not prefix:
        return embed_fn
    return lambda variables, batch: embed_fn(variables, _side(batch, prefix))


def evaluate(
    model: Any,
    variables: Variables,
    queries: Iterable[Batch],
    passages: Iterable[Batch],
    relevant: Relevant,
    *,
    num_passages: int,
    pooling: str = "mean",
    cutoffs: Sequence[int] = (1, 10),
) -> dict[str, float]:
    """How well each query finds its passages among all.

    Args:
        model, pooling: see `loss`.
        variables: the model's.
        queries: one epoch of Q texts, [B, S].
        passages: one epoch of N texts, [B, T].
        relevant: for each query the passages that are right, or their grades.
        num_passages: N.
        cutoffs: the k of the metrics.

    Returns:
        See `retrieval_metrics`.
    """
    embed_fn = jax.jit(once(predict, model, pooling=pooling))
    first = collect(embed_fn, variables, queries, size=len(relevant))
    second = collect(embed_fn, variables, passages, size=num_passages)
    return retrieval_metrics(first, second, relevant, cutoffs=cutoffs)
