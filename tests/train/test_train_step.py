"""Identities of the contract: every way to run a step gives the same step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_max_traces, assert_trees_all_close, assert_trees_all_equal
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from fmjax.train import (
    accumulate,
    adamw,
    all_reduce,
    cast,
    ema_of,
    gradient,
    init_state,
    jit_step,
    make_eval_step,
    make_mesh,
    make_train_step,
    pmap_step,
    shardings,
    track_ema,
    warmup_linear,
)
from fmjax.tree import flatten, merge
from fmjax.types import Aux, Mean


def loss_fn(variables, batch, rng):
    """Weighted least squares of a two-layer net that also keeps a running mean."""
    params = variables["params"]
    hidden = jnp.tanh(batch["x"] @ params["layers_0"]["kernel"] + params["layers_0"]["bias"])
    y = (hidden @ params["head"]["kernel"])[:, 0].astype(jnp.float32)
    error = jnp.square(y - batch["y"])
    mean = Mean.of(error, batch["weight"])
    aux = Aux(mean.weight, {"absolute": Mean.of(jnp.abs(y), batch["weight"])}, {})
    return mean.value, aux


def loss_with_statistics(variables, batch, rng):
    loss, aux = loss_fn(variables, batch, rng)
    mean = variables["batch_stats"]["mean"]
    new = 0.9 * mean + 0.1 * jnp.mean(batch["x"], axis=0).astype(mean.dtype)
    return loss, aux._replace(updates={"batch_stats": {"mean": new}})


def loss_with_a_new_leaf(variables, batch, rng):
    loss, aux = loss_fn(variables, batch, rng)
    return loss, aux._replace(updates={"batch_stats": {"loss": loss}})


def make_variables():
    rng = np.random.default_rng(0)
    return {
        "params": {
            "layers_0": {
                "kernel": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
                "bias": jnp.asarray(rng.normal(size=8), jnp.float32),
            },
            "head": {"kernel": jnp.asarray(rng.normal(size=(8, 1)), jnp.float32)},
        }
    }


def make_batch(seed=0, size=16, weights=None):
    rng = np.random.default_rng(seed)
    weight = rng.uniform(size=size) * (rng.uniform(size=size) > 0.3) if weights is None else weights
    return {
        "x": np.asarray(rng.normal(size=(size, 6)), np.float32),
        "y": np.asarray(rng.normal(size=size), np.float32),
        "weight": np.asarray(weight, np.float32),
    }


TX = optax.chain(adamw(1e-2), track_ema(0.9))


def run(step, num_steps=3, state=None):
    state = init_state(make_variables(), TX, jax.random.key(1)) if state is None else state
    for i in range(num_steps):
        state, metrics = step(state, make_batch(i))
    return state, metrics


@pytest.fixture(scope="module")
def reference():
    state, metrics = run(jit_step(make_train_step(gradient(loss_fn), TX)))
    return jax.device_get((state.trainable, state.opt_state, metrics))


def assert_like(reference, outcome):
    state, metrics = outcome
    result = (state.trainable, state.opt_state, metrics)
    assert_trees_all_close(jax.device_get(result), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pieces", [1, 2, 4, 16])
def test_accumulation_equals_the_full_batch(reference, pieces):
    grad_fn = accumulate(gradient(loss_fn), pieces)
    assert_like(reference, run(jit_step(make_train_step(grad_fn, TX))))


def test_sharded_jit_equals_jit(reference):
    step = jit_step(make_train_step(gradient(loss_fn), TX), make_mesh(data=4))
    assert_like(reference, run(step))


def test_fully_sharded_equals_jit(reference):
    mesh = make_mesh(data=4)
    state = init_state(make_variables(), TX, jax.random.key(1))
    table = [("layers_0/kernel", P(None, "data")), ("head/kernel", P("data"))]
    places = shardings(jax.eval_shape(lambda: state), mesh, table)
    flat = {path: place.spec for path, place in flatten(places.trainable).items()}
    assert flat["params/layers_0/kernel"] == P(None, "data")
    moments = places.opt_state[0][1][0].mu["params"]["layers_0"]["kernel"]
    assert moments.spec == P(None, "data")
    step = jit_step(make_train_step(gradient(loss_fn), TX), mesh, state_shardings=places)
    outcome = run(step, state=jax.device_put(state, places))
    assert_like(reference, outcome)
    kernel = outcome[0].trainable["params"]["layers_0"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (6, 2)


def test_pmap_equals_jit(reference):
    assert_like(reference, run(pmap_step(gradient(loss_fn), TX)))


def test_shard_map_equals_jit(reference):
    mesh = make_mesh(data=4)
    step = make_train_step(all_reduce(gradient(loss_fn), "data"), TX)
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()), check_vma=False
    )
    assert_like(reference, run(jax.jit(mapped)))


def test_accumulation_inside_pmap_equals_jit(reference):
    assert_like(reference, run(pmap_step(accumulate(gradient(loss_fn), 2), TX)))


def test_one_trace_per_shape():
    step = assert_max_traces(make_train_step(gradient(loss_fn), TX), 1)
    run(jit_step(step), num_steps=4)


def test_frozen_leaves_stay_bitwise_under_weight_decay():
    variables = make_variables()
    before = jax.device_get(variables["params"]["layers_0"])
    state = init_state(variables, TX, jax.random.key(0), lambda path: "/head/" in path)
    assert set(flatten(state.trainable)) == {"params/head/kernel"}
    state, _ = run(jit_step(make_train_step(gradient(loss_fn), TX)), state=state)
    assert_trees_all_equal(jax.device_get(state.non_trainable["params"]["layers_0"]), before)
    assert "layers_0" not in str(flatten(state.trainable))


WHOLE = jax.jit(gradient(loss_fn))
PARTS = {n: jax.jit(accumulate(gradient(loss_fn), n)) for n in (1, 2, 4)}


@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]))
def test_weights_make_parts_exact(seed, pieces):
    """Also when whole pieces, or the whole batch, weigh nothing."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 3, size=8) * (seed % 5 > 0)
    batch = make_batch(seed, 8, weights)
    variables = make_variables()
    whole = WHOLE(variables, {}, batch, None)
    parts = PARTS[pieces](variables, {}, batch, None)
    assert_trees_all_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parts))


