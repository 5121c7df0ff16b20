"""Proximal policy optimisation of language models, near a reference (Ziegler et al. 2019,
arXiv:1909.08593, section 2; Stiennon et al. 2020, arXiv:2009.01325, section 3.4).

Each token is an action. Its reward is the response's, at the last token, less a penalty for going
away from the reference (equation 2 of the former); a value head on the policy's own last hidden
state is the critic. The loop is in `fmjax.methods.sampled_responses`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import save_file

import fmjax.hub as hub
from fmjax.methods.advantages import standardised
from fmjax.methods.policy_gradient import (
    Scores,
    bound_problems,
    clipped_losses,
    is_clipped,
    log_ratio,
    response_advantages,
    response_scores,
    token_weights,
)
from fmjax.methods.preference import policy_of, with_reference
from fmjax.methods.sampled_responses import Prepare, Prepared, rollout_metrics
from fmjax.tasks.apply import apply_fn
from fmjax.tasks.vocabulary_loss import CHUNK_SIZE
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

ATTACHES = ("variables", "loss", "program")

VALUE_HEAD = "value_head"
"""The collection of the critic: kernel [D, 1], bias [1]. It trains."""
CONTROL = "kl_control"
"""The collection of the penalty's coefficient, which `ppo_prepare` moves."""
VALUE_FILE = "value_head.safetensors"


def with_critic(model: Any, variables: Variables, *, kl_coefficient: float = 0.2) -> Variables:
    """The variables with a reference, a value head of zeros and the penalty's coefficient.

    Train them by ``init_state(..., is_trainable=trained_of(variables))``.

    Args:
        model: as `response_scores` takes it.
        variables: its own; with adapters and no reference, the model without them is the reference.
        kl_coefficient: what a nat away from the reference costs at the beginning.

    Raises:
        ValueError: a negative coefficient.
    """
    if not kl_coefficient >= 0:
        raise ValueError(f"kl_coefficient={kl_coefficient} must not be negative")
    apply = apply_fn(model, output_logits=False)
    one = hub.family_for(model).inputs(model.config, model.head)
    hidden = jax.eval_shape(lambda v: apply(v, one, None, train=False)[0], policy_of(variables))
    width = hidden.last_hidden_state.shape[-1]
    compared = variables if "adapters" in variables else with_reference(variables)
    return {
        **compared,
        VALUE_HEAD: {"kernel": jnp.zeros((width, 1)), "bias": jnp.zeros(1)},
        CONTROL: {"coefficient": jnp.float32(kl_coefficient)},
    }


def trained_of(variables: Variables) -> Callable[[str], bool]:
    """``path -> bool``, whether a leaf trains: the value head and the model, of a model with
    adapters these alone: without them it is the reference, and must stay."""
    own = "adapters" if "adapters" in variables else "params"
    return lambda path: path.startswith((f"{own}/", f"{VALUE_HEAD}/"))


def save(path: str | Path, model: Any, variables: Variables, tokenizer: Any = None) -> Path:
    """Writes the policy as a Hugging Face folder and the value head beside it, in a file of its
    own (``value_head.safetensors`` with ``kernel`` [D, 1] and ``bias`` [1]).

    Raises:
        OSError: the folder cannot be written.
        ValueError: variables that are not this model's.
    """
    own = {k: v for k, v in policy_of(variables).items() if k not in (VALUE_HEAD, CONTROL)}
    folder = hub.save(path, model, own, tokenizer)
    head = {name: np.asarray(leaf) for name, leaf in variables[VALUE_HEAD].items()}
    save_file(head, folder / VALUE_FILE)
    return folder


def values_of(variables: Variables, scores: Scores) -> Array:
    """float32 [R, N]: the return that the critic expects before each token.

    Raises:
        ValueError: there is no critic.
    """
    if VALUE_HEAD not in variables:
        raise ValueError(
            f"the variables have the collections {sorted(variables)} and no {VALUE_HEAD!r}; make "
            "them by with_critic(model, variables)"
        )
    head = variables[VALUE_HEAD]
    hidden = scores.hidden.astype(jnp.float32)
    return (hidden @ head["kernel"].astype(jnp.float32))[..., 0] + head["bias"]


def critic(variables: Variables, scores: Scores) -> dict[str, Array]:
    """What `fmjax.methods.sampled_responses.make_rollout` is to keep besides: ``values``."""
    return {"values": values_of(variables, scores)}


def adapted_coefficient(
    coefficient: Array | float, kl: Array | float, target: float, gain: float
) -> Array:
    """The penalty's next coefficient (Ziegler et al. 2019, section 2.2): times 1 + gain * e, where
    e is (kl - target) / target, clipped to [-0.2, 0.2].

    Args:
        coefficient: nats of reward a nat.
        kl: of the policy from the reference, nats a response.
        target: what it is to be.
        gain: how fast it moves.
    """
    error = jnp.clip((kl - target) / target, -0.2, 0.2)
    return coefficient * (1 + gain * error)


