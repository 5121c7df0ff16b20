"""Advantages and returns of trajectories: what policy gradients weigh actions by.

Generalised advantage estimation: Schulman, Moritz, Levine, Jordan & Abbeel 2015, arXiv:1506.02438.
Steps of an environment and tokens of a text are the same here: an axis of time first, then one of
trajectories; a mask passes over what is neither (padding, a prompt, a tool's answer).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.types import Mean

ATTACHES = ("loss",)


def generalised_advantages(
    rewards: Array,
    values: Array,
    discounts: Array,
    decay: float | Array,
    *,
    continues: Array | None = None,
    final_values: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """GAE(gamma, lambda): the sum over k of (gamma lambda)^k times the k-th error that follows.

    The error of a step is ``reward + discount * next value - value`` (equations 9, 16). A decay of
    0 gives the error itself, of 1 the discounted return less the value (17, 18). What comes out is
    differentiable; where it is a target, stop the gradient.

    Args:
        rewards: [T, B].
        values: [T + 1, B]; the last row is of the states after the last step.
        discounts: [T, B]; gamma, and 0 where a step terminates: no state's value follows it.
        decay: lambda, from 0 to 1.
        continues: [T, B], 0 where the next row is of another trajectory, because this one was
            terminated or cut off. Without it only a discount of 0 separates trajectories.
        final_values: [T, B], values of the states in which trajectories were cut off; read where
            `continues` is 0, in the place of the next row's.
        mask: [T, B], 0 for steps that are passed over, as if they were not there: their advantage
            is 0, whatever else they hold, and the step before sees the one after.

    Returns:
        [T, B] in the dtype of the values.

    Raises:
        ValueError: shapes that do not fit, or trajectories that are cut off in states of unknown
            value.
    """
    problems = []
    if values.ndim != rewards.ndim or values.shape != (rewards.shape[0] + 1, *rewards.shape[1:]):
        problems.append(
            f"values have the shape {values.shape}; one row more than the rewards' "
            f"{rewards.shape} is needed: append the value after the last step"
        )
    arrays = {"discounts": discounts, "continues": continues, "mask": mask}
    arrays["final_values"] = final_values
    for name, array in arrays.items():
        if array is not None and array.shape != rewards.shape:
            problems.append(f"{name} have the shape {array.shape}, the rewards {rewards.shape}")
    if (continues is None) != (final_values is None):
        problems.append(
            "continues and final_values come together: a trajectory that is cut off needs the "
            "value of its last state; give both, or mark ends by discounts of 0 alone"
        )
    if problems:
        raise ValueError("; ".join(problems))
    nothing, everything = jnp.zeros_like(values[1:]), jnp.ones(rewards.shape, bool)
    rows = (
        rewards,
        values[:-1],
        discounts,
        everything if continues is None else continues != 0,
        nothing if final_values is None else final_values,
        everything if mask is None else mask != 0,
    )

    def back(carry: tuple[Array, Array], row: tuple[Array, ...]):
        following, next_value = carry
        reward, value, discount, goes_on, final_value, counts = row
        next_value_here = jnp.where(goes_on, next_value, final_value)
        # A terminated step may be followed by a value that means nothing, even nan.
        tail = jnp.where(goes_on, decay * following, 0.0)
        rest = jnp.where(discount == 0, 0.0, discount * (next_value_here + tail))
        advantage = (reward + rest - value).astype(values.dtype)
        carry = (jnp.where(counts, advantage, following), jnp.where(counts, value, next_value))
        return carry, jnp.where(counts, advantage, 0)

    start = (jnp.zeros_like(values[-1]), values[-1])
    _, advantages = jax.lax.scan(back, start, rows, reverse=True)
    return advantages


def discounted_returns(
    rewards: Array,
    discounts: Array,
    *,
    continues: Array | None = None,
    final_values: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """G of each step: its reward and all that follow it, discounted (Sutton & Barto 2018, 3.8).

    Args:
        rewards, discounts, continues, final_values, mask: as `generalised_advantages` takes them;
            after the last row comes nothing.

    Returns:
        [T, B].
    """
    dtype = jnp.result_type(rewards, discounts)
    values = jnp.zeros((rewards.shape[0] + 1, *rewards.shape[1:]), dtype)
    return generalised_advantages(
        rewards, values, discounts, 1.0,
        continues=continues, final_values=final_values, mask=mask,
    )  # fmt: skip


def standardised(advantages: Array, weights: Array) -> Array:
    """Advantages less their mean, by their standard deviation, over what is weighed; else 0.

    Args:
        advantages: any shape.
        weights: the same shape; 0 for padding.
    """
    mean = Mean.of(advantages, weights).value
    variance = Mean.of(jnp.square(advantages - mean), weights).value
    standard = (advantages - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(weights != 0, standard, 0.0)
