"""Cross-entropy over a large vocabulary, exact, without ever holding the logits of a whole batch.

The logits of a batch are its largest array by far: 8 x 1024 tokens over 152,064 words are 5 GB in
float32, and the gradient is as large again. Here they exist for one chunk of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.nn.placement import BATCH, parts_over
from fmjax.types import Mean, PyTree, Variables, at_least_float32

CHUNK_SIZE = 1024
"""Tokens whose logits exist at one time, on each device that has examples of its own. Each chunk
reads the output matrix once and adds to its gradient once, which 1024 tokens' products hide; over
several devices it gathers the one and sums the other once, too."""
IGNORED = -100
"""The label of a token that is not predicted, as Hugging Face has it."""

Unembed = Callable[[Array], Array]
"""Hidden states [..., D] -> logits over the vocabulary, float32 [..., V]."""


class VocabularyLoss(NamedTuple):
    """Means over tokens.

    Args:
        loss: cross-entropy in nats with label smoothing and z-loss; the one that has a gradient.
        nll: negative log-likelihood of the labels in nats, without either.
        accuracy: share of tokens whose most probable word is the label.
    """

    loss: Mean
    nll: Mean
    accuracy: Mean


def unembed_fn(model: Any, variables: Variables) -> Unembed:
    """The vocabulary head of a model as a function of hidden states.

    Args:
        model: a language model that takes ``output_logits=False``.
        variables: its variables; gradients flow to them.
    """
    return lambda hidden: model.apply(variables, hidden, method="unembed")


def vocabulary_loss(
    unembed: Unembed,
    hidden: Array,
    labels: Array,
    weights: Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int = CHUNK_SIZE,
) -> VocabularyLoss:
    """Weighted cross-entropy of softmax(unembed(hidden)), computed chunk by chunk.

    ``(1 - e) * nll + e * mean over words of nll + z * log(Z)^2``, where e is the label smoothing
    (Szegedy et al. 2016, arXiv:1512.00567, section 7) and Z the softmax's denominator (z-loss:
    Chowdhery et al. 2022, arXiv:2204.02311, section 5). A token's gradient does not depend on
    the other tokens but for a common factor, so it is computed together with the loss, while the
    chunk's logits are there: as many products as the plain loss takes, and nothing is recomputed.
    Gradients of parameters are summed over chunks in float32, whatever they are computed in.

    Args:
        unembed: what it closes over (parameters) is differentiated too; dropout in it is not
            supported, as chunks would share their keys.
        hidden: [B, T, D].
        labels: int [B, T]; a label outside the vocabulary makes the loss nan where its weight is
            not 0.
        weights: float [B, T]; a token of weight 0 is ignored, whatever its hidden state.
        label_smoothing: e, in [0, 1).
        z_loss: z, at least 0; 1e-4 is usual.
        chunk_size: see `CHUNK_SIZE`; chunks are cut along T, so one holds at least B tokens.

    Raises:
        ValueError: shapes that do not belong together, or settings out of range.
    """
    problems = _shape_problems(hidden, {"labels": labels, "weights": weights}, chunk_size)
    if not 0 <= label_smoothing < 1:
        problems.append(f"label_smoothing is {label_smoothing}; it must be in [0, 1)")
    if z_loss < 0:
        problems.append(f"z_loss is {z_loss}; it must not be negative")
    if problems:
        raise ValueError("; ".join(problems))
    pieces = cut(
        (hidden, jnp.asarray(labels), jnp.asarray(weights, jnp.float32)), chunk_size=chunk_size
    )
    converted, params = jax.closure_convert(unembed, pieces[0][0])
    sums = _weighted_sums(converted, label_smoothing, z_loss)
    loss, nll, right = sums(*pieces, *params)
    weight = jnp.sum(pieces[2])
    nll, right = jax.lax.stop_gradient((nll, right))
    return VocabularyLoss(Mean(loss, weight), Mean(nll, weight), Mean(right, weight))


def over_vocabulary(
    unembed: Unembed,
    fn: Callable[..., PyTree],
    hidden: Array,
    *per_token: Array,
    chunk_size: int = CHUNK_SIZE,
) -> PyTree:
    """`fn` of each token's logits, chunk by chunk; logits are recomputed in a backward pass.

    Args:
        unembed: hidden states to logits.
        fn: ``(logits [B, t, V], *pieces of per_token [B, t, ...]) -> tree of [B, t, ...]``.
        hidden: [B, T, D].
        per_token: arrays [B, T, ...] that `fn` reads beside the logits.
        chunk_size: see `CHUNK_SIZE`.

    Returns:
        The tree of [B, T, ...].
    """
    named = {f"per_token[{i}]": array for i, array in enumerate(per_token)}
    if problems := _shape_problems(hidden, named, chunk_size):
        raise ValueError("; ".join(problems))

    @jax.checkpoint
    def piece(arrays: tuple[Array, ...]) -> PyTree:
        states, *others = arrays
        return fn(unembed(states), *others)

    length = hidden.shape[1]
    mapped = jax.lax.map(piece, cut((hidden, *per_token), chunk_size=chunk_size))  # [n, B, t, ...]

    def joined(leaf: Array) -> Array:
        leaf = jnp.moveaxis(leaf, 0, 1)  # [B, n, t, ...]
        return leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:])[:, :length]  # [B, T, ...]

    return jax.tree.map(joined, mapped)


def log_likelihood(
    unembed: Unembed, hidden: Array, labels: Array, *, chunk_size: int = CHUNK_SIZE
) -> Array:
    """Log-probability of every label in nats, float32 [B, T]; differentiable token by token.

    Args:
        unembed: hidden states to logits.
        hidden: [B, T, D].
        labels: int [B, T]; a label outside the vocabulary has log-probability nan.
        chunk_size: see `CHUNK_SIZE`.
    """

    def of_labels(logits: Array, labels: Array) -> Array:
        return _label_logit(logits, labels) - jax.nn.logsumexp(logits, axis=-1)

    return over_vocabulary(unembed, of_labels, hidden, labels, chunk_size=chunk_size)


def cut(arrays: tuple[Array, ...], *, chunk_size: int) -> tuple[Array, ...]:
    """Arrays [B, T, ...] as n chunks [n, B, t, ...] of about `chunk_size` tokens on each device,
    zero-padded.

    The cut is along T: the examples, which are spread over the devices, stay where they are.
    """
    rows, length = arrays[0].shape[:2]
    chunk_size *= parts_over(BATCH)
    count = min(max(length, 1), -(-rows * length // chunk_size))  # n
    size = -(-length // max(count, 1))  # t
    count = max(-(-length // max(size, 1)), 1)

    def pieces(array: Array) -> Array:
        array = jnp.asarray(array)
        padding = [(0, 0), (0, count * size - length), *[(0, 0)] * (array.ndim - 2)]
        array = jnp.pad(array, padding).reshape(rows, count, size, *array.shape[2:])
        return jnp.moveaxis(array, 1, 0)

    return tuple(pieces(array) for array in arrays)


def _shape_problems(hidden: Array, per_token: dict[str, Array], chunk_size: int) -> list[str]:
    problems = []
    if hidden.ndim != 3:
        problems.append(f"hidden has shape {hidden.shape}; it must be [B, T, D]")
    for name, array in per_token.items():
        if array.shape[:2] != hidden.shape[:2]:
            problems.append(f"{name} has shape {array.shape}; hidden has shape {hidden.shape}")
    if chunk_size < 1:
        problems.append(f"chunk_size is {chunk_size}; it must be at least 1")
    return problems


def _words(logits: Array) -> Array:
    """int [..., V]: the number of each word."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def is_known(labels: Array, size: int) -> Array:
    """bool [...]: which labels are among 0 to `size` - 1, so many words or classes."""
    return (labels >= 0) & (labels < size)


