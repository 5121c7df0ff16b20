"""Mazes and finite processes: arrays, episodes, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.environments import FiniteEnvironment, FiniteMDP, Maze, check_environment

MAZE = """
S.#.
.##G
....
"""


def test_a_maze_is_its_drawing():
    maze = Maze(MAZE, goal_reward=10.0)
    mdp = maze.mdp()
    assert maze.cells == [(0, 0), (0, 1), (0, 3), (1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]
    # From the start: the edge above, the next cell, the one below, the edge to the left.
    np.testing.assert_array_equal(mdp.transitions[0], [0, 1, 3, 0])
    np.testing.assert_array_equal(mdp.rewards[8], [9.0, -1.0, -1.0, -1.0])  # up, to the goal
    np.testing.assert_array_equal(np.flatnonzero(mdp.terminal), [4])
    np.testing.assert_array_equal(
        maze.distances(), [[6, 7, -1, 1], [5, -1, -1, 0], [4, 3, 2, 1]]
    )  # fmt: skip
    np.testing.assert_array_equal(maze.drawn(np.arange(9), -1)[1], [3, -1, -1, 4])


def test_slips_go_to_the_sides():
    slippery = Maze(MAZE, slip=0.2, goal_reward=10.0).mdp()
    row = slippery.transitions[8]  # the corner under the goal
    np.testing.assert_allclose(row[0], np.eye(9)[4] * 0.8 + np.eye(9)[8] * 0.1 + np.eye(9)[7] * 0.1)
    np.testing.assert_allclose(slippery.rewards[8, 1], -1 + 10 * 0.1, rtol=1e-6)
    np.testing.assert_allclose(slippery.transitions.sum(-1), 1.0, rtol=1e-6)


def test_episodes_follow_the_arrays():
    environment = Maze(MAZE, slip=0.4).environment(max_steps=3)
    check_environment(environment)
    step = jax.jit(jax.vmap(environment.step, in_axes=(None, None, 0)))
    state, observation = environment.reset(jax.random.key(0))
    np.testing.assert_array_equal(observation, np.eye(9)[0])
    after = step(state, 1, jax.random.split(jax.random.key(1), 4000))
    share = np.asarray(after.observation).mean(0)
    # Five standard deviations of a share.
    np.testing.assert_allclose(
        share, environment.mdp.transitions[0, 1], atol=5 * np.sqrt(0.24 / 4000)
    )
    assert not after.truncated.any()
    state = state._replace(steps=jnp.int32(2))
    assert step(state, 1, jax.random.split(jax.random.key(1), 2)).truncated.all()


def test_what_is_no_maze_is_refused():
    with pytest.raises(ValueError, match="lengths") as error:
        Maze("S..\n.x", slip=2.0, step_reward=float("nan"))
    for words in ("['x'] are not known", "there is no G", "slip=2.0", "rewards are not finite"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="row 0, column 0 no goal can be reached"):
        Maze("S#G")


def test_what_is_no_process_is_refused():
    rewards, terminal = jnp.zeros((2, 2)), jnp.array([False, True])
    sure = jnp.array([[0, 1], [1, 1]])
    with pytest.raises(ValueError, match="begin in the terminal states"):
        FiniteEnvironment(FiniteMDP(sure, rewards, terminal), jnp.array([0.5, 0.5]), 5)
    with pytest.raises(ValueError, match="next states must be from 0 to 1") as error:
        FiniteEnvironment(
            FiniteMDP(sure + 1, rewards * jnp.nan, terminal | True), jnp.array([1.0, 0.0]), 5
        )
    for words in ("rewards are not finite", "every episode ends at once"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="must be probabilities"):
        FiniteEnvironment(
            FiniteMDP(jnp.ones((2, 2, 2)), rewards, terminal), jnp.array([1.0, 0.0]), 5
        )
    with pytest.raises(ValueError, match="sum to 2"):
        FiniteEnvironment(FiniteMDP(sure, rewards, terminal), jnp.ones(2), 5)
