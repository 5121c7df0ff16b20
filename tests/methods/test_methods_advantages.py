"""Advantages: their limits, a plain loop, ends of all kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax.methods.advantages import discounted_returns, generalised_advantages, standardised

T, B = 7, 3


def by_loop(rewards, values, discounts, decay, continues, final_values, mask):
    """Forwards, from the definition: every step sums the errors that follow it."""
    result = np.zeros(rewards.shape)
    for b in range(rewards.shape[1]):
        steps = [t for t in range(len(rewards)) if mask[t, b]]
        errors = []
        for place, t in enumerate(steps):
            following = steps[place + 1] if place + 1 < len(steps) else len(rewards)
            after = values[following, b] if continues[t, b] else final_values[t, b]
            errors.append(rewards[t, b] + discounts[t, b] * after - values[t, b])
        for place, t in enumerate(steps):
            scale = 1.0
            for t_k, error in zip(steps[place:], errors[place:], strict=True):
                result[t, b] += scale * error
                scale *= decay * discounts[t_k, b] * continues[t_k, b]
    return result


def draw(seed):
    rng = np.random.default_rng(seed)
    continues = rng.random((T, B)) < 0.7
    terminated = ~continues & (rng.random((T, B)) < 0.5)
    return {
        "rewards": rng.normal(size=(T, B)),
        "values": rng.normal(size=(T + 1, B)),
        "discounts": np.where(terminated, 0.0, rng.uniform(0.5, 1.0, (T, B))),
        "continues": continues,
        "final_values": rng.normal(size=(T, B)),
        "mask": rng.random((T, B)) < 0.8,
    }


advantages = jax.jit(generalised_advantages)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), decay=st.floats(0.0, 1.0))
def test_equals_a_loop(seed, decay):
    case = draw(seed)
    ours = advantages(
        **{k: jnp.asarray(v, jnp.float32) for k, v in case.items()}, decay=jnp.float32(decay)
    )
    np.testing.assert_allclose(ours, by_loop(**case, decay=decay), rtol=1e-5, atol=1e-5)


def test_limits():
    """Lambda 0 is the error of one step, lambda 1 the return less the value."""
    case = {k: jnp.asarray(v, jnp.float32) for k, v in draw(0).items()}
    rewards, values = case["rewards"], case["values"]
    discounts = 0.9 * jnp.ones_like(rewards).at[4, 1].set(0.0)
    errors = rewards + discounts * values[1:] - values[:-1]
    np.testing.assert_allclose(
        generalised_advantages(rewards, values, discounts, 0.0), errors, rtol=1e-5, atol=1e-6
    )
    total = np.asarray(values[-1])
    returns = np.zeros((T, B))
    for t in reversed(range(T)):
        total = returns[t] = rewards[t] + discounts[t] * total
    np.testing.assert_allclose(
        generalised_advantages(rewards, values, discounts, 1.0),
        returns - values[:-1], rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    # With the value after the last step as its last reward's rest.
    whole = rewards.at[-1].add(discounts[-1] * values[-1])
    np.testing.assert_allclose(discounted_returns(whole, discounts), returns, rtol=1e-5)


def test_what_does_not_count_may_be_anything():
    """nan in padding, and in the value after a terminated step."""
    rewards, discounts = jnp.ones((3, 1)), jnp.array([[1.0], [0.0], [1.0]])
    values = jnp.array([[0.5], [0.5], [jnp.nan], [jnp.nan]])
    mask = jnp.array([[1], [1], [0]])
    found = generalised_advantages(rewards, values, discounts, 1.0, mask=mask)
    np.testing.assert_allclose(found, [[1.5], [0.5], [0.0]])


def test_standardised_counts_what_is_weighed():
    values, weights = np.array([1.0, 2.0, 6.0, np.nan]), np.array([1.0, 1.0, 1.0, 0.0])
    found = standardised(jnp.asarray(values), jnp.asarray(weights))[:3]
    np.testing.assert_allclose(found, (values[:3] - 3) / values[:3].std(), rtol=1e-5)


def test_bad_shapes_are_refused():
    x = jnp.zeros((T, B))
    with pytest.raises(ValueError, match="append the value after the last step") as error:
        generalised_advantages(x, x, x[1:], 0.9, continues=x)
    assert "discounts have the shape (6, 3)" in str(error.value)
    assert "continues and final_values come together" in str(error.value)
