"""Averages and sums of weights, by hand and beside PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from fmjax.methods.averaging import (
    averaged,
    combined,
    cyclical_rate,
    greedy_soup,
    moved,
    task_vector,
    ties,
    track_swa,
    uniform_soup,
    with_statistics,
)
from fmjax.nn.linear import Dense
from fmjax.nn.norm import BatchNorm, FrozenBatchNorm
from fmjax.train import gradient, init_state, jit_step, make_train_step
from fmjax.tree import flatten
from fmjax.types import Aux, Mean

PARAMS = {"params": {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0]], jnp.bfloat16)}}


def squares(variables, batch, rng):
    """Pulls every number towards the batch's target."""
    target = jnp.mean(batch["target"])
    leaves = jax.tree.leaves(variables["params"])
    total = sum(jnp.sum((leaf.astype(jnp.float32) - target) ** 2) for leaf in leaves)
    return total, Aux(jnp.ones(()), {}, {})


@pytest.mark.parametrize(("start", "taken"), [(2, [2, 5, 8]), (0, [0, 3, 6])])
def test_swa_is_the_mean_of_the_weights_at_the_ends_of_cycles(start, taken):
    tx = optax.chain(optax.sgd(0.2), track_swa(start=start, period=3))
    step = jit_step(make_train_step(gradient(squares), tx))
    state = init_state(jax.tree.map(jnp.copy, PARAMS), tx, jax.random.key(0))
    draw, weights = np.random.default_rng(0), [jax.device_get(state.trainable)]
    for number in range(8):
        state, _ = step(state, {"target": draw.normal(size=1).astype(np.float32)})
        weights.append(jax.device_get(state.trainable))
        if number + 1 < start:  # until there is a mean it is the weights
            jax.tree.map(np.testing.assert_array_equal, averaged(state).trainable, weights[-1])
    mean = averaged(state).trainable["params"]
    expected = np.mean([weights[t]["params"]["a"] for t in taken], axis=0)
    np.testing.assert_allclose(mean["a"], expected, rtol=1e-6)
    assert mean["b"].dtype == jnp.bfloat16
    assert int(state.opt_state[1].averaged) == 3


def test_rates_fall_from_high_to_low_in_every_cycle():
    rate = cyclical_rate(lambda count: 1.0 + count, start=2, period=4, high=0.5, low=0.1)
    share = np.array([1, 2, 3, 4]) / 4
    cycle = (1 - share) * 0.5 + share * 0.1  # equation 1
    found = [float(rate(count)) for count in range(10)]
    np.testing.assert_allclose(found, [1, 2, *cycle, *cycle], rtol=1e-6)


class Net(nn.Module):
    """Two normalisations of different momenta, between which a third is constant."""

    @nn.compact
    def __call__(self, x):
        x = BatchNorm(True, momentum=0.1, name="first")(Dense(4, name="dense_1")(x))
        x = FrozenBatchNorm(True, name="constant")(nn.relu(x))
        return BatchNorm(True, momentum=0.01, name="second")(Dense(3, name="dense_2")(x))


def net_loss(variables, batch, rng):
    x, updates = Net().apply(variables, batch["x"], mutable=["batch_stats"])
    mean = Mean.of(jnp.sum(x, axis=-1), batch.get("weight", jnp.ones(len(x))))
    return mean.value, Aux(mean.weight, {}, updates)


def test_statistics_are_those_of_pytorch_after_a_pass():
    import torch
    from torch.optim.swa_utils import update_bn

    variables = Net().init(jax.random.key(0), np.zeros((2, 5), np.float32))
    constant = {name: 1 + jnp.arange(4.0) for name in ("scale", "bias", "mean", "variance")}
    variables["batch_stats"]["constant"] = constant
    variables["batch_stats"]["first"]["mean"] += 7.0  # what was there counts for nothing
    data = np.random.default_rng(0).normal(3, 2, (24, 5)).astype(np.float32)
    parts = data.reshape(3, 8, 5)
    # Rows of padding, and batches of nothing else, do not count.
    padding, weight = np.full((2, 5), 1e6, np.float32), np.repeat([1.0, 0.0], [8, 2])
    batches = [{"x": np.concatenate([part, padding]), "weight": weight} for part in parts]
    batches.append({"x": np.full((10, 5), 1e6, np.float32), "weight": np.zeros(10)})
    found = with_statistics(net_loss, variables, batches)
    p = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), variables["params"])

    class Constant(torch.nn.Module):
        def forward(self, x):
            c = {name: torch.tensor(np.asarray(leaf)) for name, leaf in constant.items()}
            return (x - c["mean"]) * (c["variance"] + 1e-5).rsqrt() * c["scale"] + c["bias"]

    dense = [torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)]
    for layer, name in zip(dense, ("dense_1", "dense_2"), strict=True):
        layer.load_state_dict({"weight": p[name]["kernel"].T, "bias": p[name]["bias"]})
    first, second = torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(3, momentum=0.01)
    model = torch.nn.Sequential(dense[0], first, torch.nn.ReLU(), Constant(), dense[1], second)
    update_bn([torch.tensor(part) for part in parts], model)
    for name, reference in (("first", first), ("second", second)):
        ours = found["batch_stats"][name]
        np.testing.assert_allclose(ours["mean"], reference.running_mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours["variance"], reference.running_var, rtol=1e-5)
        assert int(ours["count"]) == int(reference.num_batches_tracked) == 3
    jax.tree.map(np.testing.assert_array_equal, found["batch_stats"]["constant"], constant)
    jax.tree.map(np.testing.assert_array_equal, found["params"], variables["params"])
    plain = with_statistics(net_loss, variables, [{"x": part} for part in parts])
    jax.tree.map(np.testing.assert_array_equal, plain, found)


