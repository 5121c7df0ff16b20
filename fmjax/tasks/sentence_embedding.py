"""Sentence embeddings: vectors in which a query is near its passage, trained by contrast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.metrics.retrieval import Relevant, retrieval_metrics
from fmjax.tasks.apply import collect, once, row_weights
from fmjax.tasks.contrast import softmax_contrast
from fmjax.tasks.feature_extraction import embed, encoder
from fmjax.types import Aux, Batch, LossFn, Variables

QUERY, PASSAGE = "query_", "passage_"


def loss(
    model: Any,
    *,
    pooling: str = "mean",
    temperature: float = 0.05,
    symmetric: bool = False,
    axis_name: str | None = None,
    train: bool = True,
) -> LossFn:
    """InfoNCE (nats): each query's own passage against all others of the batch, by cosine.

    See `fmjax.tasks.contrast.softmax_contrast`. A batch has ``query_input_ids`` and
    ``query_attention_mask`` [B, S], ``passage_input_ids`` and ``passage_attention_mask`` [B, T], or
    [B, 1 + n, T] with n hard negatives behind the right passage; ``weight`` [B]. Passages of rows
    of weight 0 are no negatives. With ``labels`` int [B], nor are the passages of rows of the same
    label, which are right for one another's queries.

    More examples are more negatives: accumulated over pieces, each sees those of its own; over
    devices all are seen, under a sharded `jit` as under `pmap` with its axis' name.

    Args:
        model: with the head ``model``.
        pooling: see `feature_extraction.embed`.
        temperature: what cosines are divided by.
        symmetric: whether passages also look for their queries; the loss is the mean of both.
        axis_name: of the axis that `pmap` or `shard_map` maps the batch over, if one does.
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
        if side["input_ids"].ndim == 3:  # [B, 1 + n, T] -> [B * (1 + n), T]
            side = {name: value.reshape(-1, value.shape[-1]) for name, value in side.items()}
        variables = {**variables, **updates}
        passages, updates = encode(variables, side, keys[1], train=train)
        rows, width = queries.shape
        contrast = softmax_contrast(
            queries,
            passages.reshape(rows, -1, width),  # [B, 1 + n, D]
            scale=1.0 / temperature,
            weights=row_weights(batch, rows),
            labels=jnp.asarray(batch["labels"]) if "labels" in batch else None,
            symmetric=symmetric,
            axis_name=axis_name,
        )
        return contrast.loss, Aux(contrast.weight, {"accuracy": contrast.accuracy}, updates)

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
