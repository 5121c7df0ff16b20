"""Optimizers beside AdamW: their papers' formulas, and layers of a scan each by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmjax
from fmjax.methods.optimizers import adafactor, hidden_matrix, lamb, layer_by_layer, lion, muon
from fmjax.train import adamw
from fmjax.tree import flatten, stack_layers, unstack_layers


def variables_of_bert():
    config = fmjax.models.family_of("bert").Config(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=8,
    )  # fmt: skip
    return fmjax.create("bert", config, head="masked_lm", rng=jax.random.key(0))[1]["params"]


def updates_of(tx, params, seed=0):
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    return tx.update(grads, tx.init(params), params)[0], grads


def test_matrices_take_orthogonal_steps_and_the_rest_adamws():
    params = variables_of_bert()
    rate, decay = 0.1, 0.01
    ours, _ = updates_of(muon(rate, weight_decay=decay), params)
    adamws, _ = updates_of(adamw(rate, weight_decay=decay), params)
    matrices = 0
    for path, update in flatten(ours).items():
        if not hidden_matrix(path):
            np.testing.assert_allclose(update, flatten(adamws)[path], rtol=1e-5, err_msg=path)
            continue
        matrices += 1
        step = update / rate + decay * flatten(params)[path]
        values = np.linalg.svd(step, compute_uv=False) / (0.2 * np.sqrt(max(step.shape)))
        # Five iterations of Newton-Schulz leave singular values between 0.5 and 1.5 (Jordan 2024),
        # and of the smallest ones of a gradient somewhat less.
        assert values.max() < 1.5, path
        assert np.median(values) > 0.5, path
    assert matrices == 3 * 6


def every(rate):
    """Each of them; Adafactor factors even these small matrices."""
    return {
        "muon": muon(rate),
        "lamb": lamb(rate, weight_decay=0.1),
        "adafactor": adafactor(rate, min_dim_size_to_factor=8, weight_decay=0.1),
        "lion": lion(rate, max_grad_norm=1e9),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "lamb",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("muon", "adafactor", "lion")),
    ],
)
def test_scanned_layers_take_the_same_steps(name):
    params = variables_of_bert()
    tx = every(0.1)[name]
    loop, grads = updates_of(tx, params)
    stacked = {"params": params}, {"params": grads}
    stacked_params, stacked_grads = (stack_layers(tree)["params"] for tree in stacked)
    scanned, _ = tx.update(stacked_grads, tx.init(stacked_params), stacked_params)
    again = flatten(unstack_layers({"params": scanned})["params"])
    for path, update in flatten(loop).items():
        np.testing.assert_allclose(again[path], update, atol=1e-5, err_msg=path)


def test_it_takes_a_schedule():
    params = variables_of_bert()
    tx = muon(optax.linear_schedule(0.0, 1.0, 10))
    first, _ = updates_of(tx, params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(first))


def kernel_and_bias(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    params = {"params": {"head": {"kernel": draw(3, 4), "bias": draw(4)}}}
    return params, [jax.tree.map(lambda x: draw(*x.shape), params) for _ in range(3)]


def taken(tx, params, grads):
    """The weights after each step, flat."""
    state, steps = tx.init(params), []
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        steps.append(flatten(params))
    return steps


def test_lamb_is_its_paper():
    params, grads = kernel_and_bias()
    rate, decay, b1, b2, eps = 0.1, 0.3, 0.8, 0.9, 1e-3
    tx = lamb(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, max_grad_norm=1e9)
    steps = taken(tx, params, grads)
    for path, w in flatten(params).items():
        m = v = np.zeros_like(w)
        for t, g in enumerate(grads, 1):
            g = flatten(g)[path]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            r = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
            r = r + (decay * w if path.endswith("kernel") else 0)
            w = w - rate * np.linalg.norm(w) / np.linalg.norm(r) * r
            np.testing.assert_allclose(steps[t - 1][path], w, rtol=1e-5, atol=1e-6)


def test_adafactor_is_its_paper():
    params, grads = kernel_and_bias()
    rate, c, d, decay = 0.1, 0.8, 0.7, 0.2
    tx = adafactor(
        rate, decay_rate=c, threshold=d, min_dim_size_to_factor=2, weight_decay=decay,
        max_grad_norm=1e9,
    )  # fmt: skip
    steps = taken(tx, params, grads)
    rms = lambda x: np.sqrt(np.mean(x * x))  # noqa: E731
    w = params["params"]["head"]["kernel"]
    rows, columns = np.zeros(3), np.zeros(4)
    for t, g in enumerate(grads, 1):
        g = g["params"]["head"]["kernel"]
        beta = 1 - float(t) ** -c
        rows = beta * rows + (1 - beta) * (g * g).mean(1)
        columns = beta * columns + (1 - beta) * (g * g).mean(0)
        u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
        u = u / max(1, rms(u) / d)
        w = w - rate * (max(1e-3, rms(w)) * u + decay * w)
        np.testing.assert_allclose(steps[t - 1]["params/head/kernel"], w, rtol=1e-5, atol=1e-6)


def test_lion_takes_signs():
    params, grads = kernel_and_bias()
    rate, b1, b2, decay = 0.1, 0.9, 0.8, 0.2
    steps = taken(lion(rate, b1=b1, b2=b2, weight_decay=decay, max_grad_norm=1e9), params, grads)
    for path, w in flatten(params).items():
        m = np.zeros_like(w)
        for t, g in enumerate(grads, 1):
            g = flatten(g)[path]
            step = np.sign(b1 * m + (1 - b1) * g)
            m = b2 * m + (1 - b2) * g
            w = w - rate * (step + (decay * w if path.endswith("kernel") else 0))
            np.testing.assert_allclose(steps[t - 1][path], w, rtol=1e-5, atol=1e-6)


def test_matrices_of_squares_are_spared():
    params = {"params": {"layers": {"attn": {"kernel": jnp.ones((2, 256, 128))}}}}
    adam, spared = (
        sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params)))
        for tx in (adamw(0.1), adafactor(0.1))
    )
    assert adam > 2 * 2 * 256 * 128
    assert spared < 2 * (256 + 128 + 3) + 4


def test_weights_are_needed():
    with pytest.raises(ValueError, match="needs the params"):
        layer_by_layer(optax.identity()).update({}, ((), ()))


@pytest.mark.parametrize("make", [adamw, muon, lamb, adafactor, lion])
def test_a_norm_that_would_stop_or_turn_gradients_is_refused(make):
    for norm in (0, -1.0, np.nan):
        with pytest.raises(ValueError, match=f"max_grad_norm={norm} must be above 0"):
            make(0.1, max_grad_norm=norm)


def test_an_infinite_norm_clips_nothing():
    params, (grads, *_) = kernel_and_bias()
    (free,) = taken(adamw(0.1, max_grad_norm=np.inf), params, [grads])
    (large,) = taken(adamw(0.1, max_grad_norm=1e9), params, [grads])
    for path, leaf in free.items():
        np.testing.assert_array_equal(leaf, large[path])
