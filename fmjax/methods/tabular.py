"""Tabular reinforcement learning: dynamic programming and temporal differences on finite processes.

Sutton & Barto 2018, "Reinforcement Learning": policy evaluation 4.1, value iteration 4.4, SARSA
6.4, Q-learning 6.5 (Watkins 1989; Watkins & Dayan 1992). All of it runs in compiled loops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fmjax.environments import FiniteEnvironment, FiniteMDP
from fmjax.environments.finite import Place, check_mdp

ATTACHES = ("program",)

Explore = Callable[[Array, Array, Array], Array]
"""(values [A], step, rng) -> an action: see `exploring`."""


class Solution(NamedTuple):
    """What iterating to a fixed point gives.

    Args:
        values: float32 [S].
        q_values: float32 [S, A], of one look ahead from the values.
        sweeps: how many there were, int32 [].
        change: the largest in the last sweep; above the tolerance where `max_sweeps` ended it.
    """

    values: Array
    q_values: Array
    sweeps: Array
    change: Array


def look_ahead(mdp: FiniteMDP, values: Array, discount: float) -> Array:
    """Q [S, A] of values [S]: the reward and the discounted value of what follows (4.6)."""
    q_values = mdp.rewards + discount * mdp.expected(values)
    return jnp.where(mdp.terminal[:, None], 0.0, q_values)


def value_iteration(
    mdp: FiniteMDP, discount: float, *, tolerance: float = 1e-6, max_sweeps: int = 10_000
) -> Solution:
    """The optimal values, by Bellman's optimality equation as an update (4.10).

    Args:
        mdp: the process.
        discount: gamma.
        tolerance: the largest change of a value in a sweep at which it stops.
        max_sweeps: after which it stops anyway; with a discount of 1 there may be no fixed point.

    Raises:
        ValueError: `mdp` is no process, or the discount is not from 0 to 1.
    """
    _check(mdp, discount)
    return _iterated(mdp, jnp.float32(discount), tolerance, max_sweeps, None)


def policy_evaluation(
    mdp: FiniteMDP,
    policy: Array,
    discount: float,
    *,
    tolerance: float = 1e-6,
    max_sweeps: int = 10_000,
) -> Solution:
    """The values of a policy, by Bellman's equation as an update (4.5).

    Args:
        mdp: the process.
        policy: float [S, A], probabilities of the actions.
        discount, tolerance, max_sweeps: as `value_iteration` takes them.

    Raises:
        ValueError: as `value_iteration`, or the policy is none.
    """
    _check(mdp, discount)
    policy = jnp.asarray(policy, jnp.float32)
    rows = np.asarray(policy)
    if rows.shape != mdp.rewards.shape or not np.allclose(rows.sum(-1), 1.0, atol=1e-5):
        raise ValueError(
            f"the policy [{rows.shape}] must be probabilities {list(mdp.rewards.shape)}, whose "
            "rows sum to 1"
        )
    return _iterated(mdp, jnp.float32(discount), tolerance, max_sweeps, policy)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _iterated(
    mdp: FiniteMDP, discount: Array, tolerance: float, max_sweeps: int, policy: Array | None
) -> Solution:
    def sweep(solution: Solution) -> Solution:
        q_values = look_ahead(mdp, solution.values, discount)  # pyright: ignore[reportArgumentType]
        values = q_values.max(-1) if policy is None else jnp.sum(policy * q_values, -1)
        change = jnp.abs(values - solution.values).max()
        return Solution(values, q_values, solution.sweeps + 1, change)

    def goes_on(solution: Solution) -> Array:
        return (solution.change > tolerance) & (solution.sweeps < max_sweeps)

    zeros = jnp.zeros(mdp.rewards.shape, jnp.float32)
    start = Solution(zeros[:, 0], zeros, jnp.int32(0), jnp.float32(jnp.inf))
    return jax.lax.while_loop(goes_on, sweep, start)


def _check(mdp: FiniteMDP, discount: float) -> None:
    check_mdp(mdp)
    if not 0 <= discount <= 1:
        raise ValueError(f"discount={discount} must be from 0 to 1")


def greedy_policy(q_values: Array) -> Array:
    """Probabilities [S, A] of a best action of each state; the first of several."""
    return jax.nn.one_hot(jnp.argmax(q_values, -1), q_values.shape[-1])


def exploring(
    choose: Callable[[Array, Array | float, Array], Array], amount: optax.Schedule
) -> Explore:
    """A way to explore whose amount follows a schedule.

    Args:
        choose: `fmjax.methods.policies.epsilon_greedy` or `boltzmann`.
        amount: step -> epsilon or temperature, as Optax's schedules are.
    """
    return lambda values, step, rng: choose(values, jnp.asarray(amount(step)), rng)


class Learnt(NamedTuple):
    """What acting and learning gave, as arrays: pass it on to continue.

    Args:
        q_values: float32 [S, A].
        visits: int32 [S, A].
        place: the environment's state.
        action: what is done next, int32 [].
        step: steps done, int32 [].
        rng: the key; it never changes: step t uses ``fold_in(rng, t)``.
    """

    q_values: Array
    visits: Array
    place: Place
    action: Array
    step: Array
    rng: Array


class Trace(NamedTuple):
    """Every step's reward, float32 [T], and whether it ended an episode, bool [T]."""

    rewards: Array
    ended: Array


