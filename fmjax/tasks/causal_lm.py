"""Causal language modelling: each token from those before it, in packed documents too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.metrics.language_modelling import bits_per_byte, perplexity
from fmjax.tasks.apply import apply_fn, means, once, row_weights
from fmjax.tasks.masking import weigh
from fmjax.tasks.vocabulary_loss import (
    CHUNK_SIZE,
    IGNORED,
    log_likelihood,
    unembed_fn,
    vocabulary_loss,
)
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

# What a batch has for each token.
_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "labels")


def loss(
    model: Any,
    *,
    train: bool = True,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    balance: float = 0.0,
    chunk_size: int = CHUNK_SIZE,
) -> LossFn:
    """Cross-entropy (nats) of the next token, a mean over tokens; never [B, T, V] at once.

    A batch has ``input_ids`` [B, T] and, where they apply, ``attention_mask`` [B, T];
    ``labels`` int [B, T] (not shifted; -100 is not predicted, such as a prompt; the ids without
    them); ``segment_ids`` int [B, T], see `unpack`; ``weight`` [B]. Rows may be padded on either
    side, see `padded_behind`.

    Args:
        model: with the head ``causal_lm``.
        train: whether dropout is on.
        label_smoothing, z_loss, chunk_size: see `vocabulary_loss`.
        balance: coefficient of `load_balance`, for mixtures of experts (``router_aux_loss_coef``
            in their config.json). It is no mean over tokens: accumulated over pieces, it is the
            mean of the pieces' balances.

    Raises:
        ValueError: a model that sees the tokens it is to predict.
    """
    check_causal(model)
    routed = {"output_router_logits": True} if balance else {}
    apply = apply_fn(model, output_logits=False, **routed)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        batch = padded_behind(batch)
        labels = next_tokens(batch)
        output, updates = apply(variables, unpack(batch, first_position(model)), rng, train=train)
        assert output.last_hidden_state is not None
        found = vocabulary_loss(
            unembed_fn(model, variables),
            output.last_hidden_state,
            labels,
            weigh(batch, labels),
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            chunk_size=chunk_size,
        )
        value, weight = found.loss.value, found.loss.weight
        metrics = {"nll": found.nll, "accuracy": found.accuracy}
        if balance:
            if output.router_logits is None:
                raise ValueError("balance is for mixtures of experts, and this model has no router")
            uneven = load_balance(
                output.router_logits, model.config.num_experts_per_tok, _counted(batch)
            )
            metrics["load_balance"] = Mean(uneven * weight, weight)
            value += balance * uneven
        return value, Aux(weight, metrics, updates)

    return loss_fn


def check_causal(model: Any) -> None:
    """Raises a ValueError for an encoder with the head "causal_lm" whose config does not make it a
    decoder, as BERT's files do not: it sees what it is to predict, and copies it.
    """
    from fmjax.nn.encoder import Encoder  # which imports Flax

    if isinstance(model, Encoder) and not model.config.is_decoder:
        raise ValueError(
            f"this {model.family} has is_decoder=False in its config and sees the tokens that it "
            "is to predict; make it one: model = model.clone(config=dataclasses.replace("
            "model.config, is_decoder=True))"
        )


def next_tokens(batch: Batch) -> Array:
    """int [B, T]: at position t the label of position t + 1, -100 where there is none to predict.

    That is at the last position, where the next token is padding or this one is, and where the next
    begins another document.

    Raises:
        ValueError: labels that are not [B, T].
    """
    ids = jnp.asarray(batch["input_ids"])
    labels = jnp.asarray(batch.get("labels", ids))
    if labels.shape != ids.shape:
        raise ValueError(
            f"labels have shape {labels.shape}, input_ids {ids.shape}; they must agree"
        )
    tokens = _tokens(batch)
    keep = tokens[:, 1:] & tokens[:, :-1]
    if "segment_ids" in batch:
        segments = jnp.asarray(batch["segment_ids"])
        keep &= segments[:, 1:] == segments[:, :-1]
    following = jnp.where(keep, labels[:, 1:], IGNORED)
    return jnp.pad(following, ((0, 0), (0, 1)), constant_values=IGNORED)


def padded_behind(batch: Batch) -> Batch:
    """A batch whose rows begin with their first token: padding before it goes to the row's end.

    So positions count from the first token in every family, also where a family takes none. Rows
    that begin with a token stay as they are.

    Returns:
        The batch with these rows; as it is, where no ``attention_mask`` [B, T] tells what padding
        is, or where it says positions itself.
    """
    by = _padding_before(batch)
    if by is None:
        return batch
    whole = [n for n in _BY_TOKEN if n in batch and batch[n].shape == batch["input_ids"].shape]
    return {**batch, **{name: _turned(batch[name], by) for name in whole}}


def _padding_before(batch: Batch) -> Array | None:
    """int [B, 1], or None: what `padded_behind` turns each row by."""
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != batch["input_ids"].shape:
        return None
    if "segment_ids" in batch or "position_ids" in batch:
        return None
    return jnp.argmax(jnp.asarray(mask) != 0, axis=1, keepdims=True)


def _turned(values: Array | np.ndarray, by: Array) -> Array:
    """[B, T]: each row from column `by` [B, 1] on, and then what was before it."""
    length = values.shape[1]
    places = (jnp.arange(length) + by) % length
    return jnp.take_along_axis(jnp.asarray(values), places, axis=1)


def first_position(model: Any) -> int:
    """The row of its position table that a sequence's first token has: 0, but for RoBERTa's."""
    return getattr(model, "position_offset", 0)


def unpack(batch: Batch, first: int = 0) -> Batch:
    """A batch of packed documents with the mask and the positions that keep them apart.

    ``segment_ids`` int [B, T] number the documents of a row, 0 is padding (Raffel et al. 2020,
    arXiv:1910.10683, section 2.1). Each token sees only its own document (attention_mask
    [B, T, T]; causality is the model's) and its position counts from the document's start.

    Args:
        batch: what is read.
        first: see `first_position`.

    Returns:
        The batch with those; as it is, if it has no ``segment_ids``.
    """
    if "segment_ids" not in batch:
        return batch
    segments = jnp.asarray(batch["segment_ids"])
    length = segments.shape[1]
    mask = segments[:, :, None] == segments[:, None, :]  # [B, T, T]
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    places = jnp.arange(length)
    starts = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)  # [B, T]
    return {**batch, "attention_mask": mask, "position_ids": first + places - starts}


def _tokens(batch: Batch) -> Array:
    """bool [B, T]: what is no padding."""
    keep = jnp.ones(batch["input_ids"].shape, bool)
    for name in ("attention_mask", "segment_ids"):
        if name in batch and batch[name].ndim == 2:
            keep &= jnp.asarray(batch[name]) != 0
    return keep


def _counted(batch: Batch) -> Array:
    """bool [B, T]: tokens of rows that count."""
    keep = _tokens(batch)
    return keep & (row_weights(batch, len(keep)) != 0)[:, None]


def load_balance(router_logits: tuple[Array, ...], top_k: int, keep: Array) -> Array:
    """How unevenly tokens are sent to experts: E times the dot product of each expert's share of
    the tokens and its mean probability; `top_k` if all are equal.

    Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6, with shares and means over all layers
    together, as Mixtral has it.

    Args:
        router_logits: L arrays [B * T, E].
        top_k: experts that a token is sent to.
        keep: [B, T], nonzero for tokens that count.
    """
    logits = jnp.stack(router_logits).astype(jnp.float32)  # [L, B * T, E]
    experts = logits.shape[-1]
    weights = jnp.asarray(keep, jnp.float32).reshape(1, -1, 1)
    probabilities = jax.nn.softmax(logits, axis=-1)
    _, chosen = jax.lax.top_k(probabilities, top_k)  # [L, B * T, top_k]
    sent = jax.nn.one_hot(chosen, experts).sum(axis=2)  # [L, B * T, E]
    count = jnp.maximum(weights.sum() * len(router_logits), 1.0)
    share = (sent * weights).sum(axis=(0, 1)) / count  # [E]
    mean = (probabilities * weights).sum(axis=(0, 1)) / count  # [E]
    return experts * jnp.sum(share * mean)


class Scored(NamedTuple):
    """Log-probabilities of the tokens of a batch.

    Args:
        log_probs: float32 [B, T] in nats: at position t of the label of position t + 1 given what
            stands before it; 0 where there is none (see `next_tokens`). Of encoder-decoders
            (`fmjax.tasks.seq2seq`), of position t's own label.
        mask: bool [B, T], where there is one.
        updates: new values of mutable collections.
    """

    log_probs: Array
    mask: Array
    updates: Variables


def token_log_probs(
    model: Any, *, train: bool = False, chunk_size: int = CHUNK_SIZE
) -> Callable[[Variables, Batch, Array | None], Scored]:
    """``(variables, batch, rng) -> Scored``: each token by itself, differentiable.

    Args:
        model, train, chunk_size: see `loss`, as is what a batch has.

    Raises:
        ValueError: as `loss`.
    """
    check_causal(model)
    apply = apply_fn(model, output_logits=False)

    def score(variables: Variables, batch: Batch, rng: Array | None) -> Scored:
        by, batch = _padding_before(batch), padded_behind(batch)
        labels = next_tokens(batch)
        output, updates = apply(variables, unpack(batch, first_position(model)), rng, train=train)
        assert output.last_hidden_state is not None
        unembed = unembed_fn(model, variables)
        mask = labels != IGNORED
        scores = log_likelihood(
            unembed, output.last_hidden_state, jnp.where(mask, labels, 0), chunk_size=chunk_size
        )
        scores = jnp.where(mask, scores, 0.0)
        if by is not None:
            scores, mask = _turned(scores, -by), _turned(mask, -by)
        return Scored(scores, mask, updates)

    return score


def predict(model: Any, *, chunk_size: int = CHUNK_SIZE) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, T]``: log-probability (nats) of each token given those before it;
    0 where nothing predicts it: at the first token, at padding, at the start of a document.
    """
    score = token_log_probs(model, chunk_size=chunk_size)

    def predict_fn(variables: Variables, batch: Batch) -> Array:
        return jnp.pad(score(variables, batch, None).log_probs[:, :-1], ((0, 0), (1, 0)))

    return predict_fn


def evaluate(
    model: Any,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    num_bytes: float | np.ndarray | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, float]:
    """How well a whole set is predicted.

    Args:
        model, chunk_size: see `loss`.
        variables: the model's.
        batches: one epoch; the order does not matter.
        num_bytes: of the texts, in all or of each: what "bits_per_byte" divides by. The first
            token of a row or document is not predicted: its bytes count and its bits do not,
            unless documents begin with a special token.

    Returns:
        "nll" (nats a token), "perplexity", "accuracy", "tokens", and "bits_per_byte" if the bytes
        are given.

    Raises:
        ValueError: no token is predicted.
    """
    found = means(once(loss, model, train=False, chunk_size=chunk_size), variables, batches)
    nll = found["nll"]
    scores = {
        "nll": nll.value,
        "perplexity": perplexity(nll.total, nll.weight),
        "accuracy": found["accuracy"].value,
        "tokens": nll.weight,
    }
    if num_bytes is not None:
        scores["bits_per_byte"] = bits_per_byte(nll.total, float(np.sum(num_bytes)))
    return scores
