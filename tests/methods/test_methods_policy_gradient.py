"""The formulas of policy gradients against loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmjax.methods.advantages import standardised
from fmjax.methods.grpo import averaged, group_advantages, grpo_loss, grpo_prepare
from fmjax.methods.policy_gradient import (
    clipped_losses,
    is_clipped,
    response_advantages,
    reverse_kl,
)
from fmjax.methods.ppo_language import adapted_coefficient, ppo_loss, ppo_prepare, with_critic


@given(
    lengths=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    discount=st.sampled_from([1.0, 0.9]),
    trace=st.sampled_from([0.0, 0.95, 1.0]),
    seed=st.integers(0, 99),
)
def test_advantages_are_those_of_a_loop(lengths, discount, trace, seed):
    draw = np.random.default_rng(seed)
    mask = np.arange(6) < np.array(lengths)[:, None]
    rewards, values = draw.normal(size=(2, 3, 6)).astype(np.float32)
    expected = np.zeros((3, 6))
    for row, length in enumerate(lengths):
        for t in range(length):
            for k in range(t, length):
                after = values[row, k + 1] if k + 1 < length else 0.0
                error = rewards[row, k] + discount * after - values[row, k]
                expected[row, t] += (discount * trace) ** (k - t) * error
    advantages, returns = jax.jit(response_advantages)(
        rewards * mask, values, mask, discount=discount, trace=trace
    )
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, expected + values * mask, atol=1e-5)


def test_clipping_matters_only_outside_the_bounds():
    """Values and slopes against numpy's cases; at ratio 1 it is the policy gradient."""
    ratio, low, high = np.float32([0.3, 0.75, 0.9, 1.0, 1.1, 1.25, 2.0]), 0.2, 0.3
    for advantage in (1.5, -0.7):
        inside = ratio * advantage
        outside = np.clip(ratio, 1 - low, 1 + high) * advantage
        loss = clipped_losses(jnp.log(ratio), jnp.float32(advantage), low, high)
        np.testing.assert_allclose(loss, -np.minimum(inside, outside), rtol=1e-5)
        slope = jax.vmap(jax.grad(lambda x: clipped_losses(x, advantage, low, high)))  # noqa: B023
        cut = ratio > 1 + high if advantage > 0 else ratio < 1 - low
        np.testing.assert_allclose(slope(jnp.log(ratio)), -inside * ~cut, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(is_clipped(jnp.log(ratio), advantage, low, high), cut)
        np.testing.assert_allclose(slope(jnp.zeros(1)), -advantage, rtol=1e-6)


def test_the_divergence_is_unbiased_and_positive():
    p, q = np.float64([0.5, 0.3, 0.2]), np.float64([0.2, 0.2, 0.6])
    values = reverse_kl(jnp.log(p), jnp.log(q))
    assert (np.asarray(values) >= 0).all()
    np.testing.assert_allclose((p * values).sum(), (p * np.log(p / q)).sum(), rtol=1e-5)
    assert reverse_kl(jnp.float32(-3.0), jnp.float32(-3.0)) == 0


def test_advantages_of_groups():
    rewards = np.float32([1, 0, 0, 1, 5, 5, 5, 5, 0, 1, 2, 3])
    groups = rewards.reshape(3, 4)
    centred = groups - groups.mean(1, keepdims=True)
    scaled = centred / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, 4).reshape(3, 4), scaled, rtol=1e-5)
    assert (group_advantages(rewards, 4)[4:8] == 0).all()
    plain = group_advantages(rewards, 4, scale="none").reshape(3, 4)
    np.testing.assert_allclose(plain, centred, rtol=1e-5)
    others = (groups.sum(1, keepdims=True) - groups) / 3
    left = group_advantages(rewards, 4, scale="none", leave_one_out=True).reshape(3, 4)
    np.testing.assert_allclose(left, groups - others, rtol=1e-5, atol=1e-6)
    for size in (1, 5):
        with pytest.raises(ValueError, match="a group is at least 2"):
            group_advantages(rewards, size)


def test_averages():
    """Rows of 1, 3 and 2 tokens, and one that is padding and nan."""
    losses = np.float32([[1, 9, 9], [1, 2, 3], [5, 7, 9], [np.nan] * 3])
    mask = np.float32([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
    weights = mask * np.float32([1, 1, 1, 0])[:, None]
    assert averaged(losses, weights, "sequence").value == (1 + 2 + 6) / 3
    np.testing.assert_allclose(averaged(losses, weights, "token").value, 19 / 6)
    np.testing.assert_allclose(averaged(losses, weights, "constant").value, 19 / 3 / 3)
    assert averaged(losses, weights, "token").weight == 6
    assert averaged(losses, weights, "constant").weight == 3


def test_whitened():
    draw = np.random.default_rng(0)
    values = draw.normal(3, 2, (4, 5)).astype(np.float32)
    weights = (draw.random((4, 5)) < 0.7).astype(np.float32)
    white = np.asarray(standardised(values, weights))
    kept = white[weights > 0]
    np.testing.assert_allclose([kept.mean(), kept.std()], [0, 1], atol=1e-5)
    assert (white[weights == 0] == 0).all()


def test_the_coefficient_moves_towards_the_target():
    """Ziegler et al. 2019: at most a fifth of the gain a turn, and not at all on target."""
    np.testing.assert_allclose(adapted_coefficient(0.2, 6.0, 6.0, 0.1), 0.2)
    np.testing.assert_allclose(adapted_coefficient(0.2, 6.6, 6.0, 0.1), 0.2 * 1.01, rtol=1e-5)
    np.testing.assert_allclose(adapted_coefficient(0.2, 60.0, 6.0, 0.1), 0.2 * 1.02, rtol=1e-5)
    np.testing.assert_allclose(adapted_coefficient(0.2, 0.0, 6.0, 0.1), 0.2 * 0.98, rtol=1e-5)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"lower clip is 1.*upper clip is 0.*kl_weight=-1.*'odd'"):
        grpo_loss(None, clip=1, clip_high=0, kl_weight=-1, average="odd")
    with pytest.raises(ValueError, match="'batch' is not one of"):
        grpo_prepare(4, scale="batch")
    with pytest.raises(ValueError, match=r"lower clip.*value_clip=-1.*entropy_weight=-2"):
        ppo_loss(None, clip=0, value_clip=-1, entropy_weight=-2)
    with pytest.raises(ValueError, match=r"discount=2 .*trace=-1 .*target_kl=0.*gain=5"):
        ppo_prepare(discount=2, trace=-1, target_kl=0, gain=5)
    with pytest.raises(ValueError, match="kl_coefficient=-1"):
        with_critic(None, {}, kl_coefficient=-1)
