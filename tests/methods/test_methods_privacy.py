"""DP-SGD: what it equals without noise and bound, what one example can change, and its noise."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import check_trains
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import fmjax
from fmjax.data.columns import Columns
from fmjax.data.sampled import capacity_of, drawn, overflow, sampled_batches
from fmjax.methods.privacy import (
    clip_automatically,
    clip_by_norm,
    clip_per_layer,
    clipped_sum,
    private_gradient,
)
from fmjax.tasks import sequence_classification
from fmjax.train import accumulate, gradient, make_mesh, make_train_step, pmap_step
from fmjax.train.step import init_state
from fmjax.types import Aux, Mean

CLIPS = [clip_by_norm, clip_per_layer, clip_automatically]
KEY = jax.random.key(3)


def loss_fn(variables, batch, rng):
    """Weighted least squares of a two-layer net, with dropout where there is a key."""
    params = variables["params"]
    hidden = jnp.tanh(batch["x"] @ params["layers_0"]["kernel"] + params["layers_0"]["bias"])
    if rng is not None:
        hidden = hidden * jax.random.bernoulli(rng, 0.5, hidden.shape)
    y = (hidden @ params["head"]["kernel"])[:, 0]
    mean = Mean.of(jnp.square(y - batch["y"]), batch["weight"])
    return mean.value, Aux(mean.weight, {"y": Mean.of(y, batch["weight"])}, {})


def make_params(seed=0):
    draw = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "params": {
            "layers_0": {"kernel": array(6, 8), "bias": array(8)},
            "head": {"kernel": array(8, 1)},
        }
    }


def make_batch(seed=0, size=16, scale=1.0):
    draw = np.random.default_rng(seed)
    return {
        "x": np.asarray(scale * draw.normal(size=(size, 6)), np.float32),
        "y": np.asarray(scale * draw.normal(size=size), np.float32),
        "weight": np.asarray(draw.uniform(size=size) * (draw.uniform(size=size) > 0.3), np.float32),
    }


def private(**options):
    options = {"clip_norm": 0.5, "noise_multiplier": 0.0, "expected_batch_size": 8.0} | options
    return private_gradient(loss_fn, **options)


def test_without_bound_and_noise_it_is_the_ordinary_gradient():
    batch, params = make_batch(), make_params()
    filled = {name: leaf.copy() for name, leaf in batch.items()}
    filled["x"][batch["weight"] == 0] = np.nan  # padding rows do not count, whatever they hold
    expected = float(batch["weight"].sum())
    grad_fn = private(clip_norm=np.inf, expected_batch_size=expected, microbatch_size=4)
    chex.assert_trees_all_close(
        jax.jit(grad_fn)(params, {}, filled, None)[:2],
        gradient(loss_fn)(params, {}, batch, None)[:2],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("clip", CLIPS)
def test_clipping_is_what_numpy_computes(clip):
    batch, params = make_batch(1), make_params()
    total = jax.tree.map(np.zeros_like, params)
    for row in range(16):
        alone = {name: leaf[row : row + 1] for name, leaf in batch.items()}
        grads = jax.device_get(gradient(loss_fn)(params, {}, alone, None)[0])
        grads = jax.tree.map(lambda g: g * batch["weight"][row], grads)  # noqa: B023
        norm_of = lambda tree: np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))  # noqa: E731
        if clip is clip_by_norm:
            factors = dict.fromkeys(grads["params"], min(1, 0.5 / max(norm_of(grads), 1e-9)))
        elif clip is clip_automatically:
            factors = dict.fromkeys(grads["params"], 0.5 / (norm_of(grads) + 0.01))
        else:
            factors = {
                name: min(1, 0.5 / np.sqrt(2) / max(norm_of(part), 1e-9))
                for name, part in grads["params"].items()
            }
        for name, part in grads["params"].items():
            for leaf, g in part.items():
                total["params"][name][leaf] += factors[name] * g
    grads, _, aux = jax.jit(private(clip=clip))(params, {}, batch, None)
    chex.assert_trees_all_close(grads, jax.tree.map(lambda x: x / 8.0, total), rtol=1e-5, atol=1e-6)
    assert float(aux.metrics["clipped"].weight) == (batch["weight"] > 0).sum()


def test_microbatches_change_nothing_with_noise_and_dropout():
    batch, params = make_batch(2), make_params()
    results = [
        jax.jit(private(noise_multiplier=1.3, microbatch_size=size))(params, {}, batch, KEY)
        for size in (2, 16)
    ]
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_skipped_microbatches_of_padding_change_nothing():
    batch, params = make_batch(2), make_params()
    padded = {name: np.concatenate([leaf, np.zeros_like(leaf)]) for name, leaf in batch.items()}
    grad_fn = private(noise_multiplier=1.3, microbatch_size=4)
    chex.assert_trees_all_close(
        jax.jit(grad_fn)(params, {}, padded, KEY), jax.jit(grad_fn)(params, {}, batch, KEY)
    )


SUMS = {
    clip: jax.jit(clipped_sum(loss_fn, clip_norm=0.3, microbatch_size=4, clip=clip))
    for clip in CLIPS
}


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.integers(0, 15), st.sampled_from([1e-3, 1.0, 1e4, np.inf]))
@pytest.mark.parametrize("clip", CLIPS)
def test_one_example_changes_the_sum_by_no_more_than_the_bound(clip, seed, row, scale):
    batch, params = make_batch(seed), make_params()
    batch["weight"][:] = np.random.default_rng(seed).uniform(0.1, 9.0, 16)  # nor its weight
    with np.errstate(invalid="ignore"):
        other = make_batch(seed + 1, scale=scale)
    sums = SUMS[clip]
    there = sums(params, {}, batch, None)[0]
    replaced = {name: leaf.copy() for name, leaf in batch.items()}
    for name in ("x", "y"):
        replaced[name][row] = other[name][row]
    removed = batch | {"weight": np.where(np.arange(16) == row, 0, batch["weight"])}
    for changed, bound in ((replaced, 2 * 0.3), (removed, 0.3)):
        difference = jax.tree.map(jnp.subtract, there, sums(params, {}, changed, None)[0])
        assert float(optax.tree.norm(difference)) <= bound * (1 + 1e-4)


def test_noise_has_the_mean_and_deviation_it_should_and_is_new_in_every_step():
    params = {"params": {"kernel": jnp.zeros((100, 100)), "bias": jnp.zeros(50)}}

    def constant(variables, batch, rng):
        weight = jnp.sum(batch["weight"])
        return 0.0 * sum(jnp.sum(x) for x in jax.tree.leaves(variables)), Aux(weight, {}, {})

    grad_fn = private_gradient(
        constant, clip_norm=2.0, noise_multiplier=1.5, expected_batch_size=4, microbatch_size=2
    )
    state = init_state(params, optax.sgd(1.0), KEY)
    step = jax.jit(make_train_step(grad_fn, optax.sgd(1.0)))
    draws = []
    for _ in range(3):
        before = state.trainable["params"]
        state, _ = step(state, {"weight": np.ones(4, np.float32)})
        after = state.trainable["params"]
        draws.append(np.asarray(before["kernel"] - after["kernel"]).ravel())
    std = 1.5 * 2.0 / 4
    for noise in draws:  # 10,000 numbers: four standard errors
        assert abs(noise.mean()) < 4 * std / 100
        assert abs(noise.std() / std - 1) < 4 / np.sqrt(2e4)
    correlations = np.corrcoef(draws)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 0.04


@pytest.mark.slow
def test_over_devices_it_is_that_of_one():
    batch, params = make_batch(4), make_params()
    tx = optax.sgd(0.1)
    options = {"noise_multiplier": 1.3, "microbatch_size": 2}
    fresh = lambda: init_state(jax.tree.map(jnp.copy, params), tx, KEY)  # noqa: E731
    alone, metrics = jax.jit(make_train_step(private(**options), tx))(fresh(), batch)
    grad_fn = private(**options, axis_name="batch")
    mesh = make_mesh(batch=4)
    mapped = jax.shard_map(
        make_train_step(grad_fn, tx),
        mesh=mesh,
        in_specs=(P(), P("batch")),
        out_specs=P(),
        check_vma=False,
    )
    state, seen = jax.jit(mapped)(fresh(), batch)
    chex.assert_trees_all_close(state.trainable, alone.trainable, rtol=1e-5, atol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(seen[name].value, metrics[name].value, rtol=1e-5)
    # pmap_step averages over the devices once more, with keys of each device's own: all of them
    # take the first one's.
    key = jax.random.fold_in(jax.random.fold_in(KEY, 0), 0)
    grads = jax.jit(private(**options))(params, {}, batch, key)[0]
    state, seen = pmap_step(grad_fn, tx)(fresh(), batch)
    chex.assert_trees_all_close(
        state.trainable,
        jax.tree.map(lambda x, g: x - 0.1 * g, params, grads),
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="axis_name='batch'"):
        pmap_step(private(**options), tx)(fresh(), batch)


def test_what_would_break_the_guarantee_is_refused():
    params, batch = make_params(), make_batch()
    with pytest.raises(ValueError, match=r"clip_norm=0.*noise_multiplier=-1.*expected.*microbatch"):
        private(clip_norm=0, noise_multiplier=-1, expected_batch_size=0, microbatch_size=0)
    with pytest.raises(ValueError, match="relative to the bound"):
        private(clip_norm=np.inf, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="the bound is inf"):
        private(clip_norm=np.inf, clip=clip_automatically)(params, {}, batch, KEY)
    with pytest.raises(ValueError, match="do not accumulate"):
        accumulate(private(expected_batch_size=16, microbatch_size=4), 2)(params, {}, batch, KEY)
    with pytest.raises(ValueError, match="no multiple of microbatch_size=5"):
        private(microbatch_size=5)(params, {}, batch, KEY)
    with pytest.raises(ValueError, match="rng is None"):
        private(noise_multiplier=1.0)(params, {}, batch, None)

    def with_statistics(variables, batch, rng):
        loss, aux = loss_fn(variables, batch, rng)
        return loss, aux._replace(updates={"batch_stats": {"mean": jnp.zeros(3)}})

    grad_fn = private_gradient(
        with_statistics, clip_norm=1.0, noise_multiplier=0.0, expected_batch_size=8
    )
    with pytest.raises(ValueError, match="batch normalisation mixes examples"):
        grad_fn(params, {}, batch, None)


@pytest.mark.slow
def test_only_a_head_of_a_real_family_trains_in_private():
    model, variables = fmjax.create(
        "bert", "tiny", head="sequence_classification", num_labels=2, rng=jax.random.key(0)
    )
    draw = np.random.default_rng(0)
    ids = draw.integers(5, 40, (16, 6))
    batch = {
        "input_ids": ids.astype(np.int32),
        "attention_mask": np.ones((16, 6), np.int32),
        "labels": (ids[:, 1] > 20).astype(np.int32),
        "weight": np.ones(16, np.float32),
    }
    check_trains(
        variables,
        sequence_classification.loss(model),
        optax.adam(0.03),
        batch,
        is_trainable=lambda path: path.startswith("params/head/"),
        differentiate=lambda loss: private_gradient(
            loss, clip_norm=1.0, noise_multiplier=0.02, expected_batch_size=16
        ),
        falls_to=0.95,
    )


def test_each_example_is_drawn_independently_at_the_rate():
    data = Columns((), {"x": np.arange(200)})
    stream = sampled_batches(data, rate=0.2, capacity=72, seed=5, prefetch=0)
    counts, sizes, pairs = np.zeros(200), [], 0
    for _ in range(500):
        batch = next(stream)
        rows = batch["index"][batch["weight"] > 0]
        assert (np.diff(rows) > 0).all()
        assert (batch["index"][len(rows) :] == -1).all()
        np.testing.assert_array_equal(batch["x"][: len(rows)], rows)
        counts[rows] += 1
        sizes.append(len(rows))
        pairs += {3, 7} <= set(rows.tolist())
    # Five standard deviations: of one example's count, of the sizes' mean, and of pairs.
    assert np.abs(counts - 100).max() < 5 * np.sqrt(500 * 0.2 * 0.8)
    assert abs(np.mean(sizes) - 40) < 5 * np.sqrt(200 * 0.2 * 0.8 / 500)
    assert abs(np.std(sizes) / np.sqrt(200 * 0.2 * 0.8) - 1) < 0.2
    assert abs(pairs - 500 * 0.04) < 5 * np.sqrt(500 * 0.04)
    state, following = stream.get_state(), next(stream)
    again = sampled_batches(data, rate=0.2, capacity=72, seed=5)
    again.set_state(state)
    chex.assert_trees_all_equal(next(again), following)
    again.close()


def test_capacity_is_hardly_ever_exceeded_and_what_is_cut_is_cut_fairly():
    rows = capacity_of(2000, 0.05, 500, multiple=8)
    assert rows % 8 == 0
    assert overflow(2000, 0.05, rows, 500) <= 1e-10 < overflow(2000, 0.05, rows - 8, 500)
    assert capacity_of(10, 1.0, 500) == 10
    rng = np.random.default_rng(0)
    counts = np.zeros(20)
    for _ in range(2000):
        counts[drawn(rng, 20, 1.0, 5)] += 1
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500)


def test_sampling_that_cannot_be_is_refused():
    data = Columns((), {"x": np.arange(200)})
    with pytest.raises(ValueError, match=r"rate=1\.5"):
        sampled_batches(data, rate=1.5, capacity=72)
    with pytest.raises(ValueError, match="capacity=30 is below the expected 40"):
        sampled_batches(data, rate=0.2, capacity=30)
