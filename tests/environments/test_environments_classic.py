"""Our classics against gymnasium's, step by step and along trajectories; gymnasium as ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.environments import (
    CartPole,
    GymnasiumVector,
    MountainCar,
    Step,
    Vectorised,
    check_environment,
)

gymnasium = pytest.importorskip("gymnasium")


@pytest.mark.parametrize(
    ("ours", "name", "limit"),
    [(CartPole(), "CartPole-v1", 500), (MountainCar(), "MountainCar-v0", 200)],
    ids=["cart_pole", "mountain_car"],
)
def test_equals_gymnasium(ours, name, limit):
    """Whole episodes in step: the same observations, rewards and ends, the time limit included."""
    theirs, step = gymnasium.make(name), jax.jit(ours.step)
    rng = np.random.default_rng(0)
    ends, key = set(), jax.random.key(0)
    for episode in range(4):
        theirs.reset(seed=episode)
        state, _ = ours.reset(key)
        for _ in range(limit):
            motion = np.asarray(theirs.unwrapped.state, np.float32)
            if episode % 2:  # at random
                action = int(rng.integers(ours.num_actions))
            elif name == "CartPole-v1":  # upright, by feedback
                action = int(motion @ np.array([0.1, 0.5, 5.0, 1.0]) > 0)
            else:  # with the motion, which reaches the goal
                action = 2 * int(motion[1] >= 0)
            # In step: rounding in float32 grows along a pole's whole episode.
            after = step(state._replace(motion=motion), action, key)
            observation, reward, terminated, truncated, _ = theirs.step(action)
            np.testing.assert_allclose(after.observation, observation, rtol=1e-5, atol=1e-6)
            assert (float(after.reward), bool(after.terminated), bool(after.truncated)) == (
                reward, terminated, truncated,
            )  # fmt: skip
            state = after.state
            if terminated or truncated:
                ends.add((terminated, truncated))
                break
    assert ends >= {(True, False), (False, True)}


def test_trajectories_equal_gymnasium():
    """In one program, from one state: the pole falls along the same 1e-5."""
    theirs = gymnasium.make("CartPole-v1")
    start, _ = theirs.reset(seed=3)
    actions = np.random.default_rng(1).integers(0, 2, 40)
    state = CartPole().reset(jax.random.key(0))[0]._replace(motion=jnp.asarray(start))

    def one(state, action):
        after = CartPole().step(state, action, jax.random.key(0))
        return after.state, (after.observation, after.terminated)

    _, (observations, terminated) = jax.jit(lambda s: jax.lax.scan(one, s, jnp.asarray(actions)))(
        state
    )
    for t, action in enumerate(actions):
        observation, _, ended, _, _ = theirs.step(int(action))
        np.testing.assert_allclose(observations[t], observation, rtol=1e-5, atol=1e-5)
        assert bool(terminated[t]) == ended
        if ended:
            break
    assert t > 10


def balance(environment, steps):
    """A run of one program: observations, ends and what they led to."""

    def one(carry, rng):
        state, observation = carry
        after = environment.step(state, (observation[:, 2] > 0).astype(jnp.int32), rng)
        return (after.state, after.observation), after._replace(state=())

    def run(rng):
        first = environment.reset(rng)
        return first[1], jax.lax.scan(one, first, jax.random.split(rng, steps))[1]

    return jax.tree.map(np.asarray, jax.jit(run)(jax.random.key(0)))


@pytest.mark.parametrize(
    "environment",
    [Vectorised(CartPole(), 3), GymnasiumVector.make("CartPole-v1", 3)],
    ids=["ours", "gymnasium"],
)
def test_episodes_begin_anew(environment):
    """In the step that ends one; the last observation is kept."""
    first, after = balance(environment, 120)
    ended = after.terminated | after.truncated
    assert first.shape == (3, 4)
    assert ended.any(0).all()
    np.testing.assert_array_equal(after.observation[~ended], after.final_observation[~ended])
    assert (np.abs(after.observation[ended]) <= 0.05).all()  # as episodes begin
    assert (np.abs(after.final_observation[ended][:, 2]) > 0.2).all()  # as they end
    assert len(np.unique(after.observation[ended], axis=0)) == ended.sum()
    # What follows goes on from the new beginning.
    t, b = next(zip(*np.nonzero(ended[:-1]), strict=True))
    moved = after.final_observation[t + 1, b] - after.observation[t, b]
    assert np.abs(moved[[0, 2]]).max() < 0.02 * 0.06
    assert environment.num_actions == 2


class Odd(CartPole):
    """A cart whose steps are changed by a test."""

    change = staticmethod(lambda after: after)

    def step(self, state, action, rng) -> Step:
        return type(self).change(super().step(state, action, rng))


def test_environments_without_anything_to_learn_are_refused():
    def odd(**changes):
        class Changed(Odd):
            change = staticmethod(lambda after: after._replace(**changes))

        return Changed()

    check_environment(CartPole())
    with pytest.raises(ValueError, match="ends its episode at once"):
        check_environment(odd(terminated=jnp.array(True)))
    with pytest.raises(ValueError, match="rewards are not finite") as error:
        check_environment(
            odd(reward=jnp.float32(jnp.inf), observation=jnp.full(4, jnp.nan, jnp.float32))
        )
    assert "observations are not finite" in str(error.value)
    one = odd()
    type(one).num_actions = 1
    with pytest.raises(ValueError, match="num_actions=1"):
        check_environment(one)
    with pytest.raises(ValueError, match="give at least 1"):
        Vectorised(CartPole(), 0)


def test_gymnasium_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="only Discrete ones are supported"):
        GymnasiumVector.make("Pendulum-v1", 1)
    with pytest.raises(ValueError, match="SAME_STEP"):
        GymnasiumVector(gymnasium.make_vec("CartPole-v1", 1, "sync"))

    class Infinite(gymnasium.RewardWrapper):
        def reward(self, reward):
            return float("inf")

    environment = GymnasiumVector.make("CartPole-v1", 2, wrappers=[Infinite])
    with pytest.raises(Exception, match="rewards are not finite"):
        balance(environment, 3)
