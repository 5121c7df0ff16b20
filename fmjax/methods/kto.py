"""KTO (Ethayarajh et al. 2024, arXiv:2402.01306): from responses that are each good or bad.

Unlike the losses of `fmjax.methods.preference` it needs no pairs: a response is worth what it gains
over a reference point, the divergence of the policy from its reference, by a value function that
saturates on both sides. The divergence is estimated on mismatched pairs, prompts with the responses
to others.

A batch of B responses has, for ``completion_`` and ``mismatched_`` each
(`fmjax.data.encode_completions`): ``input_ids``, ``attention_mask`` and ``labels`` [B, T], -100
outside the response (not shifted); ``desirable`` [B], 1 or 0; and perhaps ``weight`` [B], 0 for
padding rows. Of encoder-decoders it has the labels of both alone, beside the source, as in
`fmjax.methods.preference`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.methods.preference import (
    pair_rows,
    policy_of,
    reference_log_probs,
    sequence_log_probs,
)
from fmjax.tasks.apply import row_weights
from fmjax.tasks.vocabulary_loss import CHUNK_SIZE
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

ATTACHES = ("loss",)

KINDS = ("completion", "mismatched")


def kto_losses(
    log_ratio: Array,
    reference_point: Array,
    desirable: Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    """Losses [B] of responses: lambda - v(x, y), equations 7 and 8.

    Args:
        log_ratio: r [B], log(pi(y | x) / reference(y | x)), in nats.
        reference_point: z [], in nats.
        desirable: [B], 1 or 0.
        beta, desirable_weight, undesirable_weight: see `kto_loss`.
    """
    above = beta * (log_ratio - reference_point)
    # 1 - sigmoid(x) is sigmoid(-x): no cancellation where a response is worth a lot.
    good, bad = jax.nn.sigmoid(-above), jax.nn.sigmoid(above)
    return jnp.where(desirable != 0, desirable_weight * good, undesirable_weight * bad)


def kto_loss(
    model: Any,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    train: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> LossFn:
    """Kahneman-Tversky optimisation (equations 7 and 8), a mean over responses.

    ``desirable_weight * (1 - sigmoid(beta * (r - z)))`` of a good response and
    ``undesirable_weight * (1 - sigmoid(beta * (z - r)))`` of a bad one, where r is the log-ratio of
    policy and reference, and z = max(0, the batch's mean log-ratio of mismatched pairs), which has
    no gradient. Where the policy is its reference, the loss is half of the weights' mean. A piece
    of an accumulated batch has a z of its own.

    The reference's log-probabilities are the batch's ``ref_completion_logps`` and
    ``ref_mismatched_logps`` [B]; or they are computed with what
    `fmjax.methods.preference.reference_of` finds.

    Args:
        model: with the head ``causal_lm`` or ``seq2seq_lm``.
        beta: how fast the value of a nat falls, away from z; the larger, the nearer to the
            reference.
        desirable_weight, undesirable_weight: lambda_D and lambda_U there; chosen so that each times
            the number of such responses is about the same.
        train: whether dropout is on; z and the reference have none.
        chunk_size: see `sequence_log_probs`.

    Raises:
        ValueError: numbers out of range, or another head; when called, a batch without
            ``desirable``, no reference, or two.
    """
    numbers = {
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
    }
    if wrong := [f"{name}={value}" for name, value in numbers.items() if not value > 0]:
        raise ValueError(f"kto_loss: {', '.join(wrong)} must be positive")
    policy = sequence_log_probs(model, train=train, chunk_size=chunk_size)
    unmatched = sequence_log_probs(model, chunk_size=chunk_size)
    reference = reference_log_probs(model, chunk_size=chunk_size, kinds=KINDS)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        if "desirable" not in batch:
            raise ValueError(
                f"the batch has {sorted(batch)} and no 'desirable', 1 for a good response and 0 "
                "for a bad one; encode_completions makes it"
            )
        before = reference(variables, batch)
        rows = pair_rows(batch, kinds=KINDS)
        own = {name: leaf[0::2] for name, leaf in rows.items()}
        other = {name: leaf[1::2] for name, leaf in rows.items()}
        weights = row_weights(batch)
        desirable = jnp.asarray(batch["desirable"])

        ours = policy_of(variables)
        found = policy(ours, own, rng)
        log_ratio = found.log_probs - before["ref_completion_logps"]
        mismatched = unmatched(jax.lax.stop_gradient(ours), other, None).log_probs
        drift = Mean.of(mismatched - before["ref_mismatched_logps"], weights)
        reference_point = jnp.maximum(drift.value, 0.0)
        losses = kto_losses(
            log_ratio,
            reference_point,
            desirable,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
        )
        mean = Mean.of(losses, weights)
        rewards = jax.lax.stop_gradient(beta * log_ratio)
        good = desirable != 0
        metrics = {
            "rewards/desirable": Mean.of(rewards, jnp.where(good, weights, 0.0)),
            "rewards/undesirable": Mean.of(rewards, jnp.where(good, 0.0, weights)),
            "reference_point": Mean(reference_point * drift.weight, drift.weight),
        }
        return mean.value, Aux(mean.weight, metrics, found.updates)

    return loss_fn
