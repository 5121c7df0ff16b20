"""The chunked loss against the plain one: value, gradients, memory, and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import PartitionSpec as P

from fmjax.nn.product import matmul
from fmjax.tasks.vocabulary_loss import (
    IGNORED,
    cut,
    log_likelihood,
    over_vocabulary,
    vocabulary_loss,
)
from fmjax.train import (
    accumulate,
    all_reduce,
    cast,
    gradient,
    init_state,
    jit_step,
    make_mesh,
    make_train_step,
    pmap_step,
    shardings,
)
from fmjax.types import Aux

B, T, D, V = 4, 13, 8, 52


def make(seed=0):
    draw = np.random.default_rng(seed)
    params = {
        "kernel": draw.normal(size=(D, V)).astype(np.float32),
        "bias": draw.normal(size=V).astype(np.float32),
        "unused": np.ones(3, np.float32),
    }
    hidden = draw.normal(size=(B, T, D)).astype(np.float32)
    labels = draw.integers(0, V, (B, T)).astype(np.int32)
    weights = (draw.random((B, T)) > 0.3).astype(np.float32) * draw.random((B, T)).astype("f")
    return params, hidden, np.where(weights == 0, IGNORED, labels), weights


def unembed_of(params):
    return lambda hidden: matmul(hidden, params["kernel"]) + params["bias"]


def chunked(params, hidden, labels, weights, **settings):
    settings = {"chunk_size": 16, **settings}
    return vocabulary_loss(unembed_of(params), hidden, labels, weights, **settings)


def plain(params, hidden, labels, weights, label_smoothing=0.0, z_loss=0.0):
    logits = unembed_of(params)(hidden)
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    losses = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(-1)
    losses += z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(losses * weights) / jnp.sum(weights)


@pytest.mark.parametrize("chunk_size", [1, 16, 20, 10_000])
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}])
def test_value_and_gradients_equal_the_plain_loss(chunk_size, settings):
    params, hidden, labels, weights = make()

    def ours(params, hidden):
        return chunked(
            params, hidden, labels, weights, chunk_size=chunk_size, **settings
        ).loss.value

    value, grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(params, hidden)
    expected, reference = jax.value_and_grad(plain, (0, 1))(
        params, hidden, labels, weights, **settings
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, reference)
    alone = jax.jit(ours)(params, hidden)  # without a gradient another program runs
    np.testing.assert_allclose(alone, expected, rtol=1e-6)
    far = jax.grad(lambda params: 3.0 * ours(params, hidden) + 1.0)(params)
    np.testing.assert_allclose(far["kernel"], 3.0 * grads[0]["kernel"], atol=1e-6)


def test_equals_pytorch():
    params, hidden, labels, _ = make()
    ours = chunked(params, hidden, labels, labels != IGNORED, label_smoothing=0.2)
    logits = torch.tensor(np.array(unembed_of(params)(hidden))).reshape(-1, V)
    target = torch.tensor(labels).long().flatten()
    functional = torch.nn.functional
    np.testing.assert_allclose(
        ours.loss.value,
        functional.cross_entropy(logits, target, label_smoothing=0.2).item(),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        ours.nll.value, functional.cross_entropy(logits, target).item(), rtol=1e-6
    )
    right = (logits.argmax(-1) == target)[target != IGNORED]
    np.testing.assert_allclose(ours.accuracy.value, right.float().mean().item(), rtol=1e-6)
    assert float(ours.loss.weight) == (labels != IGNORED).sum()


def test_gradient_of_the_weights_is_the_loss_of_each_token():
    params, hidden, labels, _ = make()
    weights = np.ones((B, T), np.float32)
    labels = np.maximum(labels, 0)
    by_weight = jax.grad(lambda w: chunked(params, hidden, labels, w).loss.total)(weights)
    likelihood = log_likelihood(unembed_of(params), hidden, labels, chunk_size=16)
    np.testing.assert_allclose(by_weight, -likelihood, rtol=1e-5)


def test_log_likelihood_and_its_gradient():
    params, hidden, labels, _ = make()
    labels = np.maximum(labels, 0)
    mix = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)

    def ours(params, hidden):
        return jnp.sum(mix * log_likelihood(unembed_of(params), hidden, labels, chunk_size=12))

    def reference(params, hidden):
        log_p = jax.nn.log_softmax(unembed_of(params)(hidden))
        return jnp.sum(mix * jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0])

    a, b = (jax.value_and_grad(f, (0, 1))(params, hidden) for f in (ours, reference))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)
    with pytest.raises(ValueError, match=r"per_token\[0\] has shape \(2, 3\)"):
        over_vocabulary(unembed_of(params), lambda x, y: y, hidden, jnp.zeros((2, 3)))


def test_ignored_tokens_may_be_anything():
    params, hidden, labels, weights = make()
    bad = np.where(weights[..., None] == 0, np.nan, hidden).astype(np.float32)

    def ours(params, hidden):
        return chunked(params, hidden, labels, weights).loss.value

    a = jax.value_and_grad(ours, (0, 1))(params, hidden)
    b = jax.value_and_grad(ours, (0, 1))(params, bad)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    none = chunked(params, bad, labels, np.zeros((B, T)))
    assert float(none.loss.value) == 0.0 == float(none.loss.weight)


def test_a_label_outside_the_vocabulary_is_loud():
    params, hidden, labels, weights = make()
    at = tuple(np.argwhere(weights > 0)[0])
    for wrong in (V, -1):
        labels[at] = wrong
        assert np.isnan(chunked(params, hidden, labels, weights).loss.value)


def test_equal_logits_are_not_all_right():
    params, hidden, labels, _ = make()
    flat = jax.tree.map(jnp.zeros_like, params)
    labels = np.maximum(labels, 0)
    accuracy = chunked(flat, hidden, labels, np.ones((B, T))).accuracy.value
    np.testing.assert_allclose(accuracy, (labels == 0).mean())


def test_bfloat16_sums_gradients_in_float32():
    params, hidden, labels, weights = make()
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    states = jnp.asarray(hidden, jnp.bfloat16)

    def gradient_of(chunk_size):
        return jax.grad(
            lambda p: chunked(p, states, labels, weights, chunk_size=chunk_size).loss.value
        )(low)["kernel"]

    exact = jax.grad(plain)(
        jax.tree.map(lambda x: x.astype(jnp.float32), low), states, labels, weights
    )["kernel"]
    assert gradient_of(4).dtype == jnp.bfloat16
    scale = np.abs(exact).max()
    # logits' gradients and the result are rounded to 8 bits (2^-9 each); 13 chunks add no more
    np.testing.assert_allclose(gradient_of(4).astype(jnp.float32), exact, atol=2**-7 * scale)


def loss_fn(variables, batch, rng):
    hidden = jnp.tanh(batch["x"] @ variables["params"]["body"])
    found = chunked(variables["params"], hidden, batch["labels"], batch["w"])
    return found.loss.value, Aux(found.loss.weight, {"accuracy": found.accuracy}, {})


def test_over_devices_equals_one():
    params, hidden, labels, weights = make()
    params["body"] = np.random.default_rng(2).normal(size=(D, D)).astype(np.float32)
    batch = {"x": hidden, "labels": labels, "w": weights}
    tx = optax.sgd(1.0)

    def start():
        return init_state(jax.tree.map(jnp.asarray, {"params": params}), tx, jax.random.key(0))

    def result(step):
        return jax.device_get(step(start(), batch)[0].trainable["params"])

    mesh = make_mesh(data=2, words=2)
    split = shardings(
        jax.eval_shape(start), mesh, [("kernel", P(None, "words")), ("bias", P("words"))]
    )
    step = make_train_step(gradient(loss_fn), tx)
    reference = result(jit_step(step))
    mapped = jax.shard_map(
        make_train_step(all_reduce(gradient(loss_fn), "data"), tx),
        mesh=make_mesh(data=4),
        in_specs=(P(), P("data")),
        out_specs=(P(), P()),
        check_vma=False,
    )
    for other in (
        result(jit_step(step, mesh, state_shardings=split)),
        result(pmap_step(gradient(loss_fn), tx)),
        result(jax.jit(mapped)),
        result(jit_step(make_train_step(accumulate(gradient(loss_fn), 2), tx))),
        result(jit_step(make_train_step(gradient(jax.checkpoint(loss_fn)), tx))),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other, reference)
    low = result(jit_step(make_train_step(gradient(cast(loss_fn, jnp.bfloat16)), tx)))
    np.testing.assert_allclose(low["kernel"], reference["kernel"], atol=0.02)


def test_frozen_words_get_no_gradient_buffer():
    params, hidden, labels, weights = make()

    def ours(hidden, params):
        return chunked(params, hidden, labels, weights).loss.value

    text = jax.jit(jax.grad(ours)).lower(hidden, params).compile().as_text()
    loops = [line for line in text.splitlines() if " while(" in line]
    assert loops
    # The kernel is read in the loop; its gradient, which nobody asked for, is not summed there.
    assert all(line.split(" while(")[0].count(f"f32[{D},{V}]") <= 1 for line in loops), loops


def test_logits_of_the_whole_batch_are_never_there():
    rows, length, width, words = 8, 256, 16, 4096
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((width, words), jnp.float32),
            ((rows, length, width), jnp.float32),
            ((rows, length), jnp.int32),
            ((rows, length), jnp.float32),
        )
    ]
    whole = rows * length * words * 4

    def ours(kernel, *rest):
        return vocabulary_loss(lambda h: matmul(h, kernel), *rest, chunk_size=128).loss.value

    def reference(kernel, *rest):
        return plain({"kernel": kernel, "bias": jnp.zeros(words)}, *rest)

    def temporaries(fn):
        compiled = jax.jit(jax.value_and_grad(fn, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(ours) < whole / 4
    assert temporaries(reference) >= whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing is 1\.0"),
        ({"z_loss": -1.0}, r"z_loss is -1\.0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"labels": np.zeros((B, T + 1), np.int32)}, r"labels has shape \(4, 14\)"),
        ({"hidden": np.zeros((B, T), np.float32)}, r"hidden has shape \(4, 13\)"),
    ],
)
def test_bad_settings_are_named(change, message):
    params, hidden, labels, weights = make()
    arrays = {"hidden": hidden, "labels": labels, "weights": weights}
    with pytest.raises(ValueError, match=message):
        vocabulary_loss(unembed_of(params), **{**arrays, **change})


def test_chunks_count_the_tokens_of_a_device():
    """On a mesh each chunk costs a gather of the head and a sum of its gradient."""
    hidden = jnp.zeros((8, 16, 2))
    assert cut((hidden,), chunk_size=16)[0].shape == (8, 8, 2, 2)
    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        assert cut((hidden,), chunk_size=16)[0].shape == (4, 8, 4, 2)
