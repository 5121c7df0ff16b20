"""Steps of several players, each with a loss and an optimizer of its own, who take turns.

A player is a part of the variables: those of all are one tree (`fmjax.tree.together`), and every
player's loss is an ordinary LossFn of it. In a turn the player's own parameters are what trains,
and all the others' belong to what is only read: the split that frozen layers have, made anew each
turn. So a turn is the one train step of `make_train_step`, and turns in a row are a step again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.train.step import init_state, is_param, make_train_step
from fmjax.tree import flatten, merge, split
from fmjax.types import Batch, GradFn, Mean, StepFn, TrainState, Variables


class Turn(NamedTuple):
    """What a player does in a step.

    Args:
        name: the player's, as in ``params/{name}/...``.
        grad_fn: of the loss, over the variables of all players.
        tx: the Optax transformation of the player's parameters.
        rounds: updates in a row, each on its own share of the batch.
    """

    name: str
    grad_fn: GradFn
    tx: optax.GradientTransformation
    rounds: int = 1


def init_players(variables: Variables, turns: Sequence[Turn], rng: Array) -> TrainState:
    """The state before the first step; every player has an ``opt_state`` under its name.

    Args:
        variables: of all players, from `fmjax.tree.together`.
        turns: as `take_turns` has them.
        rng: a typed key.

    Raises:
        ValueError: players that are not those of the variables.
    """
    names = [turn.name for turn in turns]
    players = sorted(variables.get("params", {}))
    if sorted(names) != players:
        raise ValueError(f"the turns are of {names}, and the parameters of {players}")
    if wrong := [turn.name for turn in turns if turn.rounds < 1]:
        raise ValueError(f"the players {wrong} have no rounds; each has at least 1")
    own = {turn.name: split(variables, _belongs_to(turn.name))[0] for turn in turns}
    txs = {turn.name: turn.tx for turn in turns}

    def init(params: Any) -> optax.OptState:
        del params  # `own` by name
        return {name: tx.init(own[name]) for name, tx in txs.items()}

    # Only its `init` is ever called: what updates is the turns' own.
    return init_state(variables, optax.GradientTransformation(init, optax.identity().update), rng)


def take_turns(turns: Sequence[Turn]) -> StepFn:
    """A step in which the players move one after the other, each seeing what came before.

    Goodfellow et al. 2014, arXiv:1406.2661, algorithm 1: k rounds of the discriminator, one of the
    generator. A batch holds as many parts as the player with the most rounds has; round j of every
    player takes examples j, j + n, j + 2n, ... of n parts.

    Args:
        turns: in their order.

    Returns:
        ``step(state, batch) -> (state, metrics)``, to be compiled as any other; metrics are named
        ``{player}/loss`` and so on, means over its rounds.

    Raises:
        ValueError: when called, a batch that does not fall into so many parts.
    """
    parts = max(turn.rounds for turn in turns)
    steps = {turn.name: make_train_step(turn.grad_fn, turn.tx) for turn in turns}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        pieces = _pieces(batch, parts)
        metrics: dict[str, Mean] = {}
        opt_state: Any = state.opt_state
        for number, turn in enumerate(turns):
            own, others = split(state.trainable, _belongs_to(turn.name))
            moving = TrainState(
                step=state.step * turn.rounds,
                trainable=own,
                non_trainable=merge(state.non_trainable, others),
                opt_state=opt_state[turn.name],
                rng=jax.random.fold_in(state.rng, number),
            )
            mine = {name: leaf[: turn.rounds] for name, leaf in pieces.items()}
            moving, found = jax.lax.scan(steps[turn.name], moving, mine)
            metrics |= {
                f"{turn.name}/{name}": Mean(*(jnp.sum(part) for part in mean))
                for name, mean in found.items()
            }
            read = flatten(state.non_trainable)
            opt_state = {**opt_state, turn.name: moving.opt_state}
            kept, others = split(moving.non_trainable, lambda path, read=read: path in read)
            state = TrainState(
                step=state.step,
                trainable=merge(moving.trainable, others),
                non_trainable=kept,
                opt_state=opt_state,
                rng=state.rng,
            )
        return _after(state), metrics

    return step


def _after(state: TrainState) -> TrainState:
    return TrainState(
        state.step + 1, state.trainable, state.non_trainable, state.opt_state, state.rng
    )


def _belongs_to(name: str) -> Callable[[str], bool]:
    """Whether a leaf, by its path, is a parameter of the player."""
    return lambda path: is_param(path) and path.split("/")[1] == name


def _pieces(batch: Batch, parts: int) -> Mapping[str, Array]:
    """A batch as [n, B / n, ...]."""
    sizes = {name: len(leaf) for name, leaf in batch.items() if len(leaf) % parts}
    if sizes:
        raise ValueError(
            f"batch sizes {sizes} are no multiples of the {parts} rounds of a step; choose a "
            "batch size that is"
        )
    return {
        name: jnp.asarray(leaf).reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1)
        for name, leaf in batch.items()
    }
