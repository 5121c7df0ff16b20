"""REINFORCE and PPO: hand computations, where they are the same, learning, resuming."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import check_trains

import fmjax
from fmjax.environments import CartPole, GymnasiumVector, Maze, Vectorised
from fmjax.methods import ppo, reinforce
from fmjax.methods.advantages import discounted_returns
from fmjax.methods.policies import actor_critic, log_probability
from fmjax.methods.rollouts import advantages_of, begin, collect, first_returns, learner
from fmjax.models import mlp
from fmjax.train import accumulate, gradient, init_state, make_train_step
from fmjax.train.checkpoint import Checkpoints
from fmjax.train.loop import Memory
from fmjax.tree import together

ACTIONS = ("up", "right", "down", "left")


def networks(features, actions=ACTIONS, hidden=(8,)):
    """An actor and a critic, and their variables."""
    config = mlp.Config(num_features=features, hidden_sizes=hidden, id2label=actions)
    actor, first = fmjax.create("mlp", config, head="classification", rng=jax.random.key(0))
    critic, second = fmjax.create(
        "mlp", config, head="classification", num_labels=("value",), rng=jax.random.key(1)
    )
    return actor_critic(actor, critic), together(policy=first, value=second)


@pytest.fixture(scope="module")
def case():
    """A policy, its variables, and a batch of what it did; the last two rows are padding."""
    policy, variables = networks(3)
    rng = np.random.default_rng(0)
    observations = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    actions = jnp.asarray(rng.integers(0, 4, 8))
    logits, values = policy(variables, observations)
    returns = jnp.asarray(rng.normal(size=8), jnp.float32)
    batch = {
        "observations": observations.at[6:].set(jnp.nan),
        "actions": actions,
        "returns": returns,
        "advantages": returns - values,
        "values": values,
        "log_probabilities": log_probability(logits, actions),
        "weight": jnp.array([1.0] * 6 + [0.0] * 2),
    }
    return policy, variables, batch


def test_ppo_at_ratio_one_has_the_gradient_of_reinforce(case):
    """Before the first update the surrogate's gradient is the policy gradient."""
    policy, variables, batch = case
    batch = batch | {"observations": jnp.nan_to_num(batch["observations"])}
    options = {"value_coefficient": 0.7, "entropy_coefficient": 0.1, "normalise": False}

    def grads(loss):
        return jax.jit(jax.grad(lambda v: loss(v, batch, None)[0]))(variables)

    chex.assert_trees_all_close(
        grads(ppo.loss(policy, **options)), grads(reinforce.loss(policy, **options)),
        rtol=1e-5, atol=1e-7,
    )  # fmt: skip
    normalised = options | {"normalise": True}
    chex.assert_trees_all_close(
        grads(ppo.loss(policy, **normalised)), grads(reinforce.loss(policy, **normalised)),
        rtol=1e-5, atol=1e-7,
    )  # fmt: skip


def test_losses_equal_hand_computations(case):
    policy, variables, batch = case
    real = slice(0, 6)
    logits, values = policy(variables, batch["observations"][real])
    moved = {**batch, "log_probabilities": batch["log_probabilities"] + jnp.linspace(-1, 1, 8)}
    moved["values"] = batch["values"] + jnp.linspace(-1, 1, 8)
    loss, aux = ppo.loss(
        policy, value_clip=0.3, entropy_coefficient=0.1, normalise=False
    )(variables, moved, None)  # fmt: skip
    p = np.exp(np.asarray(jax.nn.log_softmax(logits), np.float64))
    now = np.log(p[np.arange(6), np.asarray(batch["actions"])[real]])
    ratio = np.exp(now - np.asarray(moved["log_probabilities"])[real])
    advantage, returns = (np.asarray(batch[k])[real] for k in ("advantages", "returns"))
    actor = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    old = np.asarray(moved["values"])[real]
    near = old + np.clip(np.asarray(values) - old, -0.3, 0.3)
    critic = np.maximum((np.asarray(values) - returns) ** 2, (near - returns) ** 2) / 2
    spread = -(p * np.log(p)).sum(-1)
    wanted = actor.mean() + 0.5 * critic.mean() - 0.1 * spread.mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(
        aux.metrics["clipped"].value, (np.abs(ratio - 1) > 0.2).mean(), rtol=1e-6
    )
    loss, _ = reinforce.loss(policy, baseline=False)(variables, batch, None)
    np.testing.assert_allclose(loss, -(now * returns).mean(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "reinforce in pieces"])
