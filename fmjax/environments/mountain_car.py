"""A car too weak for the hill before it (Moore 1990, "Efficient memory-based learning for robot
control"), as gymnasium's MountainCar-v0 has it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.environments.protocol import Step

LEFT_END, RIGHT_END, GOAL = -1.2, 0.6, 0.5
MAX_SPEED = 0.07
FORCE = 0.001
GRAVITY = 0.0025


class MountainCarState(NamedTuple):
    """position and velocity, float32 [2]; steps done, int32 []."""

    motion: Array
    steps: Array


@dataclasses.dataclass(frozen=True)
class MountainCar:
    """Actions push to the left (0), not at all (1) and to the right (2); every step costs 1.

    Args:
        max_steps: after which an episode is cut off.
    """

    max_steps: int = 200

    num_actions = 3
    observation_shape = (2,)

    def reset(self, rng: Array) -> tuple[MountainCarState, Array]:
        """At rest near the bottom of the valley."""
        motion = jnp.stack([jax.random.uniform(rng, (), jnp.float32, -0.6, -0.4), jnp.float32(0)])
        return MountainCarState(motion, jnp.zeros((), jnp.int32)), motion

    def step(self, state: MountainCarState, action: Array, rng: Array) -> Step:
        """One step; the left end is a wall; nothing is random."""
        position, velocity = state.motion
        velocity += (action - 1) * FORCE - GRAVITY * jnp.cos(3 * position)
        velocity = jnp.clip(velocity, -MAX_SPEED, MAX_SPEED)
        position = jnp.clip(position + velocity, LEFT_END, RIGHT_END)
        velocity = jnp.where((position == jnp.float32(LEFT_END)) & (velocity < 0), 0.0, velocity)
        motion = jnp.stack([position, velocity])
        steps = state.steps + 1
        return Step(
            MountainCarState(motion, steps),
            motion,
            -jnp.ones((), jnp.float32),
            (position >= GOAL) & (velocity >= 0),
            steps >= self.max_steps,
        )
