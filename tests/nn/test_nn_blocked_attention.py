"""Attention in blocks on CPUs: the plain one with all its derivatives, without its memory."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_kernels import assert_nothing_is_sent, check_in_a_model, laid_over, rows_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax.nn.attention import attend
from fmjax.nn.blocked_attention import SHORTEST
from fmjax.nn.fused_attention import attention_kernel, fused
from fmjax.nn.mask import Mask, make_attention_mask
from fmjax.perf.flops import count_flops
from fmjax.train import make_mesh

B, T, H, G, K = 2, 770, 4, 2, 8  # in order three blocks, the last a query shorter
PADDING = np.ones((B, T), bool)
PADDING[1, :300] = False  # on the left: the first queries of an order see nothing
APART = np.arange(T)[:, None] // 400 == np.arange(T) // 400  # two documents in a row
MASKS = {
    "none": {"causal": False},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 20},
    "padding": {"causal": False, "mask": PADDING},
    "padding, causal window": {"causal": True, "window": 270, "mask": PADDING},
    "padding, both ways": {"causal": False, "window": 30, "mask": PADDING},
    "documents": {"causal": True, "mask": PADDING[:, None] & APART},
}
QUICK = ("none", "padding, causal window")


def made(name: str, length: int = T) -> Mask | None:
    return make_attention_mask(**{"mask": None} | MASKS[name], query_length=length, key_length=T)


def operands(dtype=jnp.float32, length=T, keys=T, batch=B):
    drawn = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(drawn[0], (batch, length, H, K), dtype)
    key, value = (jax.random.normal(k, (batch, G, keys, K), dtype) for k in drawn[1:])
    return query, key, value


def weighted(mask, query, key, value, bias=None, softcap=None, rate=0.0):
    """A sum of what is attended to by queries that see something."""
    out, _ = attend(
        query, key, value, mask=mask, bias=bias, scale=0.3, softcap=softcap,
        rng=jax.random.key(1), dropout_rate=rate,
    )  # fmt: skip
    if mask is not None:
        out = out * jnp.swapaxes(mask.keep.any(-1, keepdims=True), 1, 2)
    return (jnp.sin(out) * jnp.cos(jnp.arange(K))).sum()


def compiled(kernel, function, *args):
    """Traced anew: JAX remembers what it made of a function before."""
    with attention_kernel(kernel):
        return jax.jit(lambda *args: function(*args)).lower(*args).compile()


def under(kernel, function, *args):
    return compiled(kernel, function, *args)(*args)


def marked(names, quick=QUICK):
    return [pytest.param(n, marks=[pytest.mark.slow] * (n not in quick)) for n in names]


@pytest.mark.parametrize("name", marked(MASKS))
def test_it_is_the_plain_attention(name):
    """All of its outputs, those of queries that see nothing too, and its gradients."""

    def compute(mask, *given):
        out, _ = attend(*given, mask=mask, scale=0.3)
        return out, jax.grad(weighted, argnums=(1, 2, 3))(mask, *given)

    plain, ours = (under(k, compute, made(name), *operands()) for k in ("plain", "blocked"))
    chex.assert_trees_all_close(plain, ours, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", marked(MASKS)[-3:])
def test_it_has_further_derivatives(name):
    """Gradients of gradients, and forward derivatives of the output and of gradients."""

    def compute(mask, *given):
        along = tuple(jnp.cos(x) for x in given)

        def gradient(*given):
            return jax.grad(weighted, argnums=(1, 2, 3))(mask, *given)

        def penalty(*given):
            return sum(jnp.square(part).sum() for part in gradient(*given))

        forward = jax.jvp(lambda *given: weighted(mask, *given), given, along)[1]
        return forward, jax.jvp(gradient, given, along)[1], jax.grad(penalty, (0, 1, 2))(*given)

    plain, ours = (under(k, compute, made(name), *operands()) for k in ("plain", "blocked"))
    for one, other in zip(*map(jax.tree.leaves, (plain, ours)), strict=True):
        assert jnp.abs(one - other).max() <= 1e-5 * jnp.abs(one).max()  # measured: 1e-6


SPECIAL = {  # shapes of biases, caps and rates
    "dropped": (None, None, 0.25),
    "biased, dropped": ((1, H, T, T), None, 0.25),
    "biased by keys": ((1, H, 1, T), None, 0.0),
    "biased, capped": ((B, H, T, T), 2.0, 0.0),
    "capped": (None, 2.0, 0.0),
}


@pytest.mark.parametrize("special", marked(SPECIAL, ("biased, dropped",)))
@pytest.mark.parametrize("name", marked(QUICK, QUICK[1:]))
def test_what_other_kernels_lack(name, special):
    """Gradients and their forward derivatives with biases, caps, and what the same key drops."""
    shape, softcap, rate = SPECIAL[special]
    drawn = [] if shape is None else [jax.random.normal(jax.random.key(2), shape)]
    given = (*operands(), *drawn)

    def compute(mask, softcap, rate, *given):
        which = range(1, 1 + len(given))
        gradient = jax.grad(partial(weighted, softcap=softcap, rate=rate), argnums=which)
        along = tuple(jnp.cos(x) for x in given)
        return jax.jvp(lambda *given: gradient(mask, *given), given, along)

    special = partial(compute, made(name), softcap, rate)
    plain, ours = (under(k, special, *given) for k in ("plain", "blocked"))
    for one, other in zip(*map(jax.tree.leaves, (plain, ours)), strict=True):
        assert jnp.abs(one - other).max() <= 1e-5 * jnp.abs(one).max()  # measured: 2e-6
    usual = under("blocked", partial(compute, made(name), None, 0.0), *operands())[0]
    for one, other in zip(usual, ours[0], strict=False):
        assert jnp.abs(one - other).max() > 0.02 * jnp.abs(one).max()


@pytest.mark.slow
def test_rows_that_see_nothing_at_all():
    """Of a mask without order they attend to all alike, in the gradients too."""
    mask = Mask(jnp.asarray(np.arange(B) > 0)[:, None, None, None] & jnp.ones((1, 1, 1, T), bool))

    def compute(*given):
        return attend(*given, mask=mask, scale=0.3)[0]

    def gradient(*given):
        return jax.grad(lambda *given: jnp.sin(compute(*given)).sum(), (0, 1, 2))(*given)

    for function in (compute, gradient):
        plain, ours = (under(k, function, *operands()) for k in ("plain", "blocked"))
        chex.assert_trees_all_close(plain, ours, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 600])
def test_other_states(length):
    """Whose length is its own."""
    mask = made("padding", length)
    gradient = jax.grad(weighted, argnums=(1, 2, 3))
    plain, ours = (under(k, gradient, mask, *operands(length=length)) for k in ("plain", "blocked"))
    chex.assert_trees_all_close(plain, ours, rtol=1e-5, atol=2e-6)


def test_bfloat16_is_nearer_to_float32_than_the_plain_way():
    exact = under("plain", weighted_gradient, *operands())
    low = operands(jnp.bfloat16)
    plain, ours = (under(kernel, weighted_gradient, *low) for kernel in ("plain", "blocked"))
    for reference, one, other in zip(exact, plain, ours, strict=True):
        assert one.dtype == other.dtype == jnp.bfloat16
        errors = [jnp.abs(x.astype(jnp.float32) - reference).mean() for x in (one, other)]
        assert errors[1] <= errors[0]


def weighted_gradient(*given):
    return jax.grad(weighted, argnums=(1, 2, 3))(made("causal"), *given)


def test_it_holds_no_scores_of_all_pairs():
    given, bytes_of, texts = operands(batch=4), {}, {}
    for kernel in ("plain", "blocked"):
        run = compiled(kernel, weighted_gradient, *given)
        memory, texts[kernel] = run.memory_analysis(), run.as_text() or ""
        assert memory is not None
        bytes_of[kernel] = memory.temp_size_in_bytes
    scores = re.compile(rf"f32\[(\d+,)+{T},{T}\]")
    assert scores.search(texts["plain"])
    assert not scores.search(texts["blocked"])
    assert bytes_of["plain"] > 4 * 4 * H * T * T
    assert bytes_of["blocked"] < bytes_of["plain"] / 2


def test_it_is_chosen_where_the_operands_suit_it(monkeypatch):
    long, short = SHORTEST, SHORTEST - 1

    def chosen(*given, **of):
        return fused(*operands(*given, **({"length": long, "keys": long} | of)))

    assert jax.device_count() == 4
    assert chosen() is None  # of several devices it needs a mesh
    with jax.set_mesh(make_mesh(data=2)):
        assert chosen() == "blocked"
        assert chosen(batch=3) is None
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert chosen() == chosen(jnp.bfloat16) == "blocked"
    assert chosen(length=1) is chosen(length=short) is chosen(keys=short) is None
    assert fused(*operands(length=long, keys=long), drops_or_caps=True) == "blocked"
    with attention_kernel("blocked"):
        assert chosen(length=short, keys=2) == "blocked"
        assert chosen(length=1) is None
        query, key, value = operands()
        assert fused(query, key, value.astype(jnp.bfloat16)) is None
        assert fused(query, key, value, jnp.ones((B, 1, 1, T), bool)) == "blocked"
        assert fused(query, key, value, jnp.ones((B, H, 1, T), bool)) is None
        assert fused(query, key, value, None, jnp.zeros((1, H, T, T))) == "blocked"
        assert fused(query, key, value, None, jnp.zeros((1, 1, T, T))) is None
        assert attend(query, key, value, with_probabilities=True)[1] is not None
    with attention_kernel("plain"):
        assert chosen() is None


@pytest.mark.parametrize(
    "axes", [{"data": 2, "tensor": 2}, pytest.param({"fsdp": 2}, marks=pytest.mark.slow)]
)
def test_each_device_computes_its_own(axes):
    """Examples and heads are divided, what is dropped is the same, and nothing is sent."""
    mesh, given = laid_over(axes, operands())
    bias = jax.random.normal(jax.random.key(2), (1, H, T, T))
    gradient = jax.grad(partial(weighted, bias=bias, rate=0.25), argnums=(1, 2, 3))
    plain = under("plain", gradient, made("padding, causal window"), *operands())
    mask = jax.device_put(made("padding, causal window"), NamedSharding(mesh, P(rows_of(axes))))
    with jax.set_mesh(mesh):
        run = compiled(None, gradient, mask, *given)
        ours = run(mask, *given)
    chex.assert_trees_all_close(plain, ours, rtol=1e-5, atol=2e-6)
    assert_nothing_is_sent(run.as_text())


@pytest.mark.slow
def test_in_a_model():
    check_in_a_model("blocked", 600, "blocked_attention", lambda loss: loss)


@pytest.mark.parametrize("name", ["window", pytest.param("padding", marks=pytest.mark.slow)])
def test_its_products_are_counted(name):
    """As those of the plain way, of all pairs, and what is computed again is not."""
    given = operands()

    def out(*given):
        return attend(*given, mask=made(name))[0]

    def of_values(value):
        return out(*given[:2], value).sum()

    functions = {
        2: [out],
        3: [jax.value_and_grad(of_values)],
        6: [
            jax.value_and_grad(lambda *given: out(*given).sum(), argnums=(0, 1, 2)),
            jax.grad(lambda *given: jnp.sin(out(*given)).sum(), argnums=(0, 1, 2)),
            lambda *given: jax.jvp(out, given, given),
        ],
    }
    for kernel in ("plain", "blocked"):
        with attention_kernel(kernel):
            for products, several in functions.items():
                for function in several:
                    args = given[2:] if products == 3 else given
                    total = count_flops(function, *args).total
                    assert total == products * 2 * given[0].size * T, (kernel, products)
            batched = jax.vmap(out)
            more = [jnp.stack([part] * 3) for part in given]
            assert count_flops(batched, *more).total == 3 * 2 * 2 * given[0].size * T