def test_losses_train_as_any(case, name):
    """Standardised advantages are of a whole batch; without them its pieces may be accumulated.

    A baseline that learns moves REINFORCE's loss itself: without one it falls.
    """
    policy, variables, batch = case
    batch = batch | {"observations": jnp.nan_to_num(batch["observations"])}
    if name == "ppo":
        loss, pieces = ppo.loss(policy, value_coefficient=1.0), 1
    else:
        batch["returns"] = jnp.abs(batch["returns"])
        loss, pieces = reinforce.loss(policy, baseline=False), 2
    check_trains(
        variables, loss, optax.adam(1e-2), batch, steps=20,
        differentiate=lambda loss: accumulate(gradient(loss), pieces),
    )  # fmt: skip


def test_advantages_of_a_trajectory():
    """Ends and cuts in a real environment, against a loop over its episodes."""
    environment = Vectorised(CartPole(max_steps=15), 3)

    def act(observations, rng):
        return jnp.where(jnp.arange(3) == 0, 1, (observations[:, 2] > 0)).astype(jnp.int32)

    def value(x):
        return jnp.sin(x).sum(-1)

    worlds = begin(environment, jax.random.key(0))
    _, done, episodes = jax.jit(
        lambda worlds: collect(environment, act, worlds, jax.random.key(1), 40)
    )(worlds)
    assert done.terminated.any()
    assert (done.truncated & ~done.terminated).any()
    ends = np.asarray(~done.continues)
    assert float(episodes["episode_length"].weight) == ends.sum()
    found = advantages_of(done, value(done.observations), value(done.final_observations), 0.9, 0.8)
    values, after = (np.asarray(value(x)) for x in (done.observations, done.final_observations))
    for b in range(3):
        following = 0.0
        for t in reversed(range(40)):
            rest = 0.0 if done.terminated[t, b] else 0.9 * after[t, b]
            following = 1.0 + rest - values[t, b] + (0.0 if ends[t, b] else 0.72 * following)
            np.testing.assert_allclose(found[t, b], following, rtol=1e-4, atol=1e-4)


CORRIDOR = Vectorised(Maze("S...G").environment(max_steps=20), 8)


@pytest.fixture(scope="module")
def ppo_corridor():
    policy, variables = networks(5, hidden=())
    tx = optax.adam(0.03)
    step = make_train_step(gradient(ppo.loss(policy)), tx)
    start = learner(CORRIDOR, init_state(variables, tx, jax.random.key(0)), jax.random.key(1))
    options = ppo.Settings(steps=32, epochs=3, minibatches=4)
    return policy, start, jax.jit(ppo.iteration(CORRIDOR, policy, step, options))


def test_ppo_finds_the_goal_and_resumes_bitwise(ppo_corridor, tmp_path):
    policy, state, iteration = ppo_corridor
    returns, half = [], None
    for number in range(16):
        if number == 12:
            half = state
        state, metrics = iteration(state)
        returns.append(float(metrics["episode_return"].value))
    assert returns[0] < -10
    assert returns[-1] > -5  # the shortest path has 4 steps
    assert int(state.train.step) == 16 * 12
    with Checkpoints(tmp_path, settings={}) as checkpoints:
        checkpoints.save(half, {}, Memory())
        again = checkpoints.restore_last(half).state
    for _ in range(4):
        again, _ = iteration(again)
    chex.assert_trees_all_equal(again.train.trainable, state.train.trainable)
    chex.assert_trees_all_equal(again.worlds, state.worlds)

    def act(observations, rng):
        return policy(state.train.trainable, observations)[0].argmax(-1)

    judged = first_returns(CORRIDOR, act, jax.random.key(3), 20)
    np.testing.assert_array_equal(judged, -4.0)
    cut = first_returns(CORRIDOR, lambda x, rng: jnp.zeros(8, jnp.int32), jax.random.key(3), 10)
    assert np.isnan(cut).all()


