"""What an environment is: two pure functions; and many of them side by side, begun anew by
themselves.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.types import PyTree


class Step(NamedTuple):
    """What one step of one environment gives.

    Args:
        state: the environment's own, arrays only.
        observation: float32 [...].
        reward: float32 [].
        terminated: bool [], whether the world ended: no reward can follow.
        truncated: bool [], whether the episode was cut off in a world that goes on.
    """

    state: PyTree
    observation: Array
    reward: Array
    terminated: Array
    truncated: Array


class Environment(Protocol):
    """One environment with actions 0 .. num_actions - 1; jit, vmap and scan apply to it."""

    @property
    def num_actions(self) -> int:
        """A."""
        ...

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Of one observation."""
        ...

    def reset(self, rng: Array) -> tuple[PyTree, Array]:
        """(state, observation) at the beginning of an episode."""
        ...

    def step(self, state: PyTree, action: Array, rng: Array) -> Step:
        """One step of an episode that goes on."""
        ...


class VectorStep(NamedTuple):
    """What one step of B environments gives; where an episode ended, another has begun.

    Args:
        state: of all environments.
        observation: [B, ...], what to act on next: a new episode's first after an end.
        reward, terminated, truncated: [B], see `Step`.
        final_observation: [B, ...], what the action led to: differs from `observation` at ends.
    """

    state: PyTree
    observation: Array
    reward: Array
    terminated: Array
    truncated: Array
    final_observation: Array


class VectorEnvironment(Protocol):
    """B environments that begin anew by themselves: what agents learn in."""

    @property
    def num_environments(self) -> int:
        """B."""
        ...

    @property
    def num_actions(self) -> int:
        """A."""
        ...

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Of one observation."""
        ...

    def reset(self, rng: Array) -> tuple[PyTree, Array]:
        """(state, observations [B, ...]) at the beginning of B episodes."""
        ...

    def step(self, state: PyTree, actions: Array, rng: Array) -> VectorStep:
        """One step of each; actions are int32 [B]."""
        ...


@dataclasses.dataclass(frozen=True)
class Vectorised:
    """Copies of one environment; see `VectorEnvironment`.

    Args:
        environment: which one.
        num_environments: B.

    Raises:
        ValueError: there is not at least one.
    """

    environment: Environment
    num_environments: int

    def __post_init__(self) -> None:
        if self.num_environments < 1:
            raise ValueError(f"num_environments is {self.num_environments}; give at least 1")

    @property
    def num_actions(self) -> int:
        return self.environment.num_actions

    @property
    def observation_shape(self) -> tuple[int, ...]:
        return self.environment.observation_shape

    def reset(self, rng: Array) -> tuple[PyTree, Array]:
        return jax.vmap(self.environment.reset)(jax.random.split(rng, self.num_environments))

    def step(self, state: PyTree, actions: Array, rng: Array) -> VectorStep:
        return jax.vmap(self._step)(state, actions, jax.random.split(rng, self.num_environments))

    def _step(self, state: PyTree, action: Array, rng: Array) -> VectorStep:
        step_rng, reset_rng = jax.random.split(rng)
        after = self.environment.step(state, action, step_rng)
        fresh = self.environment.reset(reset_rng)
        ended = after.terminated | after.truncated
        state, observation = jax.tree.map(
            lambda new, old: jnp.where(ended, new, old), fresh, (after.state, after.observation)
        )
        return VectorStep(
            state, observation, after.reward, after.terminated, after.truncated, after.observation
        )


def check_environment(environment: Environment, *, steps: int = 64, seed: int = 0) -> None:
    """Refuses environments in which nothing can be learnt, by acting at random in them.

    Args:
        environment: runs compiled, `steps` steps of 16 copies.
        steps: how many.
        seed: of the actions.

    Raises:
        ValueError: every first step ends the episode; an observation or a reward is not finite or
            has another shape or dtype than it says; there are not at least two actions.
    """
    name = type(environment).__name__
    if environment.num_actions < 2:
        raise ValueError(
            f"{name} has num_actions={environment.num_actions}; a choice needs at least 2"
        )
    copies = Vectorised(environment, 16)
    rng, first = jax.random.split(jax.random.key(seed))

    def run(rng: Array) -> Any:
        state, observation = copies.reset(first)

        def one(state: PyTree, rng: Array) -> tuple[PyTree, VectorStep]:
            act, go = jax.random.split(rng)
            actions = jax.random.randint(act, (16,), 0, environment.num_actions)
            after = copies.step(state, actions, go)
            return after.state, after._replace(state=())

        return observation, jax.lax.scan(one, state, jax.random.split(rng, steps))[1]

    problems = []
    shapes, _ = jax.eval_shape(run, rng)
    if shapes.shape[1:] != environment.observation_shape or shapes.dtype != jnp.float32:
        raise ValueError(
            f"{name} observes {shapes.dtype}{list(shapes.shape[1:])}; it must be float32 of "
            f"observation_shape={environment.observation_shape}"
        )
    observation, after = jax.tree.map(np.asarray, jax.jit(run)(rng))
    if (after.terminated | after.truncated).all():
        problems.append(
            "every step ends its episode at once: no action has consequences; begin away from "
            "the states that end it"
        )
    if not (np.isfinite(observation).all() and np.isfinite(after.final_observation).all()):
        problems.append("observations are not finite; scale or clip them in the environment")
    if not np.isfinite(after.reward).all():
        problems.append("rewards are not finite; bound them in the environment")
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems))