def begin(
    environment: FiniteEnvironment, explore: Explore, rng: Array, initial: float = 0.0
) -> Learnt:
    """Nothing learnt yet; an `initial` value above all true ones makes learning try everything."""
    first, later = jax.random.split(rng)
    start, choice = jax.random.split(first)
    place, _ = environment.reset(start)
    shape = environment.mdp.rewards.shape
    q_values = jnp.where(environment.mdp.terminal[:, None], 0.0, jnp.full(shape, initial))
    visits, step = jnp.zeros(shape, jnp.int32), jnp.zeros((), jnp.int32)
    action = explore(q_values[place.number], step, choice).astype(jnp.int32)
    return Learnt(q_values, visits, place, action, step, later)


def q_learning(
    environment: FiniteEnvironment,
    learnt: Learnt,
    steps: int,
    *,
    discount: float,
    explore: Explore,
    learning_rate: optax.Schedule,
) -> tuple[Learnt, Trace]:
    """Learns the optimal action values, whatever it explores (6.8).

    An episode that is cut off is followed by its value, one that terminates by none.

    Args:
        environment: which process.
        learnt: from `begin`, or of an earlier call.
        steps: T.
        discount: gamma.
        explore: see `exploring`.
        learning_rate: visits of the state and action so far -> the share of the error that is
            learnt; ``lambda n: 1 / (n + 1) ** 0.7`` satisfies Watkins & Dayan's conditions.
    """
    return _control(environment, learnt, steps, discount, explore, learning_rate, False)


def sarsa(
    environment: FiniteEnvironment,
    learnt: Learnt,
    steps: int,
    *,
    discount: float,
    explore: Explore,
    learning_rate: optax.Schedule,
) -> tuple[Learnt, Trace]:
    """Learns the values of the policy that it follows (6.7); arguments as of `q_learning`."""
    return _control(environment, learnt, steps, discount, explore, learning_rate, True)


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4, 5, 6))
def _control(
    environment: FiniteEnvironment,
    learnt: Learnt,
    steps: int,
    discount: float,
    explore: Explore,
    learning_rate: optax.Schedule,
    on_policy: bool,
) -> tuple[Learnt, Trace]:
    def one(learnt: Learnt, _: None) -> tuple[Learnt, Trace]:
        rngs = jax.random.split(jax.random.fold_in(learnt.rng, learnt.step), 4)
        here, action, step = learnt.place.number, learnt.action, learnt.step + 1
        after = environment.step(learnt.place, action, rngs[0])
        ended = after.terminated | after.truncated
        there = learnt.q_values[after.state.number]
        next_action = explore(there, step, rngs[1]).astype(jnp.int32)
        following = there[next_action] if on_policy else there.max()
        target = after.reward + jnp.where(after.terminated, 0.0, discount * following)
        rate = learning_rate(learnt.visits[here, action])
        q_values = learnt.q_values.at[here, action].add(
            rate * (target - learnt.q_values[here, action])
        )
        place = jax.tree.map(
            lambda new, old: jnp.where(ended, new, old), environment.reset(rngs[2])[0], after.state
        )
        # SARSA does what it has learnt from, unless the episode is over.
        chosen = explore(q_values[place.number], step, rngs[3]).astype(jnp.int32)
        action_then = jnp.where(ended, chosen, next_action) if on_policy else chosen
        visits = learnt.visits.at[here, action].add(1)
        learnt = Learnt(q_values, visits, place, action_then, step, learnt.rng)
        return learnt, Trace(after.reward, ended)

    return jax.lax.scan(one, learnt, None, length=steps)
