"""DQN and its replay: hand computations, frequencies, ends of episodes, resuming."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import check_trains

import fmjax
from fmjax.environments import Maze, Vectorised
from fmjax.methods import dqn, replay
from fmjax.methods.policies import dueling, network, shared_actor_critic
from fmjax.methods.rollouts import Trajectory
from fmjax.models import cnn, mlp
from fmjax.train import accumulate, gradient, init_state, make_train_step
from fmjax.train.checkpoint import Checkpoints
from fmjax.train.loop import Memory
from fmjax.tree import merge


def table(variables, observations):
    """Q-values that are looked up: what a hand computes with."""
    return variables["params"]["table"][observations]


def lookup(size=5):
    rng = np.random.default_rng(0)
    variables = {"params": {"table": jnp.asarray(rng.normal(size=(size, 2)), jnp.float32)}}
    variables = dqn.with_target(variables, 4)
    target = jnp.asarray(rng.normal(size=(size, 2)), jnp.float32)
    # One update done: the period's copy is not due.
    counts = variables["temporal_difference"] | {"updates": jnp.int32(1)}
    return variables | {"target": {"table": target}, "temporal_difference": counts}


BATCH = {
    "observations": np.array([0, 1, 2, 3]),
    "actions": np.array([0, 1, 1, 0]),
    "rewards": np.array([1.0, -2.0, 0.5, 9.0], np.float32),
    # The second terminated; the third was cut off, and counts what follows.
    "discounts": np.array([0.9, 0.0, 0.81, 0.9], np.float32),
    "next_observations": np.array([1, 4, 3, 0]),
    "importance": np.array([1.0, 0.5, 0.25, 1.0], np.float32),
    "weight": np.array([1.0, 1.0, 1.0, 0.0], np.float32),
}


@pytest.mark.parametrize("double", [True, False])
def test_the_loss_equals_a_hand_computation(double):
    variables = lookup()
    online, target = (np.asarray(variables[name]["table"]) for name in ("params", "target"))
    loss, aux = dqn.loss(table, double=double, period=10)(variables, BATCH, None)
    errors, losses = [], []
    for i in range(4):
        after = BATCH["next_observations"][i]
        best = online[after].argmax() if double else target[after].argmax()
        wanted = BATCH["rewards"][i] + BATCH["discounts"][i] * target[after, best]
        error = wanted - online[BATCH["observations"][i], BATCH["actions"][i]]
        size = abs(error)
        errors.append(error)
        losses.append(BATCH["importance"][i] * (0.5 * size**2 if size <= 1 else size - 0.5))
    np.testing.assert_allclose(loss, np.mean(losses[:3]), rtol=1e-5)
    found = aux.updates["temporal_difference"]["errors"]
    np.testing.assert_allclose(found, errors, rtol=1e-5)
    assert float(aux.weight) == 3.0
    assert (online[1].argmax(), online[3].argmax(), online[0].argmax()) != (
        target[1].argmax(), target[3].argmax(), target[0].argmax(),
    )  # fmt: skip
    # Nothing flows through the target, and what follows a termination may be anything.
    grads = jax.grad(
        lambda v: dqn.loss(table, double=double, period=10)(v, BATCH, None)[0], allow_int=True
    )(variables)
    assert not np.asarray(grads["target"]["table"]).any()
    assert not np.asarray(grads["params"]["table"])[4].any()
    variables["target"]["table"] = variables["target"]["table"].at[4].set(jnp.nan)
    again, _ = dqn.loss(table, double=double, period=10)(variables, BATCH, None)
    np.testing.assert_array_equal(again, loss)


def test_the_target_follows():
    """Every third step it is what the weights then are; or it moves by a share of the way."""
    variables, tx = lookup(), optax.sgd(0.1)
    first = np.asarray(variables["target"]["table"])
    for options in ({"period": 3}, {"polyak": 0.25}):
        state = init_state(jax.tree.map(jnp.copy, variables), tx, jax.random.key(0))
        step = jax.jit(make_train_step(gradient(dqn.loss(table, **options)), tx))
        targets, weights = [first], []
        for _ in range(5):
            weights.append(np.asarray(state.trainable["params"]["table"]))
            state, _ = step(state, BATCH)
            targets.append(np.asarray(state.non_trainable["target"]["table"]))
        if "period" in options:  # steps number 1, 2, 3, 4, 5
            for number, wanted in enumerate((first, first, weights[2], weights[2], weights[2])):
                np.testing.assert_array_equal(targets[number + 1], wanted)
        else:
            for old, new, weight in zip(targets, targets[1:], weights, strict=False):
                np.testing.assert_allclose(new, old + 0.25 * (weight - old), rtol=1e-5)
        assert not np.array_equal(weights[2], weights[3])


@pytest.mark.slow
def test_a_perceptron_learns_as_any_loss(tmp_path):
    """check_trains' conditions with frozen targets; dueling streams; pixels; weights beside."""
    model, variables = fmjax.create(
        "mlp", mlp.Config(num_features=3, hidden_sizes=(8,)), head="classification",
        num_labels=3, rng=jax.random.key(0),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    batch = BATCH | {
        name: rng.normal(size=(4, 3)).astype(np.float32)
        for name in ("observations", "next_observations")
    }
    q_values = dueling(shared_actor_critic(model))
    values = q_values(variables, jnp.asarray(batch["observations"]))
    raw = model.apply(variables, batch["observations"]).logits
    np.testing.assert_allclose(values.mean(-1), raw[:, -1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        values[:, 0] - values[:, 1], raw[:, 0] - raw[:, 1], rtol=1e-4, atol=1e-6
    )
    state, _ = check_trains(
        dqn.with_target(variables, 4), dqn.loss(q_values, polyak=1e-3), optax.adam(1e-2), batch,
        changes=("target/", "temporal_difference/"), folder=tmp_path,
    )  # fmt: skip
    assert int(state.non_trainable["temporal_difference"]["updates"]) == 8


@pytest.mark.slow  # another network in the same loss
def test_pixels_go_through_the_cnn():
    model, variables = fmjax.create(
        "cnn", cnn.VARIANTS["tiny"], head="image_classification", num_labels=2,
        rng=jax.random.key(0),
    )  # fmt: skip
    pixels = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    batch = BATCH | {"observations": pixels, "next_observations": pixels[::-1].copy()}
    loss = dqn.loss(network(model), period=100)
    check_trains(
        dqn.with_target(variables, 4), loss, optax.adam(1e-2), batch,
        changes=("target/", "temporal_difference/"),
    )  # fmt: skip


def test_frequencies_equal_priorities():
    rows = {"number": jnp.arange(6)}
    store = replay.add(replay.empty(rows, 8), rows)  # two places are not filled
    store = replay.reprioritise(store, jnp.arange(6), jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, 0.0]))
    draws = jax.vmap(lambda rng: replay.sample(store, rng, 4, exponent=0.5, beta=0.7))(
        jax.random.split(jax.random.key(0), 5_000)
    )
    places, found = draws
    np.testing.assert_array_equal(found["number"], places)
    share = np.bincount(np.asarray(places).ravel(), minlength=8) / places.size
    wanted = np.sqrt(np.array([1, 2, 3, 4, 5, 1e-6, 0, 0]))
    wanted /= wanted.sum()
    # Five standard deviations of independent draws; draws from strata scatter less.
    np.testing.assert_allclose(share, wanted, atol=5 * np.sqrt(0.25 / places.size))
    raw = (6 * wanted[np.asarray(places)]) ** -0.7
    np.testing.assert_allclose(
        found["importance"], raw / raw.max(1, keepdims=True), rtol=1e-4
    )  # fmt: skip
    uniform, _ = replay.sample(store, jax.random.key(0), 6, exponent=0.0)
    np.testing.assert_array_equal(np.sort(uniform), np.arange(6))  # one from each sixth


