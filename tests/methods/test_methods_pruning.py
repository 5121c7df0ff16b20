"""Pruned weights: which ones, when, and that they stay at zero whatever the optimizer does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import check_trains
from made_up import made, steps_of_agents

from fmjax.methods.pruning import (
    apply_masks,
    cubic,
    gradually,
    lottery,
    magnitude_masks,
    masked,
    masks_of,
    n_of_m_masks,
    sparsity_of,
)
from fmjax.methods.quantization import is_float, quantize
from fmjax.tasks import sequence_classification
from fmjax.tree import flatten, stack_layers, unstack_layers


def weights(seed=0, dtype=jnp.float32):
    draw = np.random.default_rng(seed)
    layer = lambda scale: {"kernel": jnp.asarray(scale * draw.normal(size=(8, 5)), dtype)}  # noqa: E731
    return {
        "params": {
            "layers_0": {"up": layer(1.0), "norm": {"bias": jnp.ones(5, dtype)}},
            "layers_1": {"up": layer(3.0), "norm": {"bias": jnp.ones(5, dtype)}},
            "head": layer(0.1),
        }
    }


KERNELS = ("params/layers_0/up/kernel", "params/layers_1/up/kernel")


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "sparsity", [pytest.param(0.0, marks=slow), 0.5, pytest.param(0.81, marks=slow)]
)
def test_the_smallest_are_pruned(sparsity):
    variables = weights()
    flat = flatten(variables)
    sizes = np.concatenate([np.abs(flat[path]).ravel() for path in KERNELS])
    together = flatten(magnitude_masks(variables, sparsity))
    assert [*together] == [*KERNELS]  # neither the head nor biases
    count = round(sparsity * 80)
    limit = np.sort(sizes)[count]
    for path in KERNELS:
        np.testing.assert_array_equal(together[path], np.abs(flat[path]) >= limit)
    assert sparsity_of(magnitude_masks(variables, sparsity)) == pytest.approx(count / 80)
    own = flatten(magnitude_masks(variables, sparsity, scope="layer"))
    for path in KERNELS:
        limit = np.sort(np.abs(flat[path]).ravel())[round(sparsity * 40)]
        np.testing.assert_array_equal(own[path], np.abs(flat[path]) >= limit)
    if sparsity == 0.5:  # scanned layers have thresholds of their own, too
        stacked = magnitude_masks(stack_layers(variables), sparsity, scope="layer")
        np.testing.assert_array_equal(
            flatten(stacked)["params/layers/up/kernel"], np.stack([own[path] for path in KERNELS])
        )
        assert not np.array_equal(own[KERNELS[0]], together[KERNELS[0]])


def test_equal_magnitudes_go_together():
    variables = {"params": {"a": {"kernel": jnp.array([[0.0, 0.0, 0.0], [1.0, -1.0, 2.0]])}}}
    for sparsity, kept in ((0.0, 6), (1 / 6, 3), (0.5, 3), (4 / 6, 1)):
        masks = magnitude_masks(variables, sparsity)
        assert int(flatten(masks)["params/a/kernel"].sum()) == kept


def test_two_of_four():
    column = jnp.array([[1.0, -3.0, 2.0, 0.5, 1.0, 1.0, 1.0, 0.0]]).T
    variables = {"params": {"a": {"kernel": jnp.concatenate([column, column[::-1]], 1)}}}
    mask = np.asarray(flatten(n_of_m_masks(variables))["params/a/kernel"])
    np.testing.assert_array_equal(mask[:, 0], [0, 1, 1, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(mask[:, 1], [0, 1, 1, 0, 0, 1, 1, 0])
    every = flatten(n_of_m_masks(weights(), 1, 2))
    for path in KERNELS:
        np.testing.assert_array_equal(every[path].reshape(4, 2, 5).sum(1), 1)


def test_cubic_schedule():
    """Zhu & Gupta 2017, eq. 1, by hand: s_f + (s_i - s_f) (1 - (t - t_0) / (n Delta t))^3."""
    schedule = cubic(0.8, steps=100, begin=10, initial=0.2)
    given = [0, 9, 10, 60, 110, 500]
    expected = [0.0, 0.0, 0.2, 0.8 - 0.6 * 0.125, 0.8, 0.8]
    np.testing.assert_allclose([float(schedule(jnp.int32(t))) for t in given], expected, rtol=1e-6)


def run(tx, variables, steps):
    """Steps of random gradients; every step's variables and the last state."""
    state = tx.init(variables)

    @jax.jit
    def step(variables, state, key):
        keys = jax.random.split(key, len(flatten(variables)))
        leaves, tree = jax.tree.flatten(variables)
        grads = tree.unflatten(
            [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        )
        updates, state = tx.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state

    seen = []
    for number in range(steps):
        variables, state = step(variables, state, jax.random.key(number))
        seen.append(variables)
    return seen, state


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=slow)])
def test_pruned_weights_stay_at_zero(dtype):
    """Momentum and averages of gradients from before, decay: the last word is the mask's."""
    variables = weights(dtype=dtype)
    masks = n_of_m_masks(variables)
    tx = masked(optax.chain(optax.trace(0.9), optax.adamw(0.1, weight_decay=0.1)), masks)
    seen, state = run(tx, variables, 3)  # not pruned before: the first step does it
    for step in seen:
        for path, mask in flatten(masks).items():
            leaf = np.asarray(flatten(step)[path], np.float32)
            assert (leaf[~np.asarray(mask)] == 0).all()
            assert (leaf[np.asarray(mask)] != 0).all()
    jax.tree.map(np.testing.assert_array_equal, masks_of(state), masks)


