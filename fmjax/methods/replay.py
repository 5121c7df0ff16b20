"""Replay of past transitions, by priority (Schaul, Quan, Antonoglou & Silver 2016,
arXiv:1511.05952) or uniformly, as arrays on the device; and returns of n steps.

Sampling is exact, from cumulative sums of the priorities: on an accelerator and on sizes to a
million or so they take less than the depth of a sum tree. In float32 they tell priorities apart
down to 1e-7 of the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.methods.rollouts import Trajectory

ATTACHES = ("program",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replay:
    """The last N transitions.

    Args:
        rows: by name, [N, ...].
        priorities: float32 [N]; 0 where nothing is yet.
        added: how many there ever were, int32 [].
        highest: the highest priority so far, float32 []: what new transitions get, so that each
            is seen.
    """

    rows: dict[str, Array]
    priorities: Array
    added: Array
    highest: Array

    @property
    def filled(self) -> Array:
        """How many transitions it holds, int32 []."""
        return jnp.minimum(self.added, len(self.priorities))


def empty(example: Mapping[str, Array | jax.ShapeDtypeStruct], capacity: int) -> Replay:
    """Nothing yet.

    Args:
        example: rows [B, ...] as they will be added.
        capacity: N.

    Raises:
        ValueError: fewer than one addition fits.
    """
    size = next(iter(example.values())).shape[0]
    if capacity < size:
        raise ValueError(
            f"capacity={capacity} holds less than the {size} rows that are added at once; give more"
        )
    rows = {k: jnp.zeros((capacity, *x.shape[1:]), x.dtype) for k, x in example.items()}
    return Replay(rows, jnp.zeros(capacity), jnp.zeros((), jnp.int32), jnp.ones(()))


def add(replay: Replay, rows: Mapping[str, Array], counts: Array | bool = True) -> Replay:
    """Writes B rows over the oldest.

    Args:
        replay: where to.
        rows: by name, [B, ...].
        counts: bool [], whether they are added at all.
    """
    size, capacity = next(iter(rows.values())).shape[0], len(replay.priorities)
    places = (replay.added + jnp.arange(size)) % capacity
    # Places out of range are dropped: one write, without a copy of the whole.
    places = jnp.where(counts, places, capacity)
    return Replay(
        {name: old.at[places].set(rows[name], mode="drop") for name, old in replay.rows.items()},
        replay.priorities.at[places].set(replay.highest, mode="drop"),
        replay.added + jnp.where(counts, size, 0),
        replay.highest,
    )


def sample(
    replay: Replay,
    rng: Array,
    size: int,
    *,
    exponent: float = 0.0,
    beta: Array | float = 1.0,
) -> tuple[Array, dict[str, Array]]:
    """B rows by ``priority ** exponent``, one from each B-th of the sum (3.3, appendix B.2.1).

    Args:
        replay: with at least one row.
        rng: a key.
        size: B.
        exponent: alpha; 0 is uniform.
        beta: of the weights that correct for it, ``(1 / (N P)) ** beta`` by the batch's largest
            (3.4); 1 corrects in full.

    Returns:
        (places int32 [B], the rows [B, ...] with ``importance`` [B]).
    """
    capacity = len(replay.priorities)
    there = jnp.arange(capacity) < replay.filled
    mass = jnp.where(there, replay.priorities**exponent, 0.0)
    sums = jnp.cumsum(mass)
    points = (jnp.arange(size) + jax.random.uniform(rng, (size,))) / size * sums[-1]
    places = jnp.searchsorted(sums, points, side="right").astype(jnp.int32)
    places = jnp.minimum(places, replay.filled - 1)  # a point may be rounded up to the whole sum
    share = mass[places] / sums[-1]
    importance = (replay.filled * jnp.maximum(share, 1e-12)) ** -beta
    rows = {name: x[places] for name, x in replay.rows.items()}
    return places, rows | {"importance": importance / importance.max()}


def reprioritise(replay: Replay, places: Array, errors: Array, least: float = 1e-6) -> Replay:
    """Gives transitions the priorities ``abs(error) + least`` (3.3, proportional).

    Args:
        replay: from which they were sampled.
        places: int32 [B], from `sample`.
        errors: [B], temporal differences.
        least: that no transition is never seen again.
    """
    priorities = jnp.abs(errors) + least
    return dataclasses.replace(
        replay,
        priorities=replay.priorities.at[places].set(priorities),
        highest=jnp.maximum(replay.highest, priorities.max()),
    )


def several_steps(window: Trajectory, discount: float) -> dict[str, Array]:
    """Transitions from the first of n steps to what followed the last, or the episode's end
    (Sutton 1988; Sutton & Barto 2018, 7.1).

    Args:
        window: n steps of B environments.
        discount: gamma.

    Returns:
        Rows [B, ...]: observations, actions, rewards (discounted and summed), discounts (gamma to
        the number of steps; 0 after a termination) and next_observations, of an episode that was
        cut off its last one.
    """
    steps, batch = window.rewards.shape
    # Steps count until one has ended the episode.
    before = jnp.concatenate([jnp.ones((1, batch)), jnp.cumprod(window.continues, 0)[:-1]])
    counts = before.sum(0).astype(jnp.int32)
    scales = discount ** jnp.arange(steps)[:, None]
    last = counts - 1
    columns = jnp.arange(batch)
    return {
        "observations": window.observations[0],
        "actions": window.actions[0],
        "rewards": jnp.sum(before * scales * window.rewards, 0),
        "discounts": jnp.where(window.terminated[last, columns], 0.0, discount**counts),
        "next_observations": window.final_observations[last, columns],
    }