def test_statistics_that_cannot_be_are_refused():
    assert with_statistics(squares, PARAMS, []) is PARAMS
    variables = PARAMS | {"batch_stats": {"mean": jnp.zeros(2)}}
    with pytest.raises(ValueError, match="no batches"):
        with_statistics(squares, variables, [{"weight": np.zeros(3)}])
    with pytest.raises(ValueError, match="train=True"):
        with_statistics(squares, variables, [{"weight": np.ones(1), "target": np.ones(1)}])


def tree(*values, running=0.0):
    """Variables of a few numbers, and a running statistic."""
    first, *rest = np.asarray(values, np.float32)
    return {
        "params": {"a": jnp.array([first]), "b": jnp.array(rest)},
        "batch_stats": {"mean": jnp.array([running]), "count": jnp.array(3)},
    }


def numbers(variables):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in variables["params"].values()])


def test_soups_are_means_of_those_that_do_not_make_them_worse():
    ingredients = [tree(0.0, 4.0), tree(2.0, 0.0), tree(9.0, 9.0), tree(0.5, 0.5)]
    soup = uniform_soup(ingredients)
    np.testing.assert_allclose(numbers(soup), [2.875, 3.375])
    assert int(soup["batch_stats"]["count"]) == 3

    def measure(variables):  # (1, 1) is best
        return -float(np.sum((numbers(variables) - 1) ** 2))

    # The best alone are 3, then 1, which makes the mean (1.25, 0.25) worse, and 0, which does not.
    made, chosen = greedy_soup(ingredients, measure)
    assert chosen == [3]
    made, chosen = greedy_soup(ingredients[:3], measure)
    assert chosen == [1, 0]
    np.testing.assert_allclose(numbers(made), [1, 2])


def test_task_vectors_add_negate_and_compare():
    base, first, second = tree(1.0, 1.0, running=5.0), tree(2.0, 1.0, running=7.0), tree(1.0, 4.0)
    one, two = task_vector(first, base), task_vector(second, base)
    assert "batch_stats" not in one
    np.testing.assert_allclose(numbers(moved(base, one)), numbers(first))
    np.testing.assert_allclose(numbers(moved(base, combined([one, two], [1, 1]))), [2, 4])
    np.testing.assert_allclose(numbers(moved(base, combined([one], [-1.0]))), [0, 1])
    np.testing.assert_allclose(numbers(moved(base, two, 0.5)), [1, 2.5])
    np.testing.assert_allclose(numbers(combined([two, one, one], [1, 1, -1])), numbers(two))
    kept = moved(base, one)["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, kept, base["batch_stats"])
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base["params"])
    assert moved({"params": low}, one)["params"]["a"].dtype == jnp.bfloat16


def test_ties_trims_elects_and_means_what_agrees():
    zero = tree(0.0, 0.0, 0.0, 0.0, 0.0)
    vectors = [
        task_vector(tree(*values), zero)
        for values in ([5.0, -1.0, 0.1, 3.0, 4.0], [1.0, -2.0, 0.2, -4.0, 0.3],
                       [-3.0, 4.0, 0.1, 0.5, 2.0])
    ]  # fmt: skip
    # The three largest of five: 5 . . 3 4 | 1 -2 . -4 . | -3 4 . . 2; signs of sums + + . - +.
    np.testing.assert_allclose(numbers(ties(vectors, keep=0.6)), [3, 4, 0, -4, 3])
    np.testing.assert_allclose(numbers(ties(vectors[:1], keep=1.0)), numbers(vectors[0]))


def test_bad_input_is_named():
    other = {"params": {"a": jnp.zeros(3), "c": jnp.zeros(1)}}
    base = {"params": {"a": jnp.zeros(2), "b": jnp.zeros(1)}}
    said = (
        r"(?s)params/a is \(2,\) in base and \(3,\) in \w+.*params/b is missing in \w+"
        r".*params/c is missing in base"
    )
    with pytest.raises(ValueError, match=said.replace("base", "ingredient 0")):
        uniform_soup([base, other])
    with pytest.raises(ValueError, match="ingredient 1"):
        greedy_soup([base, other], lambda _: 0.0)
    with pytest.raises(ValueError, match="vector 1"):
        ties([base, other])
    with pytest.raises(ValueError, match=said):
        moved(base, other)
    with pytest.raises(ValueError, match="missing in tuned"):
        task_vector(other, base)
    for call, words in [
        (lambda: uniform_soup([]), "no ingredients"),
        (lambda: greedy_soup([], lambda _: 0.0), "no ingredients"),
        (lambda: greedy_soup([base], lambda _: np.nan), "nan"),
        (lambda: combined([], []), "no task vectors"),
        (lambda: combined([base], [1, 2]), "2 scales for 1 vectors"),
        (lambda: ties([base], keep=0.0), "keep=0.0"),
        (lambda: track_swa(start=-1, period=0), "start=-1 .* period=0"),
        (lambda: cyclical_rate(lambda _: 1, start=0, period=1, high=1, low=2), "low=2"),
        (lambda: averaged(init_state(base, optax.sgd(1.0), jax.random.key(0))), "0 means of"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    assert flatten(base).keys() == {"params/a", "params/b"}
