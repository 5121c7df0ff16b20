"""The layer of experts against each token sent to its own experts alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close

from fmjax.nn.moe import (
    ExpertKernels,
    Experts,
    mix_experts,
    route,
    sent_to_experts,
    spread_experts,
)
from fmjax.perf.flops import count_flops

N, D, F, E = 11, 6, 10, 5


def draw(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    kernels = ExpertKernels(normal(E, D, F), normal(E, D, F), normal(E, F, D))
    return normal(N, D), normal(N, E), kernels


def token_by_token(x, logits, kernels, top_k):
    """Softmax over all experts, the largest renormalised, each token through its own."""
    rows = []
    for token, scores in zip(x, logits, strict=True):
        probabilities = jax.nn.softmax(scores)
        chosen = np.argsort(-np.asarray(scores), kind="stable")[:top_k]
        row = 0.0
        for e in chosen:
            hidden = jax.nn.silu(token @ kernels.gate[e]) * (token @ kernels.up[e])
            row += probabilities[e] / probabilities[chosen].sum() * (hidden @ kernels.down[e])
        rows.append(row)
    return jnp.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_value_and_gradient_are_exact(top_k):
    x, logits, kernels = draw()
    g = np.random.default_rng(1).normal(size=(N, D))

    def ours(x, logits, kernels):
        return mix_experts("silu", x, route(logits, top_k), kernels)

    with jax.default_matmul_precision("highest"):
        value = token_by_token(x, logits, kernels, top_k)
        chosen = np.argsort(-np.asarray(logits), kind="stable")[:, :top_k]

        def theirs(x, logits, kernels):
            probabilities = jax.nn.softmax(logits)
            picked = jnp.take_along_axis(probabilities, chosen, axis=1)
            shares = picked / picked.sum(axis=1, keepdims=True)
            hidden = jax.nn.silu(jnp.einsum("nd,nkdf->nkf", x, kernels.gate[chosen]))
            hidden = hidden * jnp.einsum("nd,nkdf->nkf", x, kernels.up[chosen])
            return jnp.einsum("nkf,nkfd,nk->nd", hidden, kernels.down[chosen], shares)

        def grads(fn):
            return jax.jit(jax.grad(lambda *a: jnp.vdot(fn(*a), g), argnums=(0, 1, 2)))

        def sent(x, logits, kernels):
            with sent_to_experts():
                return spread_experts("silu", x, logits, top_k, kernels)

        expected = grads(theirs)(x, logits, kernels)
        for fn in (ours, sent):
            np.testing.assert_allclose(jax.jit(fn)(x, logits, kernels), value, rtol=2e-4, atol=1e-4)
            assert_trees_all_close(grads(fn)(x, logits, kernels), expected, rtol=1e-4, atol=1e-4)


def test_an_expert_that_nobody_chose_is_not_read():
    x, logits, kernels = draw()
    logits = logits.at[:, 3].set(-100.0)
    poisoned = ExpertKernels(*(kernel.at[3].set(jnp.nan) for kernel in kernels))

    @jax.jit
    def run(x, logits, kernels):
        return jax.value_and_grad(
            lambda x, k: mix_experts("silu", x, route(logits, 2), k).sum(), argnums=(0, 1)
        )(x, kernels)

    value, (dx, dkernels) = run(x, logits, poisoned)
    assert np.isfinite(value)
    assert np.isfinite(dx).all()
    for kernel in dkernels:
        assert not kernel[3].any()
        assert kernel[2].any()


def test_one_program_serves_every_routing():
    x, logits, kernels = draw()
    traces = []

    @jax.jit
    def run(logits):
        traces.append(1)
        return mix_experts("silu", x, route(logits, 2), kernels)

    first = run(logits)
    assert not np.allclose(run(-logits), first)
    assert len(traces) == 1


def test_tokens_stay_on_their_devices():
    """Sharded over the batch, each device computes its own tokens: no tokens are gathered."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    x, logits, kernels = draw()
    x, shares = x[:8], route(logits[:8], 2)

    def loss(x, shares, kernels):
        return jnp.sin(mix_experts("silu", x, shares, kernels)).sum()

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
    sharded = jax.jit(
        grad, in_shardings=(rows, rows, whole), out_shardings=(whole, (rows, rows, whole))
    )
    text = sharded.lower(x, shares, kernels).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert_trees_all_close(
        sharded(x, shares, kernels), jax.jit(grad)(x, shares, kernels), rtol=1e-4, atol=1e-4
    )


def test_half_precision_is_near():
    x, logits, kernels = draw()
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x, kernels))
    out = mix_experts("silu", low[0], route(logits, 2), low[1])
    assert out.dtype == jnp.bfloat16
    full = mix_experts("silu", x, route(logits, 2), kernels)
    scale = float(jnp.abs(full).max())
    np.testing.assert_allclose(np.asarray(out, np.float32), full, atol=0.02 * scale)
    grads = jax.grad(lambda k: mix_experts("silu", low[0], route(logits, 2), k).sum())(low[1])
    assert all(kernel.dtype == jnp.bfloat16 for kernel in grads)


def test_shares_sum_to_one_over_the_largest():
    _, logits, _ = draw()
    shares = np.asarray(route(logits, 2))
    assert ((shares > 0).sum(axis=1) == 2).all()
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-6)


def test_sent_tokens_cost_their_own_experts_alone():
    layer, x = Experts(8, 2, F, "silu"), jax.ShapeDtypeStruct((2, N, D), jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    needed = 2 * 2 * N * (2 * 3 * D * F + D * 8)  # of two experts, and of the router
    with sent_to_experts():
        run = lambda v, x: layer.apply(v, x)[0].sum()  # noqa: E731
        assert count_flops(run, variables, x).total == needed
        grad = jax.value_and_grad(run, argnums=(0, 1))
        assert count_flops(grad, variables, x).total == 3 * needed
    assert count_flops(lambda v, x: layer.apply(v, x)[0].sum(), variables, x).total > 3 * needed
