"""Tabular methods against linear algebra, and against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmjax.environments import FiniteEnvironment, FiniteMDP, Maze
from fmjax.methods import tabular
from fmjax.methods.policies import boltzmann, epsilon_greedy, greedy

SIZE, ACTIONS, DISCOUNT = 6, 3, 0.9


def random_process(seed=0):
    """Random transitions and rewards; the last state is terminal."""
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.full(SIZE, 0.5), (SIZE, ACTIONS)).astype(np.float32)
    rewards = rng.normal(size=(SIZE, ACTIONS)).astype(np.float32)
    return FiniteMDP(
        jnp.asarray(transitions), jnp.asarray(rewards), jnp.arange(SIZE) == SIZE - 1
    )  # fmt: skip


def solved(mdp, policy):
    """The values of a policy by a linear solve in float64."""
    living = ~np.asarray(mdp.terminal)
    transitions = np.einsum("sa,sat->st", policy, np.asarray(mdp.transitions, np.float64))
    rewards = np.einsum("sa,sa->s", policy, np.asarray(mdp.rewards, np.float64))
    matrix = np.eye(SIZE) - DISCOUNT * transitions * living
    values = np.zeros(SIZE)
    values[living] = np.linalg.solve(matrix[np.ix_(living, living)], rewards[living])
    return values


def test_value_iteration_solves_the_optimal_policy():
    mdp = random_process()
    solution = tabular.value_iteration(mdp, DISCOUNT, tolerance=1e-7)
    policy = np.asarray(tabular.greedy_policy(solution.q_values))
    np.testing.assert_allclose(solution.values, solved(mdp, policy), rtol=1e-5, atol=1e-5)
    # No policy is better: all of them, one action a state, in the five states that go on.
    best = np.full(SIZE, -np.inf)
    for choice in np.ndindex(*[ACTIONS] * (SIZE - 1)):
        best = np.maximum(best, solved(mdp, np.eye(ACTIONS)[[*choice, 0]]))
    np.testing.assert_allclose(solution.values, best, rtol=1e-5, atol=1e-5)
    assert float(solution.change) <= 1e-7
    cut = tabular.value_iteration(mdp, DISCOUNT, max_sweeps=3)
    assert int(cut.sweeps) == 3
    assert float(cut.change) > 1e-6


def test_policy_evaluation_equals_a_linear_solve():
    mdp = random_process(1)
    policy = np.random.default_rng(0).dirichlet(np.ones(ACTIONS), SIZE)
    solution = tabular.policy_evaluation(mdp, policy, DISCOUNT, tolerance=1e-7)
    np.testing.assert_allclose(solution.values, solved(mdp, policy), rtol=1e-5, atol=1e-5)


def test_next_states_are_certain_transitions():
    maze = Maze("S...\n.##.\n...G", goal_reward=5.0)
    mdp = maze.mdp()
    dense = dataclasses.replace(mdp, transitions=jnp.eye(len(maze.cells))[mdp.transitions])
    found = [tabular.value_iteration(m, 1.0) for m in (mdp, dense)]
    np.testing.assert_allclose(found[0].q_values, found[1].q_values, rtol=1e-6)
    # Undiscounted, each step costs 1 and the last one brings 5: the shortest path.
    distances = maze.distances()[tuple(zip(*maze.cells, strict=True))]
    np.testing.assert_allclose(found[0].values, np.where(distances > 0, 5.0 - distances, 0.0))


def decaying(visits):
    return 1.0 / (visits + 1.0) ** 0.7


@pytest.fixture(scope="module")
def environment():
    starts = jnp.where(jnp.arange(SIZE) == SIZE - 1, 0.0, 1.0 / (SIZE - 1))
    return FiniteEnvironment(random_process(), starts, max_steps=7)


@pytest.mark.slow
def test_q_learning_converges_to_the_optimal_values(environment):
    """Episodes are cut off after 7 steps, which must not show in the values."""
    explore = tabular.exploring(epsilon_greedy, optax.constant_schedule(0.5))
    options = {"discount": DISCOUNT, "explore": explore, "learning_rate": decaying}
    start = tabular.begin(environment, explore, jax.random.key(0))
    learnt, trace = tabular.q_learning(environment, start, 40_000, **options)
    wanted = tabular.value_iteration(environment.mdp, DISCOUNT).q_values
    scale = float(jnp.abs(wanted).max())
    # Noise that the last learning rates, of about 0.003, leave: measured 0.045.
    assert float(jnp.abs(learnt.q_values - wanted).max()) < 0.08 * scale
    assert int(learnt.visits.sum()) == 40_000
    assert bool(trace.ended[:7].any())
    # Bitwise the same in two parts.
    half, _ = tabular.q_learning(environment, start, 20_000, **options)
    whole, _ = tabular.q_learning(environment, half, 20_000, **options)
    np.testing.assert_array_equal(whole.q_values, learnt.q_values)


@pytest.mark.slow
def test_sarsa_learns_what_it_does(environment):
    """Exploring uniformly, it evaluates the uniform policy, which Q-learning does not."""
    explore = tabular.exploring(epsilon_greedy, optax.constant_schedule(1.0))
    start = tabular.begin(environment, explore, jax.random.key(0))
    learnt, _ = tabular.sarsa(
        environment, start, 40_000, discount=DISCOUNT, explore=explore, learning_rate=decaying
    )
    uniform = np.full((SIZE, ACTIONS), 1 / ACTIONS)
    wanted = tabular.policy_evaluation(environment.mdp, uniform, DISCOUNT).q_values
    scale = float(jnp.abs(wanted).max())
    # Measured 0.024.
    assert float(jnp.abs(learnt.q_values - wanted).max()) < 0.06 * scale
    best = tabular.value_iteration(environment.mdp, DISCOUNT).q_values
    assert float(jnp.abs(learnt.q_values - best).max()) > 0.2 * scale


def test_the_first_action_has_a_key_of_its_own(environment):
    """Not that of the state where it begins."""
    keys = []

    class Watched(FiniteEnvironment):
        def reset(self, rng):
            keys.append(rng)
            return super().reset(rng)

    def explore(values, step, rng):
        keys.append(rng)
        return jnp.zeros((), jnp.int32)

    watched = Watched(environment.mdp, environment.starts, max_steps=7)
    learnt = tabular.begin(watched, explore, jax.random.key(0))
    assert len({jax.random.key_data(key).tobytes() for key in [*keys, learnt.rng]}) == 3


def test_policies_have_their_probabilities():
    values = jnp.tile(jnp.array([1.0, 3.0, 3.0, 2.0]), (40_000, 1))
    rng, margin = jax.random.key(0), 5 * 0.5 / 200

    def shares(actions):
        return np.bincount(actions, minlength=4) / len(actions)

    np.testing.assert_allclose(shares(greedy(values, rng)), [0, 0.5, 0.5, 0], atol=margin)
    np.testing.assert_allclose(
        shares(epsilon_greedy(values, 0.4, rng)), [0.1, 0.4, 0.4, 0.1], atol=margin
    )
    np.testing.assert_allclose(
        shares(boltzmann(values, 0.5, rng)), jax.nn.softmax(values[0] / 0.5), atol=margin
    )
    np.testing.assert_allclose(shares(boltzmann(values, 0.0, rng)), [0, 0.5, 0.5, 0], atol=margin)


def test_what_does_not_fit_is_refused(environment):
    mdp = environment.mdp
    with pytest.raises(ValueError, match=r"discount=1\.5 must be from 0 to 1"):
        tabular.value_iteration(mdp, 1.5)
    with pytest.raises(ValueError, match="rows sum to 1"):
        tabular.policy_evaluation(mdp, jnp.ones((SIZE, ACTIONS)), DISCOUNT)
    with pytest.raises(ValueError, match="rewards are not finite"):
        tabular.value_iteration(dataclasses.replace(mdp, rewards=mdp.rewards / 0), DISCOUNT)
