"""Finite Markov decision processes, as arrays and as environments (Sutton & Barto 2018, 3)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.environments.protocol import Step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FiniteMDP:
    """States 0 .. S - 1 and actions 0 .. A - 1, the same in each state.

    Args:
        transitions: float [S, A, S], the probabilities of the next state; or int [S, A], the next
            state itself, where nothing is random.
        rewards: float32 [S, A], expected.
        terminal: bool [S]; nothing follows these, whatever their rows say.
    """

    transitions: Array
    rewards: Array
    terminal: Array

    @property
    def deterministic(self) -> bool:
        """Whether transitions are the next states themselves."""
        return self.transitions.ndim == 2

    def expected(self, values: Array) -> Array:
        """The mean value [S, A] of the next state, of values [S]; terminal ones count as 0."""
        values = jnp.where(self.terminal, 0.0, values)
        if self.deterministic:
            return values[self.transitions]
        return jnp.einsum("sat,t->sa", self.transitions, values, precision="highest")


def check_mdp(mdp: FiniteMDP) -> None:
    """Refuses arrays that are no Markov decision process; on the host, before anything compiles.

    Raises:
        ValueError: everything that is wrong with it.
    """
    transitions, rewards, terminal = map(np.asarray, (mdp.transitions, mdp.rewards, mdp.terminal))
    problems = []
    if rewards.ndim != 2 or 0 in rewards.shape:
        raise ValueError(f"rewards have the shape {rewards.shape}; they must be [S, A]")
    size, actions = rewards.shape
    if not np.isfinite(rewards).all():
        problems.append("rewards are not finite; use a large finite cost")
    if terminal.shape != (size,) or terminal.dtype != bool:
        problems.append(f"terminal is {terminal.dtype}{list(terminal.shape)}; it must be bool [S]")
    elif terminal.all():
        problems.append("all states are terminal: every episode ends at once")
    if transitions.shape == (size, actions) and transitions.dtype.kind in "iu":
        if ((transitions < 0) | (transitions >= size)).any():
            problems.append(f"next states must be from 0 to {size - 1}")
    elif transitions.shape == (size, actions, size) and transitions.dtype.kind == "f":
        sums = transitions.sum(-1)
        # NaN fails both comparisons.
        if not ((transitions >= 0).all() and np.allclose(sums, 1.0, atol=1e-5)):
            problems.append(
                f"transitions must be probabilities; those of a state and an action sum to "
                f"{sums.min():g} .. {sums.max():g}"
            )
    else:
        problems.append(
            f"transitions are {transitions.dtype}{list(transitions.shape)}; with rewards "
            f"{list(rewards.shape)} they must be float [S, A, S] or int [S, A]"
        )
    if problems:
        raise ValueError("no finite Markov decision process: " + "; ".join(problems))


class Place(NamedTuple):
    """The state's number and the steps done, int32 []."""

    number: Array
    steps: Array


@dataclasses.dataclass(frozen=True, eq=False)
class FiniteEnvironment:
    """Episodes of a finite process; a state is observed as a row of zeros with a one.

    Args:
        mdp: the process.
        starts: float [S], probabilities of the first state.
        max_steps: after which an episode is cut off.

    Raises:
        ValueError: it is no process, or episodes begin in no state or in a terminal one.
    """

    mdp: FiniteMDP
    starts: Array
    max_steps: int

    def __post_init__(self) -> None:
        check_mdp(self.mdp)
        starts, terminal = np.asarray(self.starts), np.asarray(self.mdp.terminal)
        problems = []
        if starts.shape != terminal.shape or not np.isclose(starts.sum(), 1.0, atol=1e-5):
            problems.append(
                f"starts {list(starts.shape)} sum to {starts.sum():g}; they must be {terminal.size}"
                " probabilities"
            )
        elif (starts[terminal] > 0).any():
            problems.append(
                f"episodes begin in the terminal states {np.flatnonzero(terminal & (starts > 0))} "
                "and end at once; begin elsewhere"
            )
        if self.max_steps < 1:
            problems.append(f"max_steps={self.max_steps} must be at least 1")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def num_actions(self) -> int:
        return self.mdp.rewards.shape[1]

    @property
    def observation_shape(self) -> tuple[int, ...]:
        return (self.mdp.rewards.shape[0],)

    def reset(self, rng: Array) -> tuple[Place, Array]:
        """A state drawn from `starts`."""
        number = jax.random.categorical(rng, jnp.log(self.starts)).astype(jnp.int32)
        return Place(number, jnp.zeros((), jnp.int32)), self._observed(number)

    def step(self, state: Place, action: Array, rng: Array) -> Step:
        """One transition; its reward is the expected one."""
        mdp = self.mdp
        row = mdp.transitions[state.number, action]
        number = row if mdp.deterministic else jax.random.categorical(rng, jnp.log(row))
        number = number.astype(jnp.int32)
        steps = state.steps + 1
        return Step(
            Place(number, steps),
            self._observed(number),
            mdp.rewards[state.number, action].astype(jnp.float32),
            mdp.terminal[number],
            steps >= self.max_steps,
        )

    def _observed(self, number: Array) -> Array:
        return jax.nn.one_hot(number, self.mdp.rewards.shape[0], dtype=jnp.float32)
