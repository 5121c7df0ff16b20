"""Rows without labels beside rows that have them: what methods that learn from both share.

A batch has two parts, "labelled/..." and "unlabelled/...", each with as many rows as its stream
gives (`fmjax.data.mixture.Mixture`)::

    stream = Mixture({LABELLED: batches(source, ...), UNLABELLED: batches(target, ...)})

All rows go through the model in one pass, in which the task's loss counts the labelled ones; so
texts of both parts must have one length (give both streams the same single bucket), and batch
normalisation sees both. Labels of unlabelled rows are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fmjax.data.mixture import part
from fmjax.tasks.apply import TARGETS, row_weights
from fmjax.tasks.feature_extraction import pool, states_mask
from fmjax.tasks.watched import Watched
from fmjax.tree import merge
from fmjax.types import Aux, Batch, GradFn, LossFn, Output, Variables

ATTACHES = ("loss", "gradient")

LABELLED, UNLABELLED = "labelled", "unlabelled"
PROGRESS = "progress"
"""The collection that counts steps, for strengths that change."""

TaskLoss = Callable[[Any], LossFn]
"""model -> LossFn that runs the model once: a task's ``loss``, with `functools.partial` for its
settings."""


class Features(NamedTuple):
    """What is read of a model's pass.

    Args:
        read: (output, the model's inputs) -> [B, D].
        asks: options of the model's call, such as ``output_hidden_states``.
    """

    read: Callable[[Output, Batch], Array]
    asks: tuple[str, ...] = ()


def pooled(pooling: str = "mean", layer: int = -1) -> Features:
    """A layer's hidden states as one vector a row, of any family that has them; of
    encoder-decoders, the encoder's.

    Args:
        pooling: "mean" over what is no padding, "cls" (the first token, which is what classifiers
            of BERT and ViT read), or "max".
        layer: which of the hidden states, the last by default.

    Raises:
        ValueError: an unknown pooling; when called, a model without hidden states.
    """
    if pooling not in ("mean", "cls", "max"):
        raise ValueError(f"pooling is {pooling!r}; it must be 'mean', 'cls' or 'max'")

    def read(output: Output, inputs: Batch) -> Array:
        states = output.encoder_hidden_states or output.hidden_states
        if not states:
            raise ValueError("the model gives no hidden states; use features=LOGITS")
        return pool(states[layer], states_mask(output, inputs), pooling)

    return Features(read, ("output_hidden_states",))


def _logits(output: Output, inputs: Batch) -> Array:
    if output.logits is None or output.logits.ndim != 2:
        raise ValueError("the model gives no logits [B, C]; a classification head is needed")
    return output.logits


LOGITS = Features(_logits)
"""The classifier's logits [B, C], of families without hidden states too."""


def both(batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """(labelled part, unlabelled part), each by the names of its own stream.

    Raises:
        ValueError: one has no rows, or there are other parts.
    """
    others = {name.partition("/")[0] for name in batch} - {LABELLED, UNLABELLED}
    if others:
        raise ValueError(
            f"the batch has {sorted(others)} beside {LABELLED}/... and {UNLABELLED}/...; name the "
            "streams of the mixture so"
        )
    parts = part(batch, LABELLED), part(batch, UNLABELLED)
    for name, rows in zip((LABELLED, UNLABELLED), parts, strict=True):
        if not _size(rows):
            raise ValueError(f"the batch has no {name} rows; there must be at least one")
    return parts


def run_once(
    task_loss: TaskLoss,
    model: Any,
    features: Features,
    variables: Variables,
    parts: Sequence[Batch],
    rng: Array | None,
) -> tuple[Array, Aux, list[Array]]:
    """The task's loss of the first part, and the features of every part's rows, from one pass.

    Raises:
        ValueError: parts that are not one batch together, or a loss that runs the model otherwise.
    """
    watched = Watched(model, dict.fromkeys(features.asks, True))
    loss, aux = task_loss(watched)(variables, _together(parts), rng)
    passed = watched.passed()
    found = features.read(passed.output, passed.inputs).astype(jnp.float32)
    sizes = [_size(rows) for rows in parts]
    if len(found) != sum(sizes):
        raise ValueError(
            f"{sum(sizes)} rows have {len(found)} features; there must be one for each"
        )
    return loss, aux, jnp.split(found, np.cumsum(sizes)[:-1])


def _size(rows: Batch) -> int:
    return len(next(iter(rows.values())))


def _together(parts: Sequence[Batch]) -> dict[str, Any]:
    """The parts' rows one after another; only the first part's have labels and weight."""
    first, *others = parts
    if "labels" not in first:
        raise ValueError(f"the labelled rows have no labels, only {sorted(first)}")
    joined: dict[str, Any] = {}
    problems = []
    inputs = [set(rows) - TARGETS for rows in parts]
    if any(names != inputs[0] for names in inputs):
        problems.append(f"parts have different inputs: {[sorted(names) for names in inputs]}")
    for name in first.keys() - {"weight", "labels"}:
        leaves = [jnp.asarray(rows[name]) for rows in parts if name in rows]
        if len(leaves) < len(parts):
            continue  # an input, which is a problem already, or what no model reads
        if len({leaf.shape[1:] for leaf in leaves}) > 1:
            shapes = [leaf.shape for leaf in leaves]
            problems.append(f"{name} has shapes {shapes}; give all streams one bucket")
            continue
        joined[name] = jnp.concatenate(leaves)
    if problems:
        raise ValueError("; ".join(problems))
    rest = sum(map(_size, others))
    for name, leaf in (("labels", jnp.asarray(first["labels"])), ("weight", row_weights(first))):
        joined[name] = jnp.concatenate([leaf, jnp.zeros((rest, *leaf.shape[1:]), leaf.dtype)])
    return joined


Strength = float | optax.Schedule
"""A coefficient, or a function from the number of steps done to it."""


def strength_problems(name: str, strength: Strength) -> list[str]:
    """What is wrong with a coefficient that is a number."""
    if callable(strength) or 0 <= strength < float("inf"):
        return []
    return [f"{name}={strength} must be at least 0"]


def strength_now(strength: Strength, variables: Variables) -> Array:
    """The coefficient at this step, float32 [].

    Raises:
        ValueError: it changes with steps that nobody counts.
    """
    if not callable(strength):
        return jnp.asarray(strength, jnp.float32)
    if PROGRESS not in variables:
        raise ValueError(
            f"the variables have the collections {sorted(variables)} and no {PROGRESS!r}, which a "
            "strength that changes needs: with_progress(variables), and counting(grad_fn)"
        )
    return jnp.asarray(strength(variables[PROGRESS]["step"]), jnp.float32)


def with_progress(variables: Variables) -> Variables:
    """The variables with a count of steps, which `counting` moves on."""
    return {**variables, PROGRESS: {"step": jnp.zeros((), jnp.int32)}}


def counting(grad_fn: GradFn) -> GradFn:
    """Counts steps in the collection "progress"; put it around everything else that makes the
    gradient (`accumulate`), so that it counts once a step.

    Raises:
        ValueError: when called, variables without the count (`with_progress`).
    """

    def counted(
        trainable: Variables, non_trainable: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Variables, Array, Aux]:
        if PROGRESS not in non_trainable:
            raise ValueError(f"the variables have no {PROGRESS!r}; begin with with_progress")
        grads, loss, aux = grad_fn(trainable, non_trainable, batch, rng)
        moved = {PROGRESS: jax.tree.map(lambda step: step + 1, non_trainable[PROGRESS])}
        return grads, loss, aux._replace(updates=merge(aux.updates, moved))

    return counted
