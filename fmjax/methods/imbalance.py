"""Losses for classes of unequal size, and for examples of unequal difficulty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.tasks.apply import apply_fn, row_weights
from fmjax.tasks.masking import weigh
from fmjax.tasks.vocabulary_loss import is_known
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

ATTACHES = ("loss",)


def effective_number_weights(counts: Sequence[int], beta: float) -> np.ndarray:
    """A weight a class, by the effective number of its examples (Cui et al. 2019,
    arXiv:1901.05555, eq. 4): ``(1 - beta) / (1 - beta ** n)``, their mean 1.

    Args:
        counts: n, training examples of each class [C].
        beta: 0 weighs all alike; towards 1, by the inverse of n.

    Returns:
        float32 [C].

    Raises:
        ValueError: a class without examples, or `beta` outside [0, 1).
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}; it must be at least 0 and below 1 (0.999 is usual)")
    n = np.asarray(counts, np.float64)
    if n.ndim != 1 or not n.size or (n < 1).any():
        raise ValueError(f"counts are {list(counts)}: each class needs an example to have a weight")
    # log1p and expm1: beta ** n is 1 but for the last bits where beta is almost 1.
    weights = (1 - beta) / -np.expm1(n * np.log1p(-(1 - beta))) if beta else np.ones_like(n)
    return (weights / weights.mean()).astype(np.float32)


def class_weighted(loss_fn: LossFn, weights: Sequence[float] | np.ndarray) -> LossFn:
    """The loss with each example weighing as its class does.

    The mean is over the weights' sum, as in PyTorch's cross-entropy with weights. With label
    smoothing PyTorch weighs each class that has a share; here an example has the weight of its own.

    Args:
        loss_fn: of batches with ``labels`` int [B] and perhaps ``weight`` float [B]. A label that
            has no weight makes the loss nan, but for -100, which does not count, and in rows of
            weight 0.
        weights: [C], such as `effective_number_weights`.

    Raises:
        ValueError: weights that are negative or not finite; when called, labels not int [B].
    """
    table = np.asarray(weights, np.float32)
    if table.ndim != 1 or not np.isfinite(table).all() or (table < 0).any():
        raise ValueError(f"weights are {weights}; one finite number a class, at least 0, is needed")

    def weighted(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        labels = jnp.asarray(batch["labels"])
        if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"labels are {labels.dtype} {labels.shape}; classes int [B] have weights"
            )
        known = is_known(labels, len(table))
        own = jnp.where(known, jnp.asarray(table)[jnp.where(known, labels, 0)], jnp.nan)
        rows = weigh(batch, labels)
        weight = jnp.where(rows == 0, 0.0, rows * own)
        return loss_fn(variables, {**batch, "weight": weight}, rng)

    return weighted


def focal(model: Any, *, gamma: float = 2.0, train: bool = True) -> LossFn:
    """The focal loss (Lin et al. 2017, arXiv:1708.02002, eq. 4): ``-(1 - p) ** gamma * log(p)`` of
    each right class's probability p, the mean over examples, in nats.

    Around it, `class_weighted` gives the paper's alpha (eq. 5).

    Args:
        model: its logits are [B, C] or, of tokens, [B, T, C], where labels below 0 do not count.
        gamma: 0 is cross-entropy.
        train: whether dropout is on.

    Raises:
        ValueError: `gamma` is negative.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}; it must be at least 0")
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        output, updates = apply(variables, batch, rng, train=train)
        logits, labels = output.logits, jnp.asarray(batch["labels"])
        assert logits is not None
        weight = row_weights(batch, len(labels))
        weight = weight.reshape(*weight.shape, *(1 for _ in labels.shape[1:])) * (labels >= 0)
        right = jnp.maximum(labels, 0)[..., None]
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), right, axis=-1)[..., 0]
        # expm1: 1 - p without losing all its bits where p is almost 1. Its power has no gradient
        # at 0 for gamma below 1, and none is needed there.
        miss = jnp.maximum(-jnp.expm1(log_p), jnp.finfo(jnp.float32).tiny)
        mean = Mean.of(-(miss**gamma) * log_p, weight)
        metrics = {"accuracy": Mean.of(jnp.argmax(logits, -1) == labels, weight)}
        return mean.value, Aux(mean.weight, metrics, updates)

    return loss_fn