@pytest.mark.parametrize(
    ("dtype", "pieces", "weight"),
    [(jnp.bfloat16, 512, 1.0), (jnp.bfloat16, 64, 1000.0), (jnp.float16, 4, 7e4)],
)
def test_sums_below_float32_are_exact(dtype, pieces, weight):
    """Of pieces and of devices: every gradient is 1, and so is their mean."""

    def ones(variables, batch, rng):
        loss = jnp.sum(variables["params"]["w"])
        return loss, Aux(jnp.float32(weight), {}, {})

    params, batch = {"params": {"w": jnp.ones(2, dtype)}}, {"x": jnp.zeros((pieces, 1))}
    over = jax.vmap(
        lambda batch: all_reduce(gradient(ones), "data")(params, {}, batch, None),
        axis_name="data",
    )
    for run_all in (lambda b: accumulate(gradient(ones), pieces)(params, {}, b, None), over):
        grads, loss, aux = jax.jit(run_all)(batch)
        assert (grads["params"]["w"].dtype, loss.dtype) == (dtype, dtype)
        np.testing.assert_array_equal(np.asarray(grads["params"]["w"], np.float32), 1.0)
        np.testing.assert_allclose(aux.weight, pieces * weight, rtol=1e-5)


def test_mutable_collections_are_threaded_through_pieces():
    state = init_state(
        {**make_variables(), "batch_stats": {"mean": jnp.zeros(6)}}, TX, jax.random.key(0)
    )
    assert set(state.non_trainable) == {"batch_stats"}
    batch = make_batch(weights=np.ones(16))
    step = make_train_step(accumulate(gradient(loss_with_statistics), 2), TX)
    after, _ = jax.jit(step)(state, batch)
    expected = np.zeros(6)
    for piece in (batch["x"][0::2], batch["x"][1::2]):
        expected = 0.9 * expected + 0.1 * piece.mean(axis=0)
    np.testing.assert_allclose(after.non_trainable["batch_stats"]["mean"], expected, atol=1e-6)
    mapped, _ = pmap_step(gradient(loss_with_statistics), TX)(state, batch)
    np.testing.assert_allclose(
        mapped.non_trainable["batch_stats"]["mean"], 0.1 * batch["x"].mean(axis=0), atol=1e-6
    )


