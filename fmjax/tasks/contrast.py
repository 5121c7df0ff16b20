"""Contrast: what belongs together against everything else of the batch, on all devices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.types import Mean

FAR = -1e9
"""The score of what is no negative; finite, as minus infinity has no gradient."""


class Contrast(NamedTuple):
    """A loss over a batch.

    Attributes:
        loss: its mean, float32 [].
        weight: what it is a mean over; see `shared_mean`.
        accuracy: how often what belongs to a row scores highest.
    """

    loss: Array
    weight: Array
    accuracy: Mean


class Rivals(NamedTuple):
    """Whose rows a device's own rows are compared with.

    Attributes:
        right: int [B], the place of each row's partner among all.
        hidden: bool [B, A], rows of all that are no negatives of a row.
    """

    right: Array
    hidden: Array


def everywhere(x: Array, axis_name: str | None) -> Array:
    """Rows [B, ...] of all devices of a mapped axis, one device's after the other's: [A, ...].

    Without an axis they are all there already: under a sharded `jit` a batch is whole.
    """
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def rivals(weights: Array, labels: Array | None, axis_name: str | None) -> Rivals:
    """Which rows are compared with which.

    Args:
        weights: [B]; rows of weight 0 are no negatives.
        labels: int [B]; nor are rows of the same label, which are right for one another.
        axis_name: of `everywhere`.
    """
    size = weights.shape[0]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * size
    right = first + jnp.arange(size)
    others = everywhere(weights, axis_name)
    hidden = jnp.broadcast_to(others == 0, (size, others.shape[0]))
    if labels is not None:
        hidden |= labels[:, None] == everywhere(labels, axis_name)[None, :]
    return Rivals(right, hidden & (jnp.arange(others.shape[0]) != right[:, None]))


def shared_mean(mean: Mean, axis_name: str | None) -> tuple[Array, Array]:
    """(value, weight) of a mean over a device's rows, to be averaged over devices by weight.

    Each device's rows are compared with those of the others, and its gradient has their share in
    the others' losses too. That sum is right where all devices count alike: they do here, and what
    their rows weigh is in the values.
    """
    if axis_name is None:
        return mean.value, mean.weight
    weight = jax.lax.pmean(mean.weight, axis_name)
    return mean.total / jnp.where(weight == 0, 1.0, weight), weight


def softmax_contrast(
    queries: Array,
    passages: Array,
    *,
    scale: Array | float,
    weights: Array,
    labels: Array | None = None,
    symmetric: bool = False,
    axis_name: str | None = None,
) -> Contrast:
    """InfoNCE (nats): each query's own passage against all others of the batch.

    van den Oord et al. 2018, arXiv:1807.03748, equation 4, with the negatives of the batch
    (Henderson et al. 2017, arXiv:1705.00652); symmetric, it is that of CLIP (Radford et al. 2021,
    arXiv:2103.00020, figure 3).

    Args:
        queries: [B, D].
        passages: [B, 1 + n, D], the right one and n that are negatives of all queries.
        scale: of the scores, which are dot products; [].
        weights: [B]; passages of rows of weight 0 are no negatives.
        labels: int [B]; nor are those of rows of the same label, but for a row's own further ones.
        symmetric: whether the right passages also look for their queries; the loss is the mean of
            both.
        axis_name: of the axis that `pmap` or `shard_map` maps the batch over: the rows of all its
            devices are compared. None compares those of the batch.
    """
    several = passages.shape[1]
    everyone = everywhere(passages, axis_name)  # [A, 1 + n, D]
    own = rivals(weights, labels, axis_name)

    def contrast(scores: Array) -> Mean:
        return Mean.of(optax.softmax_cross_entropy_with_integer_labels(scores, own.right), weights)

    flat = jnp.swapaxes(everyone, 0, 1).reshape(-1, passages.shape[-1])  # the right ones first
    scores = scale * (queries @ flat.T)  # [B, (1 + n) A]
    scores = jnp.where(jnp.tile(own.hidden, (1, several)), FAR, scores)
    mean = contrast(scores)
    if symmetric:
        back = scale * (passages[:, 0] @ everywhere(queries, axis_name).T)  # [B, A]
        back = contrast(jnp.where(own.hidden, FAR, back))
        mean = Mean((mean.total + back.total) / 2, mean.weight)
    found = Mean.of(jnp.argmax(scores, axis=-1) == own.right, weights)
    return Contrast(*shared_mean(mean, axis_name), found)


def sigmoid_contrast(
    images: Array,
    texts: Array,
    *,
    scale: Array | float,
    bias: Array | float,
    weights: Array,
    labels: Array | None = None,
    axis_name: str | None = None,
) -> Contrast:
    """Whether each text is of each image, by itself (nats): Zhai et al. 2023, arXiv:2303.15343,
    equation 1.

    Args:
        images, texts: [B, D].
        scale, bias: t and b, of the scores; [].
        weights: [B]; pairs with a row of weight 0 do not count.
        labels: int [B]; nor do those of two rows of the same label.
        axis_name: as of `softmax_contrast`.
    """
    own = rivals(weights, labels, axis_name)
    scores = scale * (images @ everywhere(texts, axis_name).T) + bias  # [B, A]
    same = jnp.arange(scores.shape[1]) == own.right[:, None]
    pairs = -jax.nn.log_sigmoid(jnp.where(same, scores, -scores))
    mean = Mean.of(jnp.where(own.hidden, 0.0, pairs).sum(axis=1), weights)
    found = jnp.argmax(jnp.where(own.hidden, FAR, scores), axis=-1) == own.right
    return Contrast(*shared_mean(mean, axis_name), Mean.of(found, weights))
