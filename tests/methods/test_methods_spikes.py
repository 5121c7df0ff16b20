"""Steps whose loss or gradient jumps change nothing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmjax.methods.spikes import skip_spikes
from fmjax.train import adamw, fit, gradient, init_state, jit_step, make_train_step
from fmjax.types import Aux

PARAMS = {"params": {"w": jnp.ones(2)}}


def run(losses, norms=None, **options):
    """Each step's update and the last state, for losses and gradients' norms as given."""
    tx = skip_spikes(optax.sgd(0.1, momentum=0.5), window=8, **options)
    state = tx.init(PARAMS)
    update = jax.jit(lambda g, state, value: tx.update(g, state, PARAMS, value=value))
    steps, states = [], [state]
    for i, loss in enumerate(losses):
        size = 1.0 if norms is None else norms[i]
        grads = {"params": {"w": jnp.array([size, 0.0])}}
        updates, state = update(grads, state, jnp.float32(loss))
        steps.append(float(updates["params"]["w"][0]))
        states.append(state)
    return steps, states


NOISE = np.random.default_rng(0).normal(size=12) * 0.1


def test_a_jump_of_the_loss_is_left_out():
    steps, states = run([*(2 + NOISE), 9.0, 2.0])
    assert all(steps[:12])
    assert steps[12] == 0
    assert steps[13] != 0
    assert int(states[-1].skipped) == 1
    chex.assert_trees_all_equal(states[12].inner, states[13].inner)


def test_a_jump_of_the_gradient_is_left_out():
    steps, _ = run(2 + np.zeros(13), [*(1 + NOISE), 50.0])
    assert all(steps[:12])
    assert steps[12] == 0


def test_what_is_not_finite_is_left_out_and_forgotten():
    steps, states = run([np.nan, 2.0, np.inf, 2.0])
    assert [step != 0 for step in steps] == [False, True, False, True]
    assert int(states[-1].count) == 2
    assert np.isfinite(states[-1].losses).all()


def test_early_jumps_and_falls_are_none():
    steps, _ = run([2.0, 9.0, 3.0])
    assert all(steps)
    steps, _ = run([*(2 + NOISE), -9.0])
    assert steps[-1] != 0


def test_a_small_rise_after_steps_all_alike_is_none():
    steps, _ = run([1.0] * 8 + [1.0001, 1.1])
    assert all(steps[:9])
    assert steps[9] == 0


def test_a_new_level_is_learnt():
    steps, _ = run([*(2 + NOISE[:8]), 4.0, 4.1, 3.9, 4.0, 4.1, 3.9])
    assert steps[8] == 0
    assert all(steps[-3:])


def test_the_train_step_gives_the_loss():
    def loss(variables, batch, rng):
        return jnp.sum(variables["params"]["w"] * batch["x"][0]), Aux(jnp.ones(()), {}, {})

    tx = skip_spikes(optax.sgd(0.1))
    state = init_state(PARAMS, tx, jax.random.key(0))
    step = jax.jit(make_train_step(gradient(loss), tx))
    state, _ = step(state, {"x": jnp.array([[jnp.inf, 1.0]])})
    np.testing.assert_array_equal(state.trainable["params"]["w"], np.ones(2))
    assert int(state.opt_state.skipped) == 1


def test_updates_of_another_dtype_than_the_gradients():
    """As `keep_moments` makes them, which computes in float32."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = skip_spikes(adamw(0.1, moments="bfloat16"))
    updates, state = tx.update(params, tx.init(params), params, value=jnp.float32(1.0))
    assert (updates["params"]["w"] != 0).all()
    updates, state = tx.update(params, state, params, value=jnp.float32(jnp.nan))
    assert (updates["params"]["w"] == 0).all()
    assert int(state.skipped) == 1


def test_a_run_goes_on_behind_them():
    def loss(variables, batch, rng):
        return jnp.sum(variables["params"]["w"] * batch["x"][0]), Aux(jnp.ones(()), {}, {})

    def run(tx, numbers, forgiven):
        events = []
        step = jit_step(make_train_step(gradient(loss), tx))
        state = init_state(jax.tree.map(jnp.copy, PARAMS), tx, jax.random.key(0))
        batches = iter([{"x": np.array([[x, 1.0]], np.float32)} for x in numbers])
        hooks = [(len(numbers), events.append)]
        state = fit(state, step, batches, steps=len(numbers), hooks=hooks, forgiven=forgiven)
        return state, events[0].metrics["loss"]

    numbers = [1.0, np.inf, np.nan, 1.0, np.inf]
    state, mean = run(skip_spikes(optax.sgd(0.1)), numbers, 2)
    alone, expected = run(optax.sgd(0.1), [1.0, 1.0], 0)
    chex.assert_trees_all_equal(state.trainable, alone.trainable)
    assert mean == expected
    assert int(state.opt_state.skipped) == 3
    with pytest.raises(FloatingPointError, match="step 3: loss is nan"):
        run(skip_spikes(optax.sgd(0.1)), numbers, 1)


def test_bad_settings():
    with pytest.raises(ValueError, match="window=2"):
        skip_spikes(optax.sgd(0.1), window=2)