def test_dropout_keys_differ_by_step_piece_and_device():
    def noise(variables, batch, rng):
        drawn = jax.random.uniform(rng)
        loss = jnp.sum(variables["params"]["w"]) * 0.0 + drawn
        return loss, Aux(jnp.ones(()), {"square": Mean(drawn**2, jnp.ones(()))}, {})

    def draw(grad_fn, wrap, steps=2):
        state = init_state({"params": {"w": jnp.ones(1)}}, optax.sgd(0.0), jax.random.key(3))
        step, means = wrap(grad_fn), []
        for _ in range(steps):
            state, metrics = step(state, {"x": np.zeros((4, 1), np.float32)})
            means.append((float(metrics["loss"].value), float(metrics["square"].value)))
        return means

    plain = draw(gradient(noise), lambda g: jax.jit(make_train_step(g, optax.sgd(0.0))))
    assert plain[0] != plain[1]
    for means in (
        draw(accumulate(gradient(noise), 4), lambda g: jax.jit(make_train_step(g, optax.sgd(0.0)))),
        draw(gradient(noise), lambda g: pmap_step(g, optax.sgd(0.0))),
    ):
        for mean, square in means:
            assert square - mean**2 > 1e-4  # the four draws are not one


def test_ema_follows_the_weights_and_shares_no_buffer():
    state = init_state(make_variables(), TX, jax.random.key(0))
    expected = jax.device_get(state.trainable)
    step = jit_step(make_train_step(gradient(loss_fn), TX))
    for i in range(3):
        state, _ = step(state, make_batch(i))
        now = jax.device_get(state.trainable)
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, now)
    assert_trees_all_close(jax.device_get(ema_of(state.opt_state)), expected, atol=1e-6)


def test_the_ema_of_bfloat16_moves():
    params = {"x": jnp.full(1, 2.0, jnp.bfloat16)}
    tx = track_ema(0.999)
    start = tx.init(jax.tree.map(jnp.ones_like, params))
    follow = lambda state, _: (tx.update({"x": jnp.zeros(1)}, state, params)[1], None)  # noqa: E731
    state, _ = jax.lax.scan(follow, start, None, length=2000)
    np.testing.assert_allclose(ema_of(state)["x"], 2 - 0.999**2000, rtol=1e-4)


