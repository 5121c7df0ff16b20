"""A pole on a cart, to be held up (Barto, Sutton & Anderson 1983, "Neuronlike adaptive elements
that can solve difficult learning control problems"), as gymnasium's CartPole-v1 has it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.environments.protocol import Step

GRAVITY = 9.8
POLE_MASS = 0.1
TOTAL_MASS = 1.0 + POLE_MASS
HALF_LENGTH = 0.5  # of the pole
FORCE = 10.0
SECONDS = 0.02  # between two states
POSITION_LIMIT = 2.4
ANGLE_LIMIT = 12 * 2 * math.pi / 360


class CartPoleState(NamedTuple):
    """position, velocity, angle and angular velocity, float32 [4]; steps done, int32 []."""

    motion: Array
    steps: Array


@dataclasses.dataclass(frozen=True)
class CartPole:
    """Actions push to the left (0) and to the right (1); every step is worth 1.

    Args:
        max_steps: after which an episode is cut off.
    """

    max_steps: int = 500

    num_actions = 2
    observation_shape = (4,)

    def reset(self, rng: Array) -> tuple[CartPoleState, Array]:
        """Nearly upright, nearly at rest."""
        motion = jax.random.uniform(rng, (4,), jnp.float32, -0.05, 0.05)
        return CartPoleState(motion, jnp.zeros((), jnp.int32)), motion

    def step(self, state: CartPoleState, action: Array, rng: Array) -> Step:
        """One step of Euler's method; nothing is random."""
        _, x_dot, theta, theta_dot = state.motion
        force = jnp.where(action == 1, FORCE, -FORCE)
        cos, sin = jnp.cos(theta), jnp.sin(theta)
        pole = POLE_MASS * HALF_LENGTH
        push = (force + pole * jnp.square(theta_dot) * sin) / TOTAL_MASS
        theta_acceleration = (GRAVITY * sin - cos * push) / (
            HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * jnp.square(cos) / TOTAL_MASS)
        )
        x_acceleration = push - pole * theta_acceleration * cos / TOTAL_MASS
        motion = state.motion + SECONDS * jnp.stack(
            [x_dot, x_acceleration, theta_dot, theta_acceleration]
        )
        steps = state.steps + 1
        terminated = (jnp.abs(motion[0]) > POSITION_LIMIT) | (jnp.abs(motion[2]) > ANGLE_LIMIT)
        return Step(
            CartPoleState(motion, steps),
            motion,
            jnp.ones((), jnp.float32),
            terminated,
            steps >= self.max_steps,
        )
