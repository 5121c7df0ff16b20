"""Gymnasium's vector environments (Towers et al. 2024, arXiv:2407.17032) as ours, called from
compiled programs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import io_callback

from fmjax.environments.protocol import VectorStep


def gymnasium_library() -> ModuleType:
    """Gymnasium.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import gymnasium
        import gymnasium.vector
    except ImportError as error:
        raise ImportError(
            "these environments are gymnasium's, which is not installed: pip install 'fmjax[rl]'"
        ) from error
    return gymnasium


class GymnasiumVector:
    """A `VectorEnvironment` whose worlds live in Python: steps are ordered callbacks.

    Agents run on it unchanged. Its state here only counts the calls: a run on it cannot be resumed
    from a checkpoint in the middle of an episode; `reset` begins anew.

    Args:
        vector: a ``gymnasium.vector.VectorEnv`` that begins episodes anew in the same step.

    Raises:
        ValueError: actions that are not discrete, observations that are no arrays, or episodes
            begun anew otherwise.
    """

    def __init__(self, vector: Any) -> None:
        gymnasium = gymnasium_library()
        spaces, mode = gymnasium.spaces, vector.metadata.get("autoreset_mode")
        actions, observations = vector.single_action_space, vector.single_observation_space
        problems = []
        if not isinstance(actions, spaces.Discrete):
            problems.append(
                f"its actions are {actions}; only Discrete ones are supported: wrap it so that "
                "each choice is a number"
            )
        elif actions.n < 2:
            problems.append(f"its actions are {actions}; a choice needs at least 2")
        if not isinstance(observations, spaces.Box):
            problems.append(
                f"its observations are {observations}; only a Box is supported: wrap it in "
                "FlattenObservation"
            )
        if mode != gymnasium.vector.AutoresetMode.SAME_STEP:
            problems.append(
                f"its autoreset mode is {mode}; make it with vector_kwargs="
                "{'autoreset_mode': gymnasium.vector.AutoresetMode.SAME_STEP}"
            )
        if problems:
            raise ValueError(f"{vector}: " + "; ".join(problems))
        self.vector = vector
        self.num_environments = int(vector.num_envs)
        self.num_actions = int(actions.n)
        self.observation_shape = tuple(observations.shape)
        self._first = int(actions.start)

    @classmethod
    def make(cls, name: str, num_environments: int, **options: Any) -> GymnasiumVector:
        """Copies of a registered environment, stepped one after the other.

        Args:
            name: e.g. "CartPole-v1".
            num_environments: B.
            options: of the environment.
        """
        gymnasium = gymnasium_library()
        return cls(
            gymnasium.make_vec(
                name,
                num_environments,
                "sync",
                vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP},
                **options,
            )
        )

    def _observation(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.num_environments, *self.observation_shape), jnp.float32)

    def reset(self, rng: Array) -> tuple[Array, Array]:
        """B episodes, with a seed drawn from the key."""

        def call(seed: np.ndarray) -> tuple[Any, ...]:
            observation, _ = self.vector.reset(seed=int(seed))
            return np.int32(0), self._finite("observations", observation)

        seed = jax.random.randint(rng, (), 0, np.iinfo(np.int32).max)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        return io_callback(call, (count, self._observation()), seed, ordered=True)

    def step(self, state: Array, actions: Array, rng: Array) -> VectorStep:
        """One step of each; the key is not used: gymnasium draws its own numbers.

        Raises:
            ValueError: from the callback, in jax's own error: observations or rewards that are not
                finite.
        """
        flags = jax.ShapeDtypeStruct((self.num_environments,), jnp.bool_)

        def call(state: np.ndarray, actions: np.ndarray) -> tuple[Any, ...]:
            numbers = self._first + np.asarray(actions, np.int64)
            observation, reward, terminated, truncated, info = self.vector.step(numbers)
            final = np.array(observation, np.float32)
            for i in np.flatnonzero(terminated | truncated):
                final[i] = info["final_obs"][i]
            return (
                np.int32(state + 1),
                self._finite("observations", observation),
                self._finite("rewards", reward),
                np.asarray(terminated, bool),
                np.asarray(truncated, bool),
                self._finite("observations", final),
            )

        rewards = jax.ShapeDtypeStruct((self.num_environments,), jnp.float32)
        count, observations = jax.ShapeDtypeStruct((), jnp.int32), self._observation()
        shapes = (count, observations, rewards, flags, flags, observations)
        return VectorStep(*io_callback(call, shapes, state, actions, ordered=True))

    def _finite(self, what: str, values: Any) -> np.ndarray:
        values = np.array(values, np.float32)  # a copy: gymnasium reuses its buffers
        if not np.isfinite(values).all():
            raise ValueError(f"{self.vector}: {what} are not finite; scale or clip them")
        return values