def test_a_leaf_given_twice_survives_donation():
    shared = jnp.ones((6, 6))
    variables = {"params": {"a": shared, "b": shared}}
    state = init_state(variables, optax.sgd(0.1), jax.random.key(0))

    def loss(variables, batch, rng):
        value = jnp.sum(variables["params"]["a"]) + 2 * jnp.sum(variables["params"]["b"])
        return value, Aux(jnp.ones(()), {}, {})

    state, _ = jit_step(make_train_step(gradient(loss), optax.sgd(0.1)))(state, {"x": jnp.ones(4)})
    np.testing.assert_allclose(state.trainable["params"]["a"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(state.trainable["params"]["b"], 0.8, rtol=1e-6)


def test_cast_keeps_masters_and_statistics_in_float32():
    seen = {}

    def loss(variables, batch, rng):
        seen.update({path: leaf.dtype for path, leaf in flatten(variables).items()})
        return loss_with_statistics(variables, batch, rng)

    low = cast(loss, jnp.bfloat16, keep=lambda path: path.endswith("bias"))
    variables = {**make_variables(), "batch_stats": {"mean": jnp.zeros(6)}}
    grads, _, aux = gradient(low)(
        {"params": variables["params"]},
        {"batch_stats": variables["batch_stats"]},
        make_batch(),
        None,
    )
    assert seen["params/head/kernel"] == jnp.bfloat16
    assert seen["params/layers_0/bias"] == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert aux.updates["batch_stats"]["mean"].dtype == jnp.float32
    full, _, _ = gradient(loss_fn)(make_variables(), {}, make_batch(), None)
    for low_leaf, leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(low_leaf, leaf, atol=0.03 * np.abs(leaf).max() + 1e-3)


def test_eval_step_equals_the_loss():
    state = init_state(make_variables(), TX, jax.random.key(0))
    batch = make_batch()
    metrics = make_eval_step(loss_fn)(state, batch)
    loss, aux = loss_fn(merge(state.trainable, state.non_trainable), batch, None)
    np.testing.assert_allclose(metrics["loss"].value, loss, rtol=1e-6)
    assert metrics["absolute"] == aux.metrics["absolute"]


def test_weight_decay_spares_biases():
    tx = adamw(1.0, weight_decay=0.5, b1=0.0)
    params = {"params": {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["params"]["a"]["kernel"], -0.5)
    np.testing.assert_allclose(updates["params"]["a"]["bias"], 0.0)


def test_warmup_linear():
    schedule = warmup_linear(1.0, steps=10, warmup=4)
    np.testing.assert_allclose([schedule(i) for i in (0, 2, 4, 7, 10)], [0, 0.5, 1, 0.5, 0])
    np.testing.assert_allclose(warmup_linear(1.0, steps=10, warmup=0)(0), 1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: init_state(make_variables(), TX, jax.random.PRNGKey(0)), "typed key"),
        (lambda: init_state(make_variables(), TX, 0), "rng is 0; a typed key"),
        (lambda: init_state(make_variables(), TX, jax.random.key(0), lambda p: False), "none of"),
        (lambda: accumulate(gradient(loss_fn), 0), "num_microbatches is 0"),
        (lambda: run(jit_step(make_train_step(accumulate(gradient(loss_fn), 3), TX))), "16"),
        (
            lambda: accumulate(gradient(loss_fn), 2)({}, {}, {"x": jnp.float32(1)}, None),
            r"\['x'\] have no axis of examples",
        ),
        (
            lambda: accumulate(gradient(loss_with_a_new_leaf), 2)(
                make_variables(), {}, make_batch(), None
            ),
            r"updates for \['batch_stats/loss'\]",
        ),
        (lambda: track_ema(1.0), "decay is 1.0"),
        (lambda: ema_of(optax.sgd(0.1).init({})), "0 moving averages"),
        (lambda: warmup_linear(1.0, steps=3, warmup=3), "warmup=3"),
        (lambda: make_mesh(data=5), "needs 5 devices"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("wrap", ["jit", "pmap"])
def test_a_batch_that_does_not_divide_is_refused(wrap):
    grad_fn = gradient(loss_fn)
    step = (
        pmap_step(grad_fn, TX)
        if wrap == "pmap"
        else jit_step(make_train_step(grad_fn, TX), make_mesh(data=4))
    )
    state = init_state(make_variables(), TX, jax.random.key(0))
    with pytest.raises(ValueError, match=r"18.*do not divide by the 4 devices"):
        step(state, make_batch(size=18))
    with pytest.raises(ValueError, match=r"batch \['one', 'two'\] are no arrays"):
        step(state, make_batch() | {"one": 1.0, "two": [1, 2]})


def test_a_sharding_table_that_does_not_fit_lists_every_problem():
    state = init_state(make_variables(), TX, jax.random.key(0))
    table = [("layers_0/kernel", P("data")), ("head/kernel", P("model")), ("nothing", P())]
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is checked below
        shardings(jax.eval_shape(lambda: state), make_mesh(data=4), table)
    for words in ("(6, 8) does not divide into 4", "'model'", "'nothing' matches no leaf"):
        assert words in str(error.value)