def test_nothing_pruned_is_the_optimizer():
    tx = optax.sgd(0.1, momentum=0.9)
    expected, _ = run(tx, weights(), 2)
    nothing, state = run(gradually(tx, lambda step: jnp.zeros(()), every=1), weights(), 2)
    # XLA fuses the two programs differently: off by 6e-7 of a weight.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), nothing, expected)
    assert sparsity_of(masks_of(state)) == 0.0


def test_ever_more_weights_are_pruned():
    schedule = cubic(0.8, steps=6)
    tx = gradually(optax.sgd(0.05, momentum=0.9), schedule, every=2, until=7)
    seen, state = run(tx, weights(), 9)
    before = np.zeros(80, bool)
    for number, variables in enumerate(seen, start=1):
        zero = np.concatenate([np.asarray(flatten(variables)[p]).ravel() == 0 for p in KERNELS])
        share = float(schedule(jnp.int32(min(number - number % 2, 6))))
        assert zero.sum() == round(share * 80), number
        assert zero[before].all()
        before = zero
    assert sparsity_of(masks_of(state)) == pytest.approx(0.8)
    assert (np.asarray(flatten(seen[-1])["params/head/kernel"]) != 0).all()


def test_the_lottery_rewinds():
    early = weights()
    given = []

    def train(variables, masks):
        given.append((variables, masks))
        moved = jax.tree.map(lambda x, y: x + 0.5 * y, variables, weights(seed=1))
        return apply_masks(moved, masks)

    tickets = lottery(train, early, share=0.5, rounds=3)
    jax.tree.map(np.testing.assert_array_equal, given[0][0], early)
    assert [sparsity_of(masks) for _, masks in given] == [0.0, 0.5, 0.75]
    for number, ticket in enumerate(tickets, start=1):
        assert sparsity_of(ticket.masks) == pytest.approx(1 - 0.5**number)
        jax.tree.map(
            np.testing.assert_array_equal, ticket.variables, apply_masks(early, ticket.masks)
        )
    for path in KERNELS:  # by the trained weights of the layer, not by the early ones
        trained = np.abs(flatten(early)[path] + 0.5 * flatten(weights(seed=1))[path])
        first = flatten(tickets[0].masks)[path]
        np.testing.assert_array_equal(first, trained >= np.sort(trained.ravel())[20])


@slow
def test_checkpoints_keep_masks_and_integers(tmp_path):
    """Half of a run, saved and restored, ends bitwise as the whole: masks of the optimizer's state
    beside frozen integers."""
    model, variables = made("mlp", "classification")
    seen = steps_of_agents()
    kept = quantize(variables, bits=8, targets=("params/dense_0/kernel",))
    trains = is_float(kept)
    tx = gradually(optax.adam(0.1), cubic(0.5, steps=6), every=2, targets=("*/kernel",), but=())
    state, _ = check_trains(
        kept,
        sequence_classification.loss(model),
        tx,
        {
            "features": seen["observations"],
            "labels": (seen["observations"].sum(axis=1) > 0).astype(np.int32),
            "weight": seen["weight"],
        },
        is_trainable=trains,
        folder=tmp_path,
    )
    assert sparsity_of(masks_of(state.opt_state)) == 0.5
    assert not trains("params/dense_0/kernel")


def test_refusals():
    variables = weights()
    for make, said in (
        (lambda: magnitude_masks(variables, 1.0), "below 1"),
        (lambda: magnitude_masks(variables, 0.5, scope="all"), "scope is 'all'"),
        (lambda: magnitude_masks(variables, 0.5, targets=("*/bias",)), "no matrix"),
        (lambda: magnitude_masks(variables, 0.5, targets=("x",)), "matches no leaf"),
        (lambda: n_of_m_masks(variables, 3, 2), "n=3 must be 1 to m=2"),
        (lambda: n_of_m_masks(variables, 2, 3), "no multiple of m=3"),
        (lambda: cubic(1.0, steps=3), "final=1.0"),
        (lambda: gradually(optax.sgd(1.0), cubic(0.5, steps=1), every=0), "every=0"),
        (lambda: masked(optax.sgd(1.0), magnitude_masks(variables, 0.5)).init({}), "no leaf that"),
        (lambda: masks_of(optax.sgd(1.0).init(variables)), "prunes 0 times"),
        (lambda: lottery(lambda v, m: v, variables, share=1.0, rounds=1), "share=1.0"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
    assert flatten(unstack_layers(stack_layers(variables))).keys() == flatten(variables).keys()
