"""Federated rounds: what they equal, whom they leave out, and the clients' data."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import check_trains
from methods.test_methods_privacy import loss_fn, make_params

from fmjax.data.clients import client_batches, dirichlet_split, even_split, shard_split
from fmjax.data.columns import Columns
from fmjax.methods.federated import (
    client_update,
    fed_adagrad,
    fed_adam,
    fed_yogi,
    private_pseudo_gradient,
    proximal,
    pseudo_gradient,
)
from fmjax.methods.privacy import private_gradient
from fmjax.train import accumulate, gradient, init_state, jit_step, make_train_step
from fmjax.types import Aux, Mean

KEY = jax.random.key(5)
LOCAL = optax.sgd(0.1, momentum=0.9)


def plain_loss(variables, batch, rng):
    """Without dropout, so that one client's numbers do not depend on another's."""
    return loss_fn(variables, batch, None)


def make_round(seed=0, shape=(4, 3, 5)):
    draw = np.random.default_rng(seed)
    return {
        "x": np.asarray(draw.normal(size=(*shape, 6)), np.float32),
        "y": np.asarray(draw.normal(size=shape), np.float32),
        "weight": np.asarray(draw.uniform(size=shape) > 0.2, np.float32),
        "client": np.arange(10, 10 + shape[0], dtype=np.int32),
    }


def take(batch, places):
    return {name: leaf[places] for name, leaf in batch.items()}


AVERAGED = jax.jit(pseudo_gradient(client_update(loss_fn, LOCAL), clients_at_once=2))


def test_one_step_of_every_client_is_central_training_on_their_union():
    batch, params = make_round(shape=(4, 1, 5)), make_params()
    # The mean over clients by their examples is the mean over examples.
    client = client_update(plain_loss, optax.sgd(0.1))
    step = jax.jit(make_train_step(pseudo_gradient(client, clients_at_once=4), optax.sgd(1.0)))
    state, metrics = step(init_state(params, optax.sgd(1.0), KEY), batch)
    union = {name: batch[name].reshape(20, *batch[name].shape[3:]) for name in ("x", "y", "weight")}
    central, expected = jax.jit(make_train_step(gradient(plain_loss), optax.sgd(0.1)))(
        init_state(params, optax.sgd(0.1), KEY), union
    )
    chex.assert_trees_all_close(state.trainable, central.trainable, rtol=1e-5, atol=1e-6)
    for name in ("loss", "y"):
        np.testing.assert_allclose(metrics[name].value, expected[name].value, rtol=1e-5)


def test_one_client_is_local_training():
    batch, params = make_round(shape=(1, 3, 5)), make_params()
    grads, _, aux = jax.jit(pseudo_gradient(client_update(loss_fn, LOCAL), clients_at_once=1))(
        params, {}, batch, KEY
    )
    state = init_state(params, LOCAL, jax.random.fold_in(KEY, 10))
    step = jax.jit(make_train_step(gradient(loss_fn), LOCAL))
    for number in range(3):
        state, _ = step(state, {n: x[0, number] for n, x in batch.items() if n != "client"})
    new = jax.tree.map(jnp.subtract, params, grads)
    chex.assert_trees_all_close(new, state.trainable, rtol=1e-5, atol=1e-6)
    assert float(aux.weight) == batch["weight"].sum()


def test_order_padding_and_dropping_out_of_clients_change_nothing():
    batch, params = make_round(), make_params()
    batch["weight"][1] = 0  # dropped out, and its data are broken
    batch["x"][1] = np.nan
    whole = AVERAGED(params, {}, batch, KEY)
    absent = take(batch, [0, 2, 3])
    steps = pseudo_gradient(client_update(loss_fn, LOCAL), clients_at_once=1)
    chex.assert_trees_all_close(steps(params, {}, absent, KEY), whole, rtol=1e-5, atol=1e-6)
    shuffled = AVERAGED(params, {}, take(batch, [3, 1, 2, 0]), KEY)
    chex.assert_trees_all_close(shuffled, whole, rtol=1e-5, atol=1e-6)
    more = {
        name: leaf if leaf.ndim == 1 else np.concatenate([leaf[:, :2], 0 * leaf, leaf[:, 2:]], 1)
        for name, leaf in (batch | {"x": np.nan_to_num(batch["x"])}).items()
    }  # steps of padding, even between others
    chex.assert_trees_all_close(AVERAGED(params, {}, more, KEY), whole, rtol=1e-5, atol=1e-6)
    nobody = AVERAGED(params, {}, batch | {"weight": 0 * batch["weight"]}, KEY)
    assert float(optax.tree.norm(nobody[0])) == 0
    assert float(nobody[2].weight) == 0


def test_accumulated_rounds_are_the_whole_round():
    batch, params = make_round(), make_params()
    client = client_update(plain_loss, LOCAL)
    halves = accumulate(pseudo_gradient(client, clients_at_once=2), 2)
    whole = pseudo_gradient(client, clients_at_once=4)
    chex.assert_trees_all_close(
        jax.jit(halves)(params, {}, batch, KEY)[0],
        jax.jit(whole)(params, {}, batch, KEY)[0],
        rtol=1e-5,
        atol=1e-6,
    )


def test_running_statistics_are_averaged():
    def with_statistics(variables, batch, rng):
        loss, aux = plain_loss(variables, batch, rng)
        mean = 0.5 * variables["batch_stats"]["mean"] + 0.5 * jnp.mean(batch["x"])
        return loss, aux._replace(updates={"batch_stats": {"mean": mean}})

    batch, params = make_round(shape=(2, 1, 5)), make_params()
    client = client_update(with_statistics, LOCAL)
    stats = {"batch_stats": {"mean": jnp.float32(1.0)}}
    aux = pseudo_gradient(client, clients_at_once=2)(params, stats, batch, KEY)[2]
    weights = batch["weight"].sum(axis=(1, 2))
    expected = np.average(0.5 + 0.5 * batch["x"].mean(axis=(1, 2, 3)), weights=weights)
    np.testing.assert_allclose(aux.updates["batch_stats"]["mean"], expected, rtol=1e-5)
    private = private_pseudo_gradient(
        client, clip_norm=1.0, noise_multiplier=1.0, expected_weight=2, clients_at_once=2
    )
    with pytest.raises(ValueError, match="running statistics"):
        private(params, stats, batch, KEY)


def test_proximal_pulls_by_the_gradient_of_its_term():
    mu, params = 0.7, make_params()
    anchor = jax.tree.map(lambda x: x + 0.3, params)

    def pulled(variables, batch, rng):
        loss, aux = plain_loss(variables, batch, rng)
        apart = optax.tree.sub(variables["params"], anchor["params"])
        return loss + mu / 2 * optax.tree.norm(apart, squared=True), aux

    batch = {name: leaf[0, 0] for name, leaf in make_round().items() if name != "client"}
    expected = gradient(pulled)(params, {}, batch, None)[0]
    tx = proximal(mu)
    grads, _ = tx.update(gradient(plain_loss)(params, {}, batch, None)[0], tx.init(anchor), params)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)
    # Outside of a client, too, where a step donates the state.
    whole = optax.chain(tx, optax.sgd(0.1))
    step = jit_step(make_train_step(gradient(plain_loss), whole))
    state, _ = step(init_state(jax.tree.map(jnp.copy, params), whole, KEY), batch)
    chex.assert_trees_all_equal(state.opt_state[0], params)


def test_adaptive_servers_are_algorithm_2():
    changes = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float64)
    for tx, b1, second in (
        (fed_adagrad(0.1), 0.0, lambda v, s: v + s),
        (fed_adam(0.1), 0.9, lambda v, s: 0.99 * v + 0.01 * s),
        (fed_yogi(optax.constant_schedule(0.1)), 0.9, lambda v, s: v - 0.01 * s * np.sign(v - s)),
    ):
        w, m, v = np.zeros(3), np.zeros(3), np.full(3, 1e-6)
        params = jnp.zeros(3)
        state = tx.init(params)
        for change in changes:
            m = b1 * m + (1 - b1) * change
            v = second(v, change**2)
            w = w + 0.1 * m / (np.sqrt(v) + 1e-3)
            updates, state = tx.update(-jnp.asarray(change, jnp.float32), state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, w, rtol=1e-5)


def test_client_level_privacy_clips_each_client():
    batch, params = make_round(), make_params()
    client = client_update(plain_loss, LOCAL)
    options = {"clip_norm": 0.2, "expected_weight": 3.0, "clients_at_once": 2}
    private = jax.jit(private_pseudo_gradient(client, noise_multiplier=0.0, **options))
    grads, _, aux = private(params, {}, batch, KEY)
    local = jax.jit(client)
    total = jax.tree.map(np.zeros_like, params)
    for place in range(4):
        alone = {name: leaf[place] for name, leaf in batch.items() if name != "client"}
        change = local(params, {}, alone, KEY).change
        factor = min(1.0, 0.2 / float(optax.tree.norm(change)))
        total = jax.tree.map(lambda t, c: t + factor * c, total, change)  # noqa: B023
    chex.assert_trees_all_close(
        grads, jax.tree.map(lambda t: -t / 3.0, total), rtol=1e-5, atol=1e-6
    )
    assert float(aux.metrics["clipped"].weight) == 4
    removed = batch | {"weight": batch["weight"] * np.array([1, 1, 0, 1])[:, None, None]}
    difference = jax.tree.map(jnp.subtract, grads, private(params, {}, removed, KEY)[0])
    assert float(optax.tree.norm(difference)) * 3.0 <= 0.2 * (1 + 1e-4)
    noisy = private_pseudo_gradient(client, noise_multiplier=2.0, **options)
    noise = jax.tree.map(jnp.subtract, jax.jit(noisy)(params, {}, batch, KEY)[0], grads)
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(noise)])
    assert abs(values.std() * 3.0 / (2.0 * 0.2) - 1) < 4 / np.sqrt(2 * values.size)


@pytest.mark.slow
def test_it_trains_what_is_trainable_with_private_clients_and_an_adaptive_server():
    def adapted(variables, batch, rng):
        kernel = variables["params"]["kernel"] + variables["lora"]["a"] @ variables["lora"]["b"]
        mean = Mean.of(jnp.square((batch["x"] @ kernel)[:, 0] - batch["y"]), batch["weight"])
        return mean.value, Aux(mean.weight, {}, {})

    draw = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)  # noqa: E731
    variables = {"params": {"kernel": array(6, 1)}, "lora": {"a": array(6, 1), "b": array(1, 1)}}
    batch = make_round()
    batch["y"] = batch["x"].sum(-1)
    check_trains(
        variables,
        adapted,
        fed_adam(0.1),
        batch,
        is_trainable=lambda path: path.startswith("lora/"),
        differentiate=lambda loss: pseudo_gradient(
            client_update(
                loss,
                optax.chain(proximal(0.01), optax.sgd(0.05)),
                lambda loss: private_gradient(
                    loss,
                    clip_norm=10.0,
                    noise_multiplier=0.01,
                    expected_batch_size=4,
                    microbatch_size=5,
                ),
            ),
            clients_at_once=2,
        ),
    )


def test_rounds_that_do_not_fit_are_refused():
    params, client = make_params(), client_update(loss_fn, LOCAL)
    with pytest.raises(ValueError, match="clients_at_once=0"):
        pseudo_gradient(client, clients_at_once=0)
    with pytest.raises(ValueError, match="4 clients, no multiple of clients_at_once=3"):
        pseudo_gradient(client, clients_at_once=3)(params, {}, make_round(), KEY)
    flat = {"x": np.zeros((4, 6)), "weight": np.ones(4)}
    with pytest.raises(ValueError, match=r"\[clients, steps, batch"):
        pseudo_gradient(client)(params, {}, flat, KEY)
    with pytest.raises(ValueError, match="rng is None"):
        pseudo_gradient(client)(params, {}, make_round(), None)
    with pytest.raises(ValueError, match=r"clip_norm=0 .*expected_weight=-1"):
        private_pseudo_gradient(client, clip_norm=0, noise_multiplier=1.0, expected_weight=-1)
    for bound, noise in ((np.inf, 1.0), (1.0, np.inf)):
        with pytest.raises(ValueError, match=rf"noise_multiplier={noise} .*clip_norm={bound}"):
            private_pseudo_gradient(
                client, clip_norm=bound, noise_multiplier=noise, expected_weight=1
            )
    with pytest.raises(ValueError, match="mu=-1"):
        proximal(-1)


LABELS = np.random.default_rng(1).integers(0, 10, 5000)


def test_splits_share_out_every_example_once():
    for shares in (
        even_split(5000, 7),
        shard_split(LABELS, 25),
        dirichlet_split(LABELS, 25, alpha=1),
    ):
        taken = np.concatenate(shares)
        assert len(np.unique(taken)) == len(taken) == 5000
    assert max(len(np.unique(LABELS[s])) for s in shard_split(LABELS, 50)) <= 4
    assert {len(s) for s in dirichlet_split(LABELS, 30, alpha=0.1)} == {166}

    def classes(shares):
        counts = np.array([np.bincount(LABELS[s], minlength=10) for s in shares])
        return ((counts / counts.sum(1, keepdims=True)) ** 2).sum(1)

    # The expected sum of squares of Dirichlet(alpha * p): (sum p^2 + 1 / alpha) / (1 + 1 / alpha),
    # of the first clients, before classes run out.
    for alpha in (0.1, 1.0, 100.0):
        found = np.mean(
            [classes(dirichlet_split(LABELS, 100, alpha=alpha, seed=s))[:20] for s in range(10)]
        )
        assert abs(found - (0.1 + 1 / alpha) / (1 + 1 / alpha)) < 0.05, alpha


def test_a_round_holds_each_example_of_its_clients_once_an_epoch():
    data = Columns((), {"x": np.arange(40)})
    shares = [np.arange(0, 3), np.arange(3, 10), np.arange(10, 40)]
    options = {"clients_per_round": 2, "batch_size": 4, "epochs": 2, "seed": 3, "prefetch": 0}
    stream = client_batches(data, shares, **options)
    seen = set()
    for _ in range(6):
        batch = next(stream)
        assert batch["x"].shape == batch["weight"].shape == (2, 16, 4)
        for place, client in enumerate(batch["client"]):
            rows = batch["index"][place][batch["weight"][place] > 0]
            np.testing.assert_array_equal(np.sort(rows), np.sort(np.tile(shares[client], 2)))
            first = rows[: len(shares[client])]
            np.testing.assert_array_equal(np.sort(first), shares[client])  # epoch after epoch
        seen |= set(batch["client"].tolist())
    assert seen == {0, 1, 2}
    state, following = stream.get_state(), next(stream)
    again = client_batches(data, shares, **options)
    again.set_state(state)
    chex.assert_trees_all_equal(next(again), following)
    shorter = next(client_batches(data, shares, **options | {"max_steps": 5}))
    assert shorter["x"].shape == (2, 5, 4)


def test_clients_drop_out_and_are_drawn_independently():
    data = Columns((), {"x": np.arange(100)})
    shares = [np.arange(i, 100, 50) for i in range(50)]
    stream = client_batches(
        data, shares, clients_per_round=10, batch_size=2, independent=True, slots=30, prefetch=0
    )
    counts = np.array([(next(stream)["client"] >= 0).sum() for _ in range(400)])
    assert abs(counts.mean() - 10) < 5 * np.sqrt(8 / 400)
    assert abs(counts.var() / 8 - 1) < 0.4  # fixed sampling has none
    stream = client_batches(
        data, shares, clients_per_round=10, batch_size=2, dropout=0.3, prefetch=0
    )
    batches = [next(stream) for _ in range(200)]
    present = np.array([b["client"] >= 0 for b in batches])
    np.testing.assert_array_equal(present, np.array([b["weight"].sum((1, 2)) for b in batches]) > 0)
    assert abs(present.mean() - 0.7) < 5 * np.sqrt(0.21 / 2000)


def test_clients_that_do_not_fit_are_named():
    data = Columns((), {"x": np.arange(10)})
    shares = [np.arange(4), np.zeros(0, int), np.array([9, 10])]
    with pytest.raises(ValueError, match=r"clients \[1\] have no examples.*clients \[2\] have ex"):
        client_batches(data, shares, clients_per_round=2, batch_size=2)
    with pytest.raises(ValueError, match=r"dropout=1.*give slots"):
        client_batches(
            data, shares[:1], clients_per_round=1, batch_size=2, dropout=1, independent=True
        )
    with pytest.raises(ValueError, match="10 examples do not make 20 parts"):
        even_split(10, 20)
    with pytest.raises(ValueError, match="alpha=0"):
        dirichlet_split(LABELS, 10, alpha=0)