def _label_logit(logits: Array, labels: Array) -> Array:
    """[..., V], [...] -> [...]: the labels' logits, nan for a label outside the vocabulary."""
    known = is_known(labels, logits.shape[-1])
    at = jnp.where(known, labels, 0)[..., None]
    return jnp.where(known, jnp.take_along_axis(logits, at, axis=-1)[..., 0], jnp.nan)


class _Tokens(NamedTuple):
    """Of each token: loss, negative log-likelihood, whether it is right, log Z; all [B, t]."""

    loss: Array
    nll: Array
    right: Array
    log_z: Array


def _weighted_sums(
    unembed: Callable[..., Array], label_smoothing: float, z_loss: float
) -> Callable[..., tuple[Array, Array, Array]]:
    """``(hidden, labels, weights, *params) -> (loss, nll, right)``, weighted sums over chunks.

    Only the first has a gradient; its reverse pass multiplies what the forward pass has stored.
    """

    def tokens(logits: Array, labels: Array) -> _Tokens:
        top = jnp.max(logits, axis=-1)
        log_z = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
        at_label = _label_logit(logits, labels)
        smooth = (1 - label_smoothing) * at_label
        if label_smoothing:
            smooth += label_smoothing * jnp.mean(logits, axis=-1)
        # The label is the first of the largest, as argmax has it; maxima are many times faster on
        # CPU.
        before = _words(logits) < labels[..., None]
        earlier = jnp.max(jnp.where(before, logits, -jnp.inf), axis=-1)
        right = (at_label >= top) & (earlier < top)
        return _Tokens(log_z - smooth + z_loss * jnp.square(log_z), log_z - at_label, right, log_z)

    def logits_gradient(logits: Array, labels: Array, weights: Array, log_z: Array) -> Array:
        share = jnp.exp(logits - log_z[..., None]) * (1 + 2 * z_loss * log_z[..., None])
        target = (1 - label_smoothing) * (_words(logits) == labels[..., None]) + (
            label_smoothing / logits.shape[-1]
        )
        return weights[..., None] * (share - target)

    def weighed(part: _Tokens, weights: Array) -> tuple[Array, Array, Array]:
        first, second, third = (Mean.of(values, weights).total for values in part[:3])
        return first, second, third

    def visible(hidden: Array, weights: Array) -> Array:
        # Whatever an ignored token's state is, even nan, its gradient must be 0.
        return jnp.where(weights[..., None] == 0, 0.0, hidden).astype(hidden.dtype)

    def added(sums: PyTree, part: PyTree) -> PyTree:
        return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, part)

    @jax.custom_vjp
    def sums(
        hidden: Array, labels: Array, weights: Array, *params: Array
    ) -> tuple[Array, Array, Array]:
        def chunk(total: PyTree, piece: tuple[Array, Array, Array]) -> tuple[PyTree, None]:
            hidden, labels, weights = piece
            part = tokens(unembed(visible(hidden, weights), *params), labels)
            return added(total, weighed(part, weights)), None

        zero = jnp.zeros(())
        return jax.lax.scan(chunk, (zero, zero, zero), (hidden, labels, weights))[0]

    def forward(
        hidden: Array, labels: Array, weights: Array, *params: Array
    ) -> tuple[tuple[Array, Array, Array], PyTree]:
        def chunk(total: PyTree, piece: tuple[Array, Array, Array]) -> tuple[PyTree, PyTree]:
            hidden, labels, weights = piece
            logits, pull_back = jax.vjp(unembed, visible(hidden, weights), *params)
            part = tokens(logits, labels)
            gradient = logits_gradient(logits, labels, weights, part.log_z)
            to_hidden, *to_params = pull_back(gradient.astype(logits.dtype))
            losses = jnp.where(weights == 0, 0.0, part.loss)
            return added(total, (weighed(part, weights), to_params)), (to_hidden, losses)

        zero = jnp.zeros(())
        start = [jnp.zeros(p.shape, at_least_float32(p.dtype)) for p in params]
        (total, to_params), (to_hidden, losses) = jax.lax.scan(
            chunk, ((zero, zero, zero), start), (hidden, labels, weights)
        )
        # A custom derivative must return each parameter's own dtype, which only arrays carry.
        empty = [jnp.zeros(0, p.dtype) for p in params]
        return total, (to_hidden, losses, to_params, empty)

    def backward(stored: PyTree, cotangents: tuple[Array, Array, Array]) -> PyTree:
        to_hidden, losses, to_params, empty = stored
        g = cotangents[0]
        scaled = [(g * x).astype(like.dtype) for x, like in zip(to_params, empty, strict=True)]
        return (g * to_hidden).astype(to_hidden.dtype), None, g * losses, *scaled

    sums.defvjp(forward, backward)
    return sums
