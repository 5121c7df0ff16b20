"""Transcription by an attention decoder that shares its encoder with CTC (Watanabe et al. 2017,
"Hybrid CTC/attention architecture for end-to-end speech recognition", eq. 18): the sum over
alignments keeps the encoder's states in the order of the sound. Texts are found by both scores:
`fmjax.generate.joint`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fmjax.generate.joint import joint_beam
from fmjax.metrics.transcription import character_error_rate, word_error_rate
from fmjax.tasks import ctc, seq2seq
from fmjax.tasks.apply import TARGETS, apply_fn, collect_ragged, row_weights
from fmjax.tasks.masking import weigh
from fmjax.types import Aux, Batch, LossFn, Mean, Variables


def loss(model: Any, *, ctc_weight: float = 0.3, train: bool = True) -> LossFn:
    """``ctc_weight`` times CTC's loss and the rest times the decoder's, per label, in nats.

    A batch has the model's inputs, ``labels`` int [B, N] that end with the config's
    ``eos_token_id``, -100 behind it, and ``weight`` [B]; what the decoder reads is made of them
    (`fmjax.tasks.seq2seq.teach`). The symbol of the end is the decoder's alone. An example whose
    labels need more frames than it has counts 0 in CTC's part.

    Args:
        model: with a head whose output has ``ctc_logits`` beside ``logits``: "seq2seq_ctc".
        ctc_weight: lambda, from 0 to 1.
        train: whether dropout is on.

    Raises:
        ValueError: a weight out of range, or a config without a blank.
    """
    if not 0 <= ctc_weight <= 1:
        raise ValueError(f"ctc_weight={ctc_weight} must be from 0 to 1")
    blank, apply = ctc.blank_of(model), apply_fn(model)
    end = model.config.eos_token_id

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        output, updates = apply(variables, seq2seq.teach(model, batch), rng, train=train)
        if output.logits is None or output.ctc_logits is None or output.logit_lengths is None:
            raise ValueError("the model's output has no ctc_logits; its head must be 'seq2seq_ctc'")
        labels = jnp.asarray(batch["labels"])
        spoken = labels if end is None else jnp.where(labels == end, -100, labels)
        values, _, _ = ctc.losses(
            output.ctc_logits, output.logit_lengths, spoken, blank=blank, zero_infinity=True
        )
        weights = weigh(batch, labels)  # [B, N]
        costs = optax.softmax_cross_entropy_with_integer_labels(
            output.logits.astype(jnp.float32), jnp.maximum(labels, 0)
        )
        by_text = Mean.of(costs, weights)
        by_sound = Mean(Mean.of(values, row_weights(batch, len(labels))).total, by_text.weight)
        total = ctc_weight * by_sound.value + (1 - ctc_weight) * by_text.value
        metrics = {"ctc": by_sound, "attention": by_text}
        return total, Aux(by_text.weight, metrics, updates)

    return loss_fn


def evaluate(
    model: Any,
    variables: Variables,
    batches: Iterable[Batch],
    *,
    size: int,
    text: Callable[[Sequence[int]], str],
    **search: Any,
) -> ctc.Evaluation:
    """Transcribes a whole set by both scores: ``wer`` and ``cer``, the shares of words and
    characters wrong.

    Args:
        model: with the head "seq2seq_ctc".
        variables: its variables.
        batches: one epoch with labels [B, N].
        size: N, how many examples there are.
        text: from the numbers of symbols, without the end, to a text.
        search: options of `fmjax.generate.joint.joint_beam`.
    """
    end = model.config.eos_token_id

    def rows(variables: Variables, batch: Batch) -> list[tuple[str, str]]:
        inputs = {name: np.asarray(x) for name, x in batch.items() if name not in TARGETS}
        labels = np.asarray(batch["labels"])
        return [
            (text(found[0].tokens), text([int(i) for i in row if i >= 0 and i != end]))
            for found, row in zip(
                joint_beam(model, variables, inputs, **search), labels, strict=True
            )
        ]

    pairs = collect_ragged(rows, variables, batches, size=size)
    predictions, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    metrics = {
        "wer": word_error_rate(references, predictions),
        "cer": character_error_rate(references, predictions),
    }
    return ctc.Evaluation(predictions, references, metrics)