def test_the_oldest_are_written_over():
    rows = {"number": jnp.arange(3)}
    store = replay.empty(rows, 7)
    for first in (0, 3, 6):
        store = replay.add(store, {"number": first + jnp.arange(3)})
    store = replay.add(store, {"number": jnp.full(3, 99)}, counts=jnp.array(False))
    np.testing.assert_array_equal(store.rows["number"], [7, 8, 2, 3, 4, 5, 6])
    assert (int(store.added), int(store.filled)) == (9, 7)
    store = replay.reprioritise(store, jnp.array([0]), jnp.array([-5.0]))
    store = replay.add(store, {"number": jnp.full(3, 10)})
    np.testing.assert_allclose(store.priorities, [5, 1, 5, 5, 5, 1, 1], rtol=1e-5)


def test_returns_of_several_steps():
    """Four worlds in a window of three steps: going on, terminated, cut off, at the last step."""
    rewards = jnp.array([[1.0, 1, 1, 1], [2, 2, 2, 2], [4, 4, 4, 4]])
    flags = np.zeros((2, 3, 4), bool)
    flags[0, 1, 1] = flags[1, 0, 2] = flags[0, 2, 3] = True
    numbers = jnp.arange(12).reshape(3, 4)
    window = Trajectory(
        numbers, numbers, rewards, jnp.asarray(flags[0]), jnp.asarray(flags[1]), 100 + numbers
    )
    rows = replay.several_steps(window, 0.5)
    np.testing.assert_allclose(rows["rewards"], [3, 2, 1, 3])
    np.testing.assert_allclose(rows["discounts"], [0.125, 0, 0.5, 0])
    np.testing.assert_array_equal(rows["next_observations"], [108, 105, 102, 111])
    np.testing.assert_array_equal(rows["observations"], [0, 1, 2, 3])


