"""Players that take turns: against plain loops, and what each may and may not move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close

from fmjax.train import Turn, fit, gradient, init_players, init_state, jit_step, make_train_step
from fmjax.train import take_turns as turns_of
from fmjax.tree import part, together
from fmjax.types import Aux, Mean


def quadratic(own, other, sign):
    """A player's loss: it pulls its number to, or from, the other's, plus the data."""

    def loss(variables, batch, rng):
        mine = variables["params"][own]["x"]
        theirs = variables["params"][other]["x"]
        noise = jax.random.normal(rng, (len(batch["y"]),))
        found = Mean.of(sign * jnp.square(mine - theirs - batch["y"]) + 0.1 * mine * noise,
                        batch["weight"])  # fmt: skip
        seen = variables["batch_stats"][own]["seen"] + len(batch["y"])
        return found.value, Aux(
            found.weight, {"far": found}, {"batch_stats": {own: {"seen": seen}}}
        )

    return loss


def players(rounds=2):
    return [
        Turn("critic", gradient(quadratic("critic", "maker", 1.0)), optax.adam(0.1), rounds),
        Turn("maker", gradient(quadratic("maker", "critic", 0.5)), optax.sgd(0.05)),
    ]


def variables():
    one = {"params": {"x": jnp.array(1.0)}, "batch_stats": {"seen": jnp.array(0)}}
    other = {"params": {"x": jnp.array(-2.0)}, "batch_stats": {"seen": jnp.array(0)}}
    return together(critic=one, maker=other)


def batch(seed):
    rng = np.random.default_rng(seed)
    return {"y": rng.normal(size=6).astype(np.float32), "weight": np.float32([1, 1, 1, 0, 1, 1])}


def test_turns_are_train_steps_in_a_row():
    turns = players()
    state = init_players(variables(), turns, jax.random.key(0))
    step = jax.jit(turns_of(turns))
    # By hand: two rounds of the critic with the maker frozen, then one of the maker.
    by_hand = variables()
    states = {turn.name: turn.tx.init(part_params(by_hand, turn.name)) for turn in turns}
    plain = {turn.name: jax.jit(make_train_step(turn.grad_fn, turn.tx)) for turn in turns}
    for number in range(3):
        data = batch(number)
        state, metrics = step(state, data)
        for place, turn in enumerate(turns):
            fixed = {"params": {k: v for k, v in by_hand["params"].items() if k != turn.name},
                     "batch_stats": by_hand["batch_stats"]}  # fmt: skip
            one = init_state(
                by_hand, turn.tx, jax.random.fold_in(jax.random.key(0), place),
                lambda path, name=turn.name: path.startswith(f"params/{name}/"),
            )  # fmt: skip
            one = type(one)(
                jnp.int32(number * turn.rounds), one.trainable, fixed, states[turn.name], one.rng
            )
            totals = []
            for j in range(turn.rounds):
                one, found = plain[turn.name](
                    one, {name: leaf[j::2] for name, leaf in data.items()}
                )
                totals.append(found["loss"])
            states[turn.name] = one.opt_state
            by_hand = {
                "params": {**fixed["params"], **one.trainable["params"]},
                "batch_stats": one.non_trainable["batch_stats"],
            }
            mean = metrics[f"{turn.name}/loss"]
            assert float(mean.total) == pytest.approx(sum(float(m.total) for m in totals), 1e-5)
            assert float(mean.weight) == sum(float(m.weight) for m in totals)
    assert_trees_all_close(state.trainable, {"params": by_hand["params"]}, rtol=1e-5)
    assert int(state.step) == 3
    seen = {name: int(tree["seen"]) for name, tree in state.non_trainable["batch_stats"].items()}
    assert seen == {"critic": 18, "maker": 9}
    assert_trees_all_close(state.opt_state, states, rtol=1e-5)


def part_params(tree, name):
    return {"params": {name: part(tree, name)["params"]}}


def test_a_run_of_players_is_fitted_as_any_other():
    """The compiled step donates its state; a loss that is not finite is named by its player."""
    turns = players()
    state = init_players(variables(), turns, jax.random.key(0))
    step = jit_step(turns_of(turns))
    seen = []
    state = fit(
        state, step, iter(map(batch, range(4))), steps=4, hooks=[(2, lambda e: seen.append(e))]
    )
    assert len(seen) == 2
    assert set(seen[0].metrics) == {
        f"{name}/{metric}"
        for name in ("critic", "maker")
        for metric in ("loss", "grad_norm", "far")
    }
    broken = {**batch(5), "y": np.full(6, np.inf, np.float32)}
    with pytest.raises(FloatingPointError, match="critic/loss is nan"):
        fit(state, step, iter([broken]), steps=5)


def test_what_does_not_fit_is_refused():
    turns = players()
    with pytest.raises(ValueError, match="the turns are of"):
        init_players(variables(), turns[:1], jax.random.key(0))
    with pytest.raises(ValueError, match="have no rounds"):
        init_players(variables(), players(rounds=0), jax.random.key(0))
    state = init_players(variables(), turns, jax.random.key(0))
    odd = {name: leaf[:5] for name, leaf in batch(0).items()}
    with pytest.raises(ValueError, match="no multiples of the 2 rounds"):
        turns_of(turns)(state, odd)
