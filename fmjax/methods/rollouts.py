"""Acting in environments inside compiled programs: trajectories to learn from, and returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.environments import VectorEnvironment
from fmjax.methods.advantages import generalised_advantages
from fmjax.types import Mean, PyTree, TrainState

ATTACHES = ("program",)

Act = Callable[[Array, Array], Array]
"""(observations [B, ...], rng) -> actions int32 [B]."""


class Worlds(NamedTuple):
    """Where B environments stand.

    Args:
        state: the environment's.
        observation: [B, ...], what to act on next.
        returns: [B], rewards so far of the episodes that go on.
        lengths: int32 [B], their steps.
    """

    state: PyTree
    observation: Array
    returns: Array
    lengths: Array


class Trajectory(NamedTuple):
    """T steps of B environments.

    Args:
        observations: [T, B, ...].
        actions: int32 [T, B].
        rewards: float32 [T, B].
        terminated, truncated: bool [T, B].
        final_observations: [T, B, ...], what the actions led to: where an episode ended, its last
            observation and not the next row.
    """

    observations: Array
    actions: Array
    rewards: Array
    terminated: Array
    truncated: Array
    final_observations: Array

    @property
    def continues(self) -> Array:
        """bool [T, B], whether the next row is of the same episode."""
        return ~(self.terminated | self.truncated)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learner:
    """An agent that learns from what it has just done, as arrays; checkpoints take it as it is.

    Args:
        step: iterations done, int32 [].
        train: the state of the train step.
        worlds: where the environments stand.
        rng: the key; it never changes: iteration t uses ``fold_in(rng, t)``.
    """

    step: Array
    train: TrainState
    worlds: Worlds
    rng: Array


def begin(environment: VectorEnvironment, rng: Array) -> Worlds:
    """The first observations of B episodes."""
    state, observation = environment.reset(rng)
    zeros = jnp.zeros((environment.num_environments,))
    return Worlds(state, observation, zeros, zeros.astype(jnp.int32))


def learner(environment: VectorEnvironment, train: TrainState, rng: Array) -> Learner:
    """The agent before its first iteration."""
    first, later = jax.random.split(rng)
    worlds = begin(environment, first)
    # A copy: states are donated, and a state may be its own observation.
    return jax.tree.map(jnp.copy, Learner(jnp.zeros((), jnp.int32), train, worlds, later))


def advance(
    environment: VectorEnvironment, worlds: Worlds, actions: Array, rng: Array
) -> tuple[Worlds, Trajectory, dict[str, Mean]]:
    """One step: where the environments stand then, what happened, and the episodes that ended.

    Returns:
        (worlds, a trajectory without its axis of time, means over ended episodes:
        ``episode_return`` and ``episode_length``).
    """
    after = environment.step(worlds.state, actions, rng)
    returns, lengths = worlds.returns + after.reward, worlds.lengths + 1
    ended = after.terminated | after.truncated
    happened = Trajectory(
        worlds.observation, actions, after.reward, after.terminated, after.truncated,
        after.final_observation,
    )  # fmt: skip
    episodes = {
        "episode_return": Mean.of(returns, ended),
        "episode_length": Mean.of(lengths, ended),
    }
    worlds = Worlds(
        after.state, after.observation, jnp.where(ended, 0.0, returns), jnp.where(ended, 0, lengths)
    )
    return worlds, happened, episodes


def collect(
    environment: VectorEnvironment, act: Act, worlds: Worlds, rng: Array, steps: int
) -> tuple[Worlds, Trajectory, dict[str, Mean]]:
    """T steps; see `advance`."""

    def one(worlds: Worlds, rng: Array):
        choose, go = jax.random.split(rng)
        actions = act(worlds.observation, choose).astype(jnp.int32)
        worlds, happened, episodes = advance(environment, worlds, actions, go)
        return worlds, (happened, episodes)

    worlds, (trajectory, episodes) = jax.lax.scan(one, worlds, jax.random.split(rng, steps))
    return worlds, trajectory, summed(episodes)


def summed(means: dict[str, Mean]) -> dict[str, Mean]:
    """Means of each step of a scan, [T] each, as one."""
    return jax.tree.map(lambda x: x.sum(0), means)


def advantages_of(
    trajectory: Trajectory, values: Array, final_values: Array, discount: float, decay: float
) -> Array:
    """Generalised advantages; ends by termination have no value after them, cuts have.

    Args:
        trajectory: T steps of B environments.
        values, final_values: [T, B], of its observations and final observations.
        discount, decay: gamma and lambda.

    Returns:
        [T, B].
    """
    return generalised_advantages(
        trajectory.rewards,
        jnp.concatenate([values, final_values[-1:]]),
        discount * (1.0 - trajectory.terminated),
        decay,
        continues=trajectory.continues,
        final_values=final_values,
    )


def first_returns(environment: VectorEnvironment, act: Act, rng: Array, steps: int) -> Array:
    """The return of the first episode in each of B environments, [B]: what a policy is judged by.

    Args:
        environment: of B copies.
        act: the policy.
        rng: a key.
        steps: as many as the longest episode has; one that goes on is nan.
    """
    first, later = jax.random.split(rng)
    _, trajectory, _ = collect(environment, act, begin(environment, first), later, steps)
    ends = (~trajectory.continues).astype(jnp.int32)
    counts = jnp.cumsum(ends, axis=0) - ends == 0  # up to the first end, with it
    returns = jnp.sum(jnp.where(counts, trajectory.rewards, 0.0), axis=0)
    return jnp.where(ends.any(0), returns, jnp.nan)
