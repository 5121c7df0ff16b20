"""Ensembles: members side by side as alone, uncertainties and weights by hand."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from made_up import made, pictures
from scipy import optimize, special

from fmjax.data.batches import batches
from fmjax.data.columns import Columns
from fmjax.data.side_by_side import SideBySide
from fmjax.methods import lora
from fmjax.methods.adapted_layers import is_adapter
from fmjax.methods.adversarial import attacked, fgsm
from fmjax.methods.ensembles import (
    dropout_log_probabilities,
    greedy_weights,
    log_probabilities,
    mean_log_probabilities,
    member_state,
    member_states,
    member_step,
    of_members,
    own_batch,
    stacking_weights,
    uncertainty,
)
from fmjax.tasks import sequence_classification as task
from fmjax.train import fit, gradient, init_state, jit_step, make_train_step
from fmjax.tree import merge

MODEL, VARIABLES = made("mlp", "classification")
TX = optax.adam(0.05)
STEP = make_train_step(gradient(task.loss(MODEL)), TX)


def rows():
    draw = np.random.default_rng(0)
    features = draw.normal(size=(20, 3)).astype(np.float32)
    return Columns((), {"features": features, "labels": (features[:, 0] > 0).astype(np.int32)})


def state_of(rng):
    return init_state(MODEL.init(rng, jnp.zeros((1, 3))), TX, rng)


def begin(make, keys):
    return jax.jit(lambda keys: member_states(make, keys))(keys)


@pytest.mark.parametrize(
    "at_once",
    [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (None, 2))],  # audits have None
)
def test_members_of_own_weights_and_orders_train_as_alone(at_once):
    keys = jax.random.split(jax.random.key(1), 3)
    streams = lambda: [batches(rows(), batch_size=8, seed=k, prefetch=0) for k in range(3)]  # noqa: E731
    step = jit_step(chex.assert_max_traces(member_step(STEP, see=own_batch, at_once=at_once), 1))
    chex.clear_trace_counter()
    states = fit(begin(state_of, keys), step, SideBySide(streams()), steps=4)
    assert int(states.step) == 4
    batch = next(streams()[0])
    predict = jax.jit(log_probabilities(MODEL))
    of_all = of_members(log_probabilities(MODEL), axis=-2, at_once=at_once)
    together = jax.jit(of_all)(states, batch)
    assert together.shape == (8, 3, 2)
    alone_step, alone_state = jax.jit(STEP), jax.jit(state_of)
    for number, stream in enumerate(streams()):
        state = alone_state(keys[number])
        for _ in range(4):
            state, _ = alone_step(state, next(stream))
        one = member_state(states, number)
        chex.assert_trees_all_close(one.trainable, state.trainable, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(one.opt_state, state.opt_state, rtol=1e-5, atol=1e-6)
        alone = predict(merge(state.trainable, state.non_trainable), batch)
        np.testing.assert_allclose(together[:, number], alone, rtol=1e-4, atol=1e-6)


def test_adapters_of_one_base_are_an_ensemble():
    """The base is there once and stays; metrics are means over members."""
    step = make_train_step(gradient(task.loss(MODEL)), TX)

    def make(rng):
        return init_state(
            lora.add(VARIABLES, rng, rank=2, alpha=8.0, targets=("*",)), TX, rng, is_adapter
        )

    states = begin(make, jax.random.split(jax.random.key(2), 3))
    chex.assert_trees_all_equal(states.non_trainable["params"], VARIABLES["params"])
    batch = next(batches(rows(), batch_size=16, prefetch=0))
    together, losses = jax.jit(member_step(step)), []
    for _ in range(12):
        states, metrics = together(states, batch)
        losses.append(float(metrics["loss"].value))
    assert float(metrics["loss"].weight) == 3 * 16
    assert losses[-1] < 0.7 * losses[0]
    chex.assert_trees_all_equal(states.non_trainable["params"], VARIABLES["params"])
    kernels = states.trainable["adapters"]
    assert all((leaf[0] != leaf[1]).any() for leaf in jax.tree.leaves(kernels) if leaf.ndim == 3)


@pytest.mark.slow
def test_members_train_on_attacks_as_published():
    """Lakshminarayanan et al. 2017, section 2.3: a step of the sign of the gradient."""
    model, _ = made("cnn", "image_classification")
    attack = fgsm(task.loss(model, train=False), epsilon=0.02, low=0.0, high=1.0)
    step = jax.jit(
        member_step(make_train_step(gradient(attacked(task.loss(model), attack)), TX), at_once=1)
    )

    def make(rng):
        return init_state(model.init(rng, jnp.zeros((1, 8, 8, 1))), TX, rng)

    states, losses = begin(make, jax.random.split(jax.random.key(0), 2)), []
    for _ in range(8):
        states, metrics = step(states, pictures())
        losses.append(float(metrics["loss"].value))
    assert losses[-1] < 0.9 * losses[0]


def test_a_step_that_moves_what_members_share_is_refused():
    def moves(state, batch):
        count = state.non_trainable["target"]["count"] + 1
        return dataclasses.replace(state, non_trainable={"target": {"count": count}}), {}

    variables = merge(VARIABLES, {"target": {"count": jnp.zeros(())}})
    states = jax.eval_shape(
        lambda keys: member_states(lambda rng: init_state(variables, TX, rng), keys),
        jax.random.split(jax.random.key(0), 2),
    )
    with pytest.raises(ValueError, match="target/count"):
        jax.eval_shape(member_step(moves), states, next(batches(rows(), batch_size=8, prefetch=0)))
    with pytest.raises(ValueError, match="at_once=0"):
        member_step(STEP, at_once=0)
    with pytest.raises(ValueError, match="number=2"):
        member_state(states, 2)


def test_passes_with_dropout_are_drawn_each_with_its_own_key():
    model, variables = made("cnn", "image_classification")
    batch, rng = pictures(), jax.random.key(3)
    drawn = jax.jit(dropout_log_probabilities(model, 3, at_once=1))(variables, batch, rng)
    assert drawn.shape == (8, 3, 10)
    trains = jax.jit(
        lambda key: model.apply(variables, batch["pixel_values"], train=True, rngs={"dropout": key})
    )
    for number, key in enumerate(jax.random.split(rng, 3)[:2]):
        expected = special.log_softmax(trains(key).logits, axis=-1)
        np.testing.assert_allclose(drawn[:, number], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(drawn[:, 0] - drawn[:, 1]).max() > 1e-3


def test_uncertainties_are_those_of_the_definitions():
    draw = np.random.default_rng(0)
    p = special.softmax(draw.normal(size=(9, 4, 3)) * 3, axis=-1)
    p[0], p[1] = [1, 0, 0], [[1, 0, 0], [0, 1, 0]] * 2  # certain, of the same and of different ones
    p[2] = [0.2, 0.3, 0.5]  # all members alike
    unsure = jax.jit(uncertainty)(np.log(p, where=p > 0, out=np.full(p.shape, -np.inf)))
    mixture = p.mean(axis=1)
    total, expected = special.entr(mixture).sum(-1), special.entr(p).sum(-1).mean(-1)
    np.testing.assert_allclose(np.exp(unsure.log_probabilities), mixture, rtol=1e-5)
    np.testing.assert_allclose(unsure.predictive_entropy, total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(unsure.expected_entropy, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(unsure.mutual_information, total - expected, rtol=1e-4, atol=1e-6)
    assert unsure.mutual_information[1] == pytest.approx(np.log(2), rel=1e-6)
    assert unsure.mutual_information[2] < 1e-7
    classes = p.argmax(-1)
    differ = [np.mean([row[i] != row[j] for i in range(4) for j in range(i)]) for row in classes]
    np.testing.assert_allclose(unsure.disagreement, differ, rtol=1e-6)
    two = jax.jit(mean_log_probabilities)(np.log(p[3:]), np.array([0.5, 0.5, 0, 0]))
    np.testing.assert_allclose(np.exp(two), p[3:, :2].mean(axis=1), rtol=1e-5)
    one = jax.jit(uncertainty)(np.log(p[3:, :1]))
    np.testing.assert_array_equal(one.disagreement, 0)


def held_out(members=4, size=200):
    """Members of unequal worth: log-probabilities [N, K, C] and labels."""
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 3, size)
    clear = np.eye(3)[labels][:, None] * np.array([2.0, 1.5, 0.5, -1.0])[:members, None]
    logits = clear + draw.normal(size=(size, members, 3))
    return special.log_softmax(logits, axis=-1), labels


def test_stacking_finds_the_likeliest_weights():
    rows, labels = held_out()
    weights = stacking_weights(rows, labels)
    of_label = np.exp(np.take_along_axis(rows, labels[:, None, None], 2)[:, :, 0])
    best = optimize.minimize(
        lambda w: -np.log(of_label @ w).mean(), np.full(4, 0.25), bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, tol=1e-12,
    )  # fmt: skip
    np.testing.assert_allclose(weights, best.x, atol=2e-3)
    assert -np.log(of_label @ weights).mean() <= best.fun + 1e-6
    assert weights.sum() == pytest.approx(1)
    # One member that is the best for every label gets all.
    sure = np.log(np.array([[[0.9, 0.1], [0.6, 0.4]]] * 5))
    np.testing.assert_allclose(stacking_weights(sure, np.zeros(5, int)), [1, 0], atol=1e-5)


def test_greedy_selection_adds_what_helps_most():
    rows, labels = held_out()
    of_label = np.exp(np.take_along_axis(rows, labels[:, None, None], 2)[:, :, 0])
    chosen, scores = [], []
    for _ in range(6):
        trials = [np.log(of_label[:, [*chosen, k]].mean(axis=1)).mean() for k in range(4)]
        chosen.append(int(np.argmax(trials)))
        scores.append(max(trials))
    best = chosen[: int(np.argmax(scores)) + 1]
    expected = np.bincount(best, minlength=4) / len(best)
    np.testing.assert_allclose(greedy_weights(rows, labels, rounds=6), expected)
    stacked = np.log(of_label @ stacking_weights(rows, labels)).mean()
    many = np.log(of_label @ greedy_weights(rows, labels)).mean()
    assert stacked - 2e-3 < many <= stacked + 1e-6


def test_bad_input_is_named():
    rows, labels = held_out(2, 5)
    with pytest.raises(ValueError, match=r"must be \[N, K, C\] and \[N\]"):
        stacking_weights(rows[:, 0], labels)
    with pytest.raises(ValueError, match=r"from 0 to 2; log_probabilities .* take log_softmax"):
        stacking_weights(rows + 5, labels + 3)
    excluded = np.where(np.arange(3) == labels[:, None, None], -np.inf, rows)
    with pytest.raises(ValueError, match="5 labels have probability 0 for every member"):
        greedy_weights(excluded, labels)
    with pytest.raises(ValueError, match="rounds=0"):
        greedy_weights(rows, labels, rounds=0)
    with pytest.raises(ValueError, match="samples=0"):
        dropout_log_probabilities(MODEL, 0)
    with pytest.raises(ValueError, match="batch normalisation"):
        dropout_log_probabilities(MODEL, 2)(
            merge(VARIABLES, {"batch_stats": {"mean": jnp.zeros(2)}}), {}, jax.random.key(0)
        )
    body, variables = made("mlp", "model")
    with pytest.raises(ValueError, match="no logits"):
        log_probabilities(body)(variables, {"features": np.zeros((1, 3), np.float32)})