@pytest.fixture(scope="module")
def corridor():
    """An agent in a corridor, its iteration of 60 steps, and its network."""
    environment = Vectorised(Maze("S...G").environment(max_steps=12), 4)
    options = dqn.Settings(
        epsilon=optax.linear_schedule(1.0, 0.1, 200), discount=0.9, num_steps=2, capacity=300,
        batch_size=16, warm_up=60, priority_exponent=0.6,
    )  # fmt: skip
    config = mlp.Config(num_features=5, hidden_sizes=(), id2label=("up", "right", "down", "left"))
    model, variables = fmjax.create("mlp", config, head="classification", rng=jax.random.key(0))
    q_values = network(model)
    tx = optax.adam(optax.linear_schedule(0.1, 0.0, 850))
    step = make_train_step(gradient(dqn.loss(q_values, period=20)), tx)
    train = init_state(dqn.with_target(variables, 16), tx, jax.random.key(1))
    agent = dqn.agent(environment, train, options, jax.random.key(2))
    return agent, jax.jit(dqn.iteration(environment, q_values, step, options, 150)), q_values


@pytest.mark.slow
def test_the_agent_learns_the_optimal_values(corridor):
    agent, iteration, q_values = corridor
    returns = []
    for _ in range(6):
        agent, metrics = iteration(agent)
        returns.append(float(metrics["episode_return"].value))
    variables = merge(agent.train.trainable, agent.train.non_trainable)
    values = q_values(variables, jnp.eye(5)[:4])
    np.testing.assert_array_equal(values.argmax(-1), 1)  # to the right
    # -1 a step, discounted, over 4, 3, 2 and 1 of them.
    wanted = -(1 - 0.9 ** np.arange(4, 0, -1)) / 0.1
    np.testing.assert_allclose(values.max(-1), wanted, atol=0.15)
    assert returns[-1] > returns[0]
    assert int(agent.train.step) > 800


def test_the_agent_resumes_bitwise(corridor, tmp_path):
    agent, iteration, _ = corridor
    half, _ = iteration(agent)
    with Checkpoints(tmp_path, settings={}) as checkpoints:
        checkpoints.save(half, {}, Memory())
    whole, _ = iteration(half)
    with Checkpoints(tmp_path, settings={}) as checkpoints:
        restored = checkpoints.restore_last(half)
    again, _ = iteration(restored.state)
    for part in ("train", "worlds", "window", "replay"):
        leaves = (jax.tree.leaves(getattr(state, part)) for state in (again, whole))
        for found, wanted in zip(*leaves, strict=True):
            if not jax.dtypes.issubdtype(found.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(found, wanted, err_msg=part)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="give one of the two") as error:
        dqn.loss(table, delta=0.0)
    assert "delta=0.0 must be positive" in str(error.value)
    with pytest.raises(ValueError, match="period=0"):
        dqn.loss(table, period=0)
    with pytest.raises(ValueError, match="polyak=2"):
        dqn.loss(table, polyak=2.0)
    loss = dqn.loss(table, period=5)
    with pytest.raises(ValueError, match="make them by with_target"):
        loss({"params": lookup()["params"]}, BATCH, None)
    state = init_state(lookup(), optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(ValueError, match="a batch in one piece"):
        make_train_step(accumulate(gradient(loss), 2), optax.sgd(0.1))(state, BATCH)
    with pytest.raises(ValueError, match="never reached with capacity=10") as error:
        dqn.Settings(epsilon=lambda step: 0.1, capacity=10, num_steps=0, discount=2.0)
    assert "num_steps=0" in str(error.value)
    assert "discount=2.0" in str(error.value)
    with pytest.raises(ValueError, match="give more"):
        replay.empty({"x": jnp.zeros(5)}, 4)
