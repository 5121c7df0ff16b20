"""Worlds to act in, as pure functions: where reinforcement learning's data come from."""

from fmjax.environments.cart_pole import CartPole
from fmjax.environments.finite import FiniteEnvironment, FiniteMDP
from fmjax.environments.gymnasium_vector import GymnasiumVector
from fmjax.environments.maze import Maze
from fmjax.environments.mountain_car import MountainCar
from fmjax.environments.protocol import (
    Environment,
    Step,
    VectorEnvironment,
    Vectorised,
    VectorStep,
    check_environment,
)

__all__ = [
    "CartPole",
    "Environment",
    "FiniteEnvironment",
    "FiniteMDP",
    "GymnasiumVector",
    "Maze",
    "MountainCar",
    "Step",
    "VectorEnvironment",
    "VectorStep",
    "Vectorised",
    "check_environment",
]
