"""Sequence to sequence: targets from sources, by teacher forcing; translation, summarisation,
captions of pictures, and the denoising of T5 and BART, which differ in their data alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from fmjax.metrics.language_modelling import perplexity
from fmjax.metrics.translation import References, translation_metrics
from fmjax.tasks.apply import apply_fn, means, once
from fmjax.tasks.causal_lm import Scored
from fmjax.tasks.masking import weigh
from fmjax.tasks.vocabulary_loss import (
    CHUNK_SIZE,
    IGNORED,
    log_likelihood,
    unembed_fn,
    vocabulary_loss,
)
from fmjax.types import Aux, Batch, LossFn, Variables


def shift_right(labels: Array, *, decoder_start_token_id: int | None, pad_token_id: int) -> Array:
    """What a decoder reads while it is taught labels [B, T]: each one position later.

    Args:
        labels: int [B, T], -100 where there is nothing, at the end of a row.
        decoder_start_token_id: what comes first; None is mBART's way: the last token of the row
            (its language) comes first.
        pad_token_id: what stands where there is no label.
    """
    labels = jnp.asarray(labels)
    filled = jnp.where(labels == IGNORED, pad_token_id, labels)
    if decoder_start_token_id is None:
        last = jnp.maximum((labels != IGNORED).sum(axis=1) - 1, 0)
        first = jnp.take_along_axis(filled, last[:, None], axis=1)  # [B, 1]
    else:
        first = jnp.full_like(filled[:, :1], decoder_start_token_id)
    return jnp.concatenate([first, filled[:, :-1]], axis=1)


def teach(model: Any, batch: Batch) -> Batch:
    """A batch with ``decoder_input_ids``: its own, or its labels shifted by the model's config.

    Raises:
        ValueError: the batch has neither, or the config has no padding token.
    """
    if "decoder_input_ids" in batch:
        return batch
    if "labels" not in batch:
        raise ValueError("the batch has neither labels nor decoder_input_ids, int [B, T]")
    config = model.config
    if config.pad_token_id is None:
        raise ValueError(
            "config.json has no pad_token_id; set one, or give decoder_input_ids in the batch"
        )
    shifted = shift_right(
        jnp.asarray(batch["labels"]),
        decoder_start_token_id=config.decoder_start_token_id,
        pad_token_id=config.pad_token_id,
    )
    return {**batch, "decoder_input_ids": shifted}


def loss(
    model: Any,
    *,
    train: bool = True,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int = CHUNK_SIZE,
) -> LossFn:
    """Cross-entropy (nats) of the targets' tokens, a mean over them; never [B, T, V] at once.

    A batch has ``input_ids`` and ``attention_mask`` [B, S], or ``pixel_values`` or whatever else
    the encoder reads, or its states ``encoder_outputs``; ``labels`` int [B, T] (-100 is not
    predicted); ``weight`` [B]; and ``decoder_input_ids`` [B, T], if they are not the labels
    shifted right behind the config's ``decoder_start_token_id`` (without one, as in mBART, behind
    the row's own last token). Vaswani et al. 2017, arXiv:1706.03762, take a label smoothing of
    0.1.

    Args:
        model: with the head ``seq2seq_lm``.
        train: whether dropout is on.
        label_smoothing, z_loss, chunk_size: see `vocabulary_loss`.
    """
    apply = apply_fn(model, output_logits=False)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        output, updates = apply(variables, teach(model, batch), rng, train=train)
        labels = jnp.asarray(batch["labels"])
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
        metrics = {"nll": found.nll, "accuracy": found.accuracy}
        return found.loss.value, Aux(found.loss.weight, metrics, updates)

    return loss_fn


def token_log_probs(
    model: Any, *, train: bool = False, chunk_size: int = CHUNK_SIZE
) -> Callable[[Variables, Batch, Array | None], Scored]:
    """``(variables, batch, rng) -> Scored``: each label by itself, at its own position,
    differentiable.

    Args:
        model, train, chunk_size: see `loss`, as is what a batch has.
    """
    apply = apply_fn(model, output_logits=False)

    def score(variables: Variables, batch: Batch, rng: Array | None) -> Scored:
        output, updates = apply(variables, teach(model, batch), rng, train=train)
        labels = jnp.asarray(batch["labels"])
        mask = labels != IGNORED
        assert output.last_hidden_state is not None
        unembed = unembed_fn(model, variables)
        scores = log_likelihood(
            unembed, output.last_hidden_state, jnp.where(mask, labels, 0), chunk_size=chunk_size
        )
        return Scored(jnp.where(mask, scores, 0.0), mask, updates)

    return score


def predict(model: Any, *, chunk_size: int = CHUNK_SIZE) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, T]``: log-probability (nats) of each label given the source and
    the labels before it, 0 where there is none. Texts are made by `fmjax.generate`.
    """
    score = token_log_probs(model, chunk_size=chunk_size)
    return lambda variables, batch: score(variables, batch, None).log_probs


def evaluate(
    model: Any,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    generated: Sequence[str] | None = None,
    references: References = (),
    measure: Callable[[Sequence[str], References], dict[str, Any]] = translation_metrics,
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, Any]:
    """How well the targets are predicted, and what generated texts are worth.

    Args:
        model, chunk_size: see `loss`.
        variables: the model's.
        batches: one epoch with labels; the order does not matter.
        generated: N texts that the model has generated; None measures none.
        references: what they should have been.
        measure: `translation_metrics` or `summarisation_metrics`.

    Returns:
        "nll" (nats a token), "perplexity", "accuracy" (of the next token, the right ones given),
        "tokens", and what `measure` returns.
    """
    scores = scores_of(once(loss, model, train=False, chunk_size=chunk_size), variables, batches)
    return scores if generated is None else scores | measure(generated, references)


def scores_of(loss_fn: LossFn, variables: Variables, batches: Iterable[Batch]) -> dict[str, Any]:
    """The first four of `evaluate`, of a loss that is made already, such as one of pixels as bytes.

    Args:
        loss_fn: a `loss` with ``train=False``; the same function is compiled once.
        variables: the model's.
        batches: one epoch with labels.
    """
    found = means(loss_fn, variables, batches)
    nll = found["nll"]
    return {
        "nll": nll.value,
        "perplexity": perplexity(nll.total, nll.weight),
        "accuracy": found["accuracy"].value,
        "tokens": nll.weight,
    }
