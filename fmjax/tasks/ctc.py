"""Transcription by connectionist temporal classification (Graves et al. 2006, "Connectionist
Temporal Classification"): a symbol or a blank at each frame, summed over all alignments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fmjax.generate.ctc import greedy
from fmjax.metrics.transcription import character_error_rate, word_error_rate
from fmjax.tasks.apply import apply_fn, collect_ragged, once, row_weights
from fmjax.types import Aux, Batch, LossFn, Mean, Output, Variables

LOG_ZERO = -1e5  # what stands for the logarithm of 0 in the sum over alignments


def pack(labels: Array, blank: int) -> tuple[Array, Array]:
    """The labels of each row moved to its start: (int [B, N], their number [B]).

    Args:
        labels: int [B, N]; what is negative or the blank is padding, wherever it stands.
        blank: the number of the blank.
    """
    real = (labels >= 0) & (labels != blank)
    order = jnp.argsort(~real, axis=1, stable=True)
    lengths = real.sum(axis=1)
    packed = jnp.take_along_axis(labels, order, axis=1)
    used = jnp.arange(labels.shape[1]) < lengths[:, None]
    return jnp.where(used, packed, blank), lengths


def frames_needed(packed: Array, lengths: Array) -> Array:
    """How many frames labels need at least: one each, and a blank between equal ones: int [B].

    Args:
        packed: int [B, N], from `pack`.
        lengths: int [B].
    """
    pairs = jnp.arange(1, packed.shape[1]) < lengths[:, None]
    repeats = (packed[:, 1:] == packed[:, :-1]) & pairs
    return lengths + repeats.sum(axis=1)


def losses(
    logits: Array,
    logit_lengths: Array,
    labels: Array,
    *,
    blank: int,
    zero_infinity: bool = False,
) -> tuple[Array, Array, Array]:
    """-log of the probability of each row's labels, over all alignments, in nats.

    Args:
        logits: float32 [B, T, V].
        logit_lengths: int [B], how many of the T frames are of each row.
        labels: int [B, N]; what is negative or the blank is padding.
        blank: the number of the blank.
        zero_infinity: whether rows whose labels need more frames than they have count 0, with no
            gradient; otherwise they are infinite.

    Returns:
        (float32 [B], the number of labels [B], whether they fit into the frames, bool [B]).
    """
    packed, lengths = pack(jnp.asarray(labels), blank)
    fits = frames_needed(packed, lengths) <= logit_lengths
    beyond = jnp.arange(logits.shape[1]) >= logit_lengths[:, None]
    unused = jnp.arange(packed.shape[1]) >= lengths[:, None]
    values = optax.ctc_loss(
        logits.astype(jnp.float32),
        beyond.astype(jnp.float32),
        packed,
        unused.astype(jnp.float32),
        blank_id=blank,
        log_epsilon=LOG_ZERO,
    )
    return jnp.where(fits, values, 0.0 if zero_infinity else jnp.inf), lengths, fits


def frames_and_logits(output: Output) -> tuple[Array, Array]:
    """(logits [B, T, V] float32, how many of the T frames are of each row [B])."""
    logits, lengths = output.logits, output.logit_lengths
    if logits is None or lengths is None:
        raise ValueError("CTC needs a model whose output has logits and logit_lengths: head='ctc'")
    return logits, lengths


def blank_of(model: Any) -> int:
    """The number of the blank: config.json's ``pad_token_id``.

    Raises:
        ValueError: the config has none, or none of the vocabulary.
    """
    blank, size = model.config.pad_token_id, model.config.vocab_size
    if blank is None or not 0 <= blank < size:
        raise ValueError(
            f"pad_token_id={blank} is the blank of CTC; it must be from 0 to {size - 1}"
        )
    return blank


def loss(
    model: Any,
    *,
    train: bool = True,
    reduction: str | None = None,
    zero_infinity: bool | None = None,
) -> LossFn:
    """The mean over examples of -log of their labels' probability (nats).

    A batch has ``labels`` int [B, N], padded by -100 or the blank, and ``weight`` [B]. An example
    whose labels need more frames than it has makes the loss infinite (`check_labels` says which,
    before anything is computed); the metric ``too_long`` is the share of such.

    Args:
        model: with the head ``ctc``: its output has ``logit_lengths``.
        train: whether dropout is on.
        reduction: "mean" divides each example's by the number of its labels, as PyTorch's mean
            does. "sum" does not; PyTorch's is then the sum over the batch, B times as large, which
            would make the step depend on the size of the batch. None is config.json's
            ``ctc_loss_reduction``.
        zero_infinity: see `losses`; None is config.json's ``ctc_zero_infinity``.

    Raises:
        ValueError: an unknown reduction, or a config without a blank.
    """
    reduction = model.config.ctc_loss_reduction if reduction is None else reduction
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} must be 'mean' or 'sum'")
    zero = model.config.ctc_zero_infinity if zero_infinity is None else zero_infinity
    blank, apply = blank_of(model), apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        output, updates = apply(variables, batch, rng, train=train)
        logits, lengths = frames_and_logits(output)
        values, count, fits = losses(
            logits, lengths, jnp.asarray(batch["labels"]), blank=blank, zero_infinity=zero
        )
        if reduction == "mean":
            values = values / jnp.maximum(count, 1)
        weights = row_weights(batch, len(logits))
        mean = Mean.of(values, weights)
        return mean.value, Aux(mean.weight, {"too_long": Mean.of(~fits, weights)}, updates)

    return loss_fn


def check_labels(
    frames: Sequence[int] | np.ndarray,
    labels: Sequence[Sequence[int] | np.ndarray],
    *,
    blank: int,
    names: Sequence[str] | None = None,
) -> None:
    """Refuses examples whose labels need more frames than they have: their loss is infinite.

    Args:
        frames: of each example, ``model.frames(samples)``.
        labels: of each; what is negative or the blank is padding.
        blank: the number of the blank.
        names: of the examples, for the error; None counts them from 0.

    Raises:
        ValueError: there are some; all are named.
    """
    problems = []
    for number, (count, row) in enumerate(zip(frames, labels, strict=True)):
        ids = np.asarray(row)
        ids = ids[(ids >= 0) & (ids != blank)]
        needed = len(ids) + int((ids[1:] == ids[:-1]).sum())
        if needed > count:
            name = f"example {number}" if names is None else names[number]
            problems.append(f"{name}: {len(ids)} labels need {needed} frames; it has {count}")
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"the CTC loss of these examples is infinite:\n  {shown}{more}\nLeave them out, check "
            "that sound and text belong together, or give zero_infinity=True, and they count 0"
        )


def predict(model: Any) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> float32 [B, T, V]``: log-probabilities (nats) at each frame.

    Frames behind an example's last are blank for certain, so that decoding needs no lengths.
    """
    apply, blank = apply_fn(model), blank_of(model)

    def predict_fn(variables: Variables, batch: Batch) -> Array:
        logits, lengths = frames_and_logits(apply(variables, batch, None, train=False)[0])
        beyond = jnp.arange(logits.shape[1]) >= lengths[:, None]
        nothing = jnp.where(jnp.arange(logits.shape[2]) == blank, 0.0, -jnp.inf)
        return jnp.where(beyond[..., None], nothing, jax.nn.log_softmax(logits, axis=-1))

    return predict_fn


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Transcripts of a whole set, in its order, and what they are worth.

    Args:
        predictions: a text for each example.
        references: the true ones.
        metrics: plain numbers, ready for JSON.
    """

    predictions: list[str]
    references: list[str]
    metrics: dict[str, float]


Decode = Callable[[np.ndarray], Sequence[int]]
"""Log-probabilities [T, V] -> symbols."""


def evaluate(
    model: Any,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    size: int,
    text: Callable[[Sequence[int]], str],
    decode: Decode | None = None,
) -> Evaluation:
    """Transcribes a whole set: ``wer`` and ``cer``, the shares of words and characters wrong.

    Args:
        model: with the head ``ctc``.
        variables: its variables.
        batches: one epoch with labels [B, N].
        size: N, how many examples there are.
        text: from the numbers of symbols to a text.
        decode: from log-probabilities [T, V] to symbols, such as a `fmjax.generate.ctc.prefix_beam`
            with its options; None takes the best one at each frame.
    """
    decode = partial(greedy, blank=blank_of(model)) if decode is None else decode
    return evaluate_ways(model, variables, batches, size=size, text=text, decodes=(decode,))[0]


def evaluate_ways(
    model: Any,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    size: int,
    text: Callable[[Sequence[int]], str],
    decodes: Sequence[Decode],
) -> list[Evaluation]:
    """As `evaluate`, of what the model hears once, decoded in several ways: one result of each.

    Args:
        model, variables, batches, size, text: see `evaluate`.
        decodes: the ways.
    """
    blank = blank_of(model)
    best = jax.jit(once(predict, model))

    def rows(variables: Variables, batch: Batch) -> list[tuple[str, ...]]:
        found, labels = np.asarray(best(variables, batch)), np.asarray(batch["labels"])
        return [
            (
                text([int(i) for i in row if i >= 0 and i != blank]),
                *(text(decode(scores)) for decode in decodes),
            )
            for scores, row in zip(found, labels, strict=True)
        ]

    found = collect_ragged(rows, variables, batches, size=size)
    references = [row[0] for row in found]
    results = []
    for way in range(len(decodes)):
        predictions = [row[way + 1] for row in found]
        metrics = {
            "wer": word_error_rate(references, predictions),
            "cer": character_error_rate(references, predictions),
        }
        results.append(Evaluation(predictions, references, metrics))
    return results
