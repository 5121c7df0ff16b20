"""Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300, section 4.1).

Several responses to one prompt are compared with each other, so that no value function is needed.
Variants are choices in its formulas: Dr. GRPO (Liu et al. 2025, arXiv:2503.20783: ``scale="none",
average="constant"``), DAPO's token mean and higher upper clip (Yu et al. 2025, arXiv:2503.14476:
``average="token", clip_high=0.28, kl_weight=0``), and RLOO's baseline (Ahmadian et al. 2024,
arXiv:2402.14740: ``scale="none", leave_one_out=True``). The loop is in
`fmjax.methods.sampled_responses`.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.methods.policy_gradient import (
    bound_problems,
    clipped_losses,
    is_clipped,
    log_ratio,
    response_scores,
    reverse_kl,
    token_weights,
)
from fmjax.methods.sampled_responses import Prepare, Prepared, rollout_metrics
from fmjax.tasks.vocabulary_loss import CHUNK_SIZE
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

ATTACHES = ("loss", "program")

Scale = Literal["group", "none"]
Average = Literal["sequence", "token", "constant"]


def group_advantages(
    rewards: Array, group_size: int, *, scale: Scale = "group", leave_one_out: bool = False
) -> Array:
    """How much better each response is than the others to its prompt.

    (r - mean) / standard deviation over the group (section 4.1.2), the deviation with n - 1 and
    1e-4 added, so that equal rewards give 0.

    Args:
        rewards: [R], a prompt's G responses one after the other.
        group_size: G, at least 2.
        scale: "none" leaves the deviation out, which weighs prompts by their difficulty (Liu et al.
            2025, arXiv:2503.20783, equation 3).
        leave_one_out: the mean is that of the other responses: G / (G - 1) times as much.

    Returns:
        float32 [R].

    Raises:
        ValueError: a group of one, or rows that do not make whole groups.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(
            f"{len(rewards)} rewards in groups of {group_size}: a group is at least 2 responses to "
            "one prompt, and every prompt has a whole one"
        )
    groups = jnp.asarray(rewards, jnp.float32).reshape(-1, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    if leave_one_out:
        centred = centred * group_size / (group_size - 1)
    if scale == "group":
        centred = centred / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    return centred.reshape(-1)


def grpo_prepare(
    group_size: int, *, scale: Scale = "group", leave_one_out: bool = False
) -> Prepare:
    """Rewards into advantages (`group_advantages`), for `sampled_responses.make_update`."""
    if scale not in ("group", "none"):
        raise ValueError(f"scale={scale!r} is not one of 'group', 'none'")

    def prepare(variables: Variables, rollout: Batch, rewards: Array) -> Prepared:
        del variables  # nothing but the rewards is needed
        advantages = group_advantages(rewards, group_size, scale=scale, leave_one_out=leave_one_out)
        spread = rewards.reshape(-1, group_size).std(axis=1)
        metrics = {
            **rollout_metrics(rollout, rewards),
            "equal_groups": Mean.of(spread == 0, jnp.ones(len(spread))),
        }
        return Prepared({**rollout, "advantages": advantages}, {}, metrics)

    return prepare


def grpo_loss(
    model: Any,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    kl_weight: float = 0.04,
    average: Average = "sequence",
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> LossFn:
    """The clipped objective and `kl_weight` times the divergence from the reference (equation 3).

    A batch is one of `fmjax.methods.policy_gradient` with ``advantages`` [R].

    Args:
        model: as `response_scores` takes it.
        clip: how far a token's probability may fall, and rise, in one turn of the loop.
        clip_high: how far it may rise, if otherwise.
        kl_weight: beta; 0 needs no reference.
        average: "sequence", the mean over responses of their tokens' means; "token", the mean over
            all tokens; "constant", the sum over tokens by the most there may be, N, so that long
            wrong answers are not spared (Liu et al. 2025, arXiv:2503.20783, section 3.1).
        temperature: with which responses were drawn.
        chunk_size: see `response_scores`.

    Raises:
        ValueError: numbers out of range; when called, a batch without what is needed.
    """
    high = clip if clip_high is None else clip_high
    problems = bound_problems(clip, high)
    if not kl_weight >= 0:
        problems.append(f"kl_weight={kl_weight} must not be negative")
    if average not in ("sequence", "token", "constant"):
        problems.append(f"average={average!r} is not one of 'sequence', 'token', 'constant'")
    if problems:
        raise ValueError("grpo_loss: " + "; ".join(problems))
    score = response_scores(model, temperature=temperature, chunk_size=chunk_size)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        del rng  # no dropout
        if kl_weight and "reference_log_probs" not in batch:
            raise ValueError(
                f"kl_weight={kl_weight} needs reference_log_probs in the batch: roll out "
                "with_reference(variables), or adapters, or set kl_weight=0"
            )
        weights = token_weights(batch)
        found = score(variables, batch)
        change = log_ratio(found.log_probs, jnp.asarray(batch["log_probs"]), weights)
        advantages = jnp.asarray(batch["advantages"])[:, None]
        losses = clipped_losses(change, advantages, clip, high)
        metrics = {
            "clipped": Mean.of(is_clipped(change, advantages, clip, high), weights),
            "entropy": Mean.of(found.entropy, weights),
        }
        if "reference_log_probs" in batch:
            reference = jnp.where(weights > 0, batch["reference_log_probs"], found.log_probs)
            divergence = reverse_kl(found.log_probs, reference)
            metrics["kl"] = Mean.of(divergence, weights)
            if kl_weight:
                losses = losses + kl_weight * divergence
        mean = averaged(losses, weights, average)
        metrics = jax.lax.stop_gradient(metrics)
        return mean.value, Aux(mean.weight, metrics, {})

    return loss_fn


def averaged(losses: Array, weights: Array, average: Average) -> Mean:
    """The mean of losses [R, N] of tokens that `grpo_loss` names."""
    if average == "token":
        return Mean.of(losses, weights)
    sums = jnp.where(weights > 0, losses, 0.0).sum(axis=1)
    tokens = (weights > 0).sum(axis=1)
    divisor = jnp.maximum(tokens, 1) if average == "sequence" else weights.shape[1]
    return Mean.of(sums / divisor, weights.max(axis=1))