@pytest.mark.slow  # the smoke test of experiments runs the same program
def test_reinforce_finds_the_goal():
    policy, variables = networks(5, hidden=())
    tx = optax.adam(0.1)
    step = make_train_step(gradient(reinforce.loss(policy, normalise=True)), tx)
    state = learner(CORRIDOR, init_state(variables, tx, jax.random.key(0)), jax.random.key(1))
    iteration = jax.jit(reinforce.iteration(CORRIDOR, policy, step, steps=20))
    returns = []
    for _ in range(40):
        state, metrics = iteration(state)
        returns.append(float(metrics["episode_return"].value))
    assert returns[0] < -10
    assert returns[-1] > -5


@pytest.mark.slow  # the adapter and the agent have each their own tests
def test_the_same_agent_runs_on_gymnasium():
    """PPO's one compiled program, whose worlds live in Python."""
    pytest.importorskip("gymnasium")
    environment = GymnasiumVector.make("CartPole-v1", 4)
    policy, variables = networks(4, ("left", "right"))
    tx = optax.adam(1e-3)
    step = make_train_step(gradient(ppo.loss(policy)), tx)
    state = learner(environment, init_state(variables, tx, jax.random.key(0)), jax.random.key(1))
    options = ppo.Settings(steps=64, epochs=1, minibatches=2)
    state, metrics = jax.jit(ppo.iteration(environment, policy, step, options))(state)
    assert int(state.worlds.state) == 64
    length = metrics["episode_length"]
    assert 8 < float(length.value) < 60
    assert float(length.value) == pytest.approx(float(metrics["episode_return"].value))


def test_what_does_not_fit_is_refused(case):
    policy, _, _ = case
    with pytest.raises(ValueError, match="must not be negative"):
        reinforce.loss(policy, entropy_coefficient=-1.0)
    with pytest.raises(ValueError, match="must be positive"):
        ppo.loss(policy, clip=0.0)
    with pytest.raises(ValueError, match=r"decay=1.5 must be from 0 to 1"):
        ppo.Settings(decay=1.5)
    with pytest.raises(ValueError, match="do not divide into minibatches=7"):
        ppo.iteration(CORRIDOR, policy, None, ppo.Settings(minibatches=7))  # pyright: ignore
    actor, _ = fmjax.create("mlp", "tiny", head="classification", rng=jax.random.key(0))
    both = actor_critic(actor, actor)
    _, variables = networks(4, ("left", "right"), hidden=(8, 6))
    variables["params"]["value"] = variables["params"]["policy"]
    with pytest.raises(ValueError, match="it must have one"):
        both(variables, jnp.zeros((1, 4)))


@pytest.mark.parametrize(("bootstrap", "last"), [(True, 101.0), (False, 1.0)])
def test_a_critic_that_does_not_train_is_left_out(bootstrap, last):
    """The returns of three steps of episodes that go on."""

    def policy(variables, observations):
        size = observations.shape[:1]
        return jnp.zeros((*size, 2)), jnp.full(size, 100.0)

    def step(state, batch):
        return state, {"returns": batch["returns"]}

    worlds = Vectorised(CartPole(), 2)
    state = init_state({"params": {"x": jnp.zeros(1)}}, optax.sgd(0.1), jax.random.key(0))
    start = learner(worlds, state, jax.random.key(1))
    options = {"steps": 3, "discount": 1.0, "bootstrap": bootstrap}
    _, metrics = jax.jit(reinforce.iteration(worlds, policy, step, **options))(start)
    expected = last + np.array([[2.0], [1.0], [0.0]]) + np.zeros((3, 2))
    np.testing.assert_allclose(metrics["returns"].reshape(3, 2), expected, rtol=1e-6)


def test_returns_are_rewards_to_go():
    np.testing.assert_allclose(
        discounted_returns(jnp.ones((4, 1)), jnp.full((4, 1), 0.5)),
        [[1.875], [1.75], [1.5], [1.0]],
    )