def ppo_prepare(
    *,
    target_kl: float | None = 6.0,
    gain: float = 0.1,
    discount: float = 1.0,
    trace: float = 0.95,
) -> Prepare:
    """Rewards into advantages and returns, for `fmjax.methods.sampled_responses.make_update`.

    Args:
        target_kl: nats a response that the coefficient is steered to; None leaves it as it is.
        gain: see `adapted_coefficient`.
        discount, trace: gamma and lambda, see `response_advantages`.

    Raises:
        ValueError: numbers out of range; when called, rollouts without a critic or a reference.
    """
    problems = [
        f"{name}={value} must be in [0, 1]"
        for name, value in (("discount", discount), ("trace", trace))
        if not 0 <= value <= 1
    ]
    if target_kl is not None and not target_kl > 0:
        problems.append(f"target_kl={target_kl} must be positive, or None")
    if not 0 <= gain < 5:
        problems.append(f"gain={gain} must be in [0, 5), so that the coefficient stays positive")
    if problems:
        raise ValueError("ppo_prepare: " + "; ".join(problems))

    def prepare(variables: Variables, rollout: Batch, rewards: Array) -> Prepared:
        if missing := [n for n in ("values", "reference_log_probs") if n not in rollout]:
            raise ValueError(
                f"the rollout has no {missing}; make it of with_critic(model, variables) by "
                "make_rollout(..., beside=critic)"
            )
        weights = token_weights(rollout)
        mask = jnp.asarray(rollout["response_mask"], jnp.float32)
        coefficient = variables[CONTROL]["coefficient"]
        away = log_ratio(
            jnp.asarray(rollout["log_probs"]), jnp.asarray(rollout["reference_log_probs"]), mask
        )
        last = mask - jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))  # 1 at the last token
        advantages, returns = response_advantages(
            rewards[:, None] * last - coefficient * away,
            jnp.asarray(rollout["values"]),
            mask,
            discount=discount,
            trace=trace,
        )
        kl = Mean.of(away.sum(axis=1), weights.max(axis=1))
        updates = {}
        if target_kl is not None:
            moved = adapted_coefficient(coefficient, kl.value, target_kl, gain)
            updates = {CONTROL: {"coefficient": moved}}
        batch = {**rollout, "advantages": standardised(advantages, weights), "returns": returns}
        metrics = {
            **rollout_metrics(rollout, rewards),
            "kl": kl,
            "kl_coefficient": Mean(coefficient, jnp.ones(())),
        }
        return Prepared(batch, updates, metrics)

    return prepare


def ppo_loss(
    model: Any,
    *,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_weight: float = 0.1,
    entropy_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> LossFn:
    """Clipped policy loss, clipped value loss and entropy, a mean over tokens (Schulman et al.
    2017, arXiv:1707.06347, equations 7 and 9).

    The value loss is half the larger of the squared errors of the value and of the value kept
    within `value_clip` of the one before the turn. A batch is one of
    `fmjax.methods.policy_gradient` with ``advantages``, ``returns`` and ``values`` [R, N].

    Args:
        model: as `response_scores` takes it; the variables are `with_critic`'s.
        clip: how far a token's probability may fall and rise in one turn of the loop.
        value_clip: how far a value may move in it.
        value_weight, entropy_weight: of these parts.
        temperature: with which responses were drawn.
        chunk_size: see `response_scores`.

    Raises:
        ValueError: numbers out of range.
    """
    problems = bound_problems(clip, clip)
    problems += [
        f"{name}={value} must not be negative"
        for name, value in (
            ("value_clip", value_clip),
            ("value_weight", value_weight),
            ("entropy_weight", entropy_weight),
        )
        if not value >= 0
    ]
    if problems:
        raise ValueError("ppo_loss: " + "; ".join(problems))
    score = response_scores(model, temperature=temperature, chunk_size=chunk_size)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        del rng  # no dropout
        weights = token_weights(batch)
        found = score(variables, batch)
        change = log_ratio(found.log_probs, jnp.asarray(batch["log_probs"]), weights)
        advantages, old = jnp.asarray(batch["advantages"]), jnp.asarray(batch["values"])
        values = values_of(variables, found)
        near = old + jnp.clip(values - old, -value_clip, value_clip)
        errors = [jnp.square(x - jnp.asarray(batch["returns"])) for x in (values, near)]
        parts = {
            "policy_loss": clipped_losses(change, advantages, clip, clip),
            "value_loss": 0.5 * jnp.maximum(*errors),
            "entropy": found.entropy,
            "clipped": is_clipped(change, advantages, clip, clip),
        }
        means = {name: Mean.of(part, weights) for name, part in parts.items()}
        loss = (
            means["policy_loss"].value
            + value_weight * means["value_loss"].value
            - entropy_weight * means["entropy"].value
        )
        return loss, Aux(jnp.sum(weights), jax.lax.stop_gradient(means), {})

    return loss_fn
