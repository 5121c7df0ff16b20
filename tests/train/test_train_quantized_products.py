"""Dense layers in 8 bits: all of their products are, and the losses are those of the others."""

import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmjax
from fmjax.methods import lora
from fmjax.models import gpt2
from fmjax.tasks import causal_lm
from fmjax.train import (
    adamw,
    cast,
    gradient,
    init_state,
    jit_step,
    layout,
    make_mesh,
    make_train_step,
    quantized_products,
)

pytest.importorskip("qwix", reason="pip install fmjax[qwix]")

LAYERS = 2
CONFIG = gpt2.Config(
    vocab_size=32, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=16,
    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip
DENSE = 6  # of a block: query, key, value, out, up, down


def products(jaxpr, times=1):
    """How often operands of which types are multiplied, the first branch's of platforms."""
    count = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            count[tuple(x.aval.dtype.name for x in eqn.invars)] += times
        runs = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
        inner = [
            getattr(x, "jaxpr", x)
            for value in eqn.params.values()
            for x in (value if isinstance(value, tuple) else (value,))
            if hasattr(getattr(x, "jaxpr", x), "eqns")
        ]
        for sub in inner[:1] if eqn.primitive.name == "cond" else inner:
            count += products(sub, runs)
    return count


def made(scan=False, remat="none"):
    return fmjax.create(
        "gpt2", CONFIG, head="causal_lm", rng=jax.random.key(0), scan=scan, remat=remat
    )


def batches(count, rows=8):
    """Runs of neighbours: what follows is known after a look at two."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        start, step = rng.integers(0, 32, (rows, 1)), rng.integers(1, 4, (rows, 1))
        ids = (start + step * np.arange(16)) % 32
        yield {"input_ids": ids, "weight": np.ones(rows, np.float32)}


def test_rows_may_have_the_kernels_shape():
    """32 tokens of a width of 32."""
    model, variables = made()
    batch = next(batches(1, rows=CONFIG.n_embd // 16))
    loss = quantized_products(causal_lm.loss(model), "int8")
    grads, _ = jax.eval_shape(jax.grad(loss, has_aux=True), variables, batch, jax.random.key(0))
    assert jax.tree.structure(grads) == jax.tree.structure(variables)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("precision", [jnp.float32, jnp.bfloat16])
def test_every_product_of_dense_layers(scan, precision):
    """Forward, and both gradients; of the head and of attention none."""
    model, variables = made(scan)

    def traced(loss):
        batch = next(batches(1))
        grad_fn = gradient(cast(loss, precision))
        return products(jax.make_jaxpr(grad_fn)(variables, {}, batch, jax.random.key(0)).jaxpr)

    loss = causal_lm.loss(model)
    int8 = traced(quantized_products(loss, "int8"))
    assert int8["int8", "int8"] == 3 * DENSE * LAYERS
    float8 = traced(quantized_products(loss, "float8"))
    assert float8["float8_e4m3fn", "float8_e4m3fn"] == DENSE * LAYERS
    assert float8["float8_e5m2", "float8_e4m3fn"] == 2 * DENSE * LAYERS
    as_before = traced(loss)
    other = int8.total() - int8["int8", "int8"]
    assert other == as_before.total() - 3 * DENSE * LAYERS > 0


def test_what_is_recomputed_and_adapted():
    model, variables = made(remat="block")
    loss = quantized_products(causal_lm.loss(model), "int8")
    batch, key = next(batches(1)), jax.random.key(0)
    again = products(jax.make_jaxpr(gradient(loss))(variables, {}, batch, key).jaxpr)
    assert again["int8", "int8"] > 3 * DENSE * LAYERS
    adapted = lora.add(variables, key, rank=2, alpha=4.0)  # of queries and values
    count = products(jax.make_jaxpr(lambda v: loss(v, batch, key)[0])(adapted).jaxpr)
    assert count["int8", "int8"] == (DENSE - 2) * LAYERS


@pytest.mark.parametrize("dtype", ["int8", pytest.param("float8", marks=pytest.mark.slow)])
def test_losses_and_gradients_are_near(dtype):
    model, variables = made(scan=True)
    loss = causal_lm.loss(model)
    exact, low = loss, quantized_products(loss, dtype)
    batch, key = next(batches(1)), jax.random.key(0)
    one, other = (jax.jit(gradient(fn))(variables, {}, batch, key)[0] for fn in (exact, low))
    cosines = jax.tree.map(
        lambda a, b: jnp.sum(a * b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b) + 1e-20),
        one["params"]["layers"]["mlp"], other["params"]["layers"]["mlp"],
    )  # fmt: skip
    assert min(jax.tree.leaves(cosines)) > 0.99  # measured: 0.9999, and 0.998 of float8
    ends = {}
    for name, fn in (("exact", exact), ("low", low)):
        tx = adamw(1e-2)
        step = jit_step(make_train_step(gradient(fn), tx))
        state = init_state(jax.tree.map(jnp.copy, variables), tx, key)
        losses = []
        for batch in batches(80):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"].value))
        assert losses[-1] < 0.5 * losses[0]
        ends[name] = np.mean(losses[-20:])
    assert abs(ends["low"] / ends["exact"] - 1) < 0.05  # measured: 0.001, and 0.016 of float8


@pytest.mark.slow
def test_over_a_mesh():
    model, variables = made(scan=True)
    tx = adamw(1e-3)
    train_step = make_train_step(gradient(quantized_products(causal_lm.loss(model), "int8")), tx)
    losses = []
    for mesh in (None, make_mesh(data=2, tensor=2)):
        state = init_state(jax.tree.map(jnp.copy, variables), tx, jax.random.key(0))
        places = None if mesh is None else layout(state, mesh)
        step = jit_step(train_step, mesh, state_shardings=places)
        state = state if places is None else jax.device_put(state, places)
        losses.append([])
        for batch in batches(5):
            state, metrics = step(state, batch)
            losses[-1].append(float(metrics["loss"].value))
    # Sums in another order may be rounded to the next of 255 levels.
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_bad_input(monkeypatch):
    loss = causal_lm.loss(gpt2.Model(CONFIG, head="causal_lm"))
    with pytest.raises(ValueError, match="dtype='int4'; choose 'int8' or 'float8'"):
        quantized_products(loss, "int4")  # pyright: ignore[reportArgumentType]
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"pip install fmjax\[qwix\]"):
        quantized_products(loss, "int8")
