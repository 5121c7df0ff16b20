"""Kernels in two factors: the best ones, fewer numbers and products, and adapters on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from made_up import made

from fmjax.methods import lora
from fmjax.methods.adapted_layers import merge_adapters
from fmjax.methods.low_rank import factorise
from fmjax.methods.pruning import masked, n_of_m_masks
from fmjax.methods.selection import gradual_unfreezing, layerwise_decay
from fmjax.nn.compact import Factors, whole_arrays
from fmjax.perf.flops import count_flops
from fmjax.train import adamw
from fmjax.tree import count_parameters, flatten, stack_layers, unstack_layers

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def test_full_rank_is_the_model_and_less_is_really_less():
    model, variables = made("mlp", "classification")  # 3 x 8 and 8 x 2
    apply = jax.jit(lambda variables: model.apply(variables, X).logits)
    plain = apply(variables)
    full = factorise(variables, targets=("dense_0", "head"), energy=1.0)
    assert flatten(full) == flatten(variables)  # nothing would become smaller
    full = factorise(factorise(variables, targets=("dense_0",), rank=3), targets=("head",), rank=2)
    np.testing.assert_allclose(apply(full), plain, rtol=1e-5, atol=1e-6)
    thin = factorise(variables, targets=("dense_0",), rank=1)
    np.testing.assert_allclose(apply(thin), apply(whole_arrays(thin)), rtol=1e-5, atol=1e-6)
    assert count_parameters(variables) - count_parameters(thin) == 3 * 8 - (3 + 8)
    flops = [count_flops(lambda v: model.apply(v, X).logits, v).total for v in (variables, thin)]
    assert flops[0] - flops[1] == 2 * 4 * (3 * 8 - (3 + 8))


def test_factors_are_the_best_of_their_rank():
    """The distance to the kernel is what the left out singular values say (Eckart & Young)."""
    draw = np.random.default_rng(0)
    kernel = draw.normal(size=(2, 10, 3)) @ draw.normal(size=(2, 3, 12))
    variables = {
        "params": {"layers": {"mlp": {"up": {"kernel": jnp.asarray(kernel, jnp.float32)}}}}
    }
    values = np.linalg.svd(kernel, compute_uv=False)
    for rank in (1, 2, 3):
        kept = flatten(factorise(variables, targets=("layers/mlp/up",), rank=rank))
        factors = kept["params/layers/mlp/up/kernel"]
        assert (factors.down.shape, factors.up.shape) == ((2, 10, rank), (2, rank, 12))
        assert (factors.shape, factors.size) == (kernel.shape, 2 * rank * 22)
        off = np.linalg.norm(np.asarray(factors.array()) - kernel, axis=(1, 2))
        left = np.sqrt(np.square(values[:, rank:]).sum(-1))
        np.testing.assert_allclose(off, left, rtol=1e-4, atol=1e-4)
    shares = np.cumsum(np.square(values), -1) / np.square(values).sum(-1, keepdims=True)
    for energy in (0.3, 0.6, 0.9, 1.0):
        by = flatten(factorise(variables, targets=("*/up",), energy=energy))
        factors = by["params/layers/mlp/up/kernel"]
        expected = max(int(np.argmax(share >= energy - 1e-9)) + 1 for share in shares)
        assert factors.down.shape[-1] == expected
    # A layer's own factors are those of the stack.
    alone = factorise(unstack_layers(variables), targets=("*/up",), rank=2)
    stacked = factorise(variables, targets=("*/up",), rank=2)
    jax.tree.map(np.testing.assert_array_equal, stack_layers(alone), stacked)


@pytest.mark.slow
def test_adapters_on_factors():
    model, variables = made("mlp", "classification")
    thin = factorise(variables, targets=("dense_0",), rank=2)
    adapted = lora.add(
        thin, jax.random.key(0), rank=1, alpha=1.0, targets=("dense_0",), weight_decomposed=True
    )
    adapted["adapters"] = jax.tree.map(lambda x: x + 0.1, adapted["adapters"])
    apply = jax.jit(lambda variables: model.apply(variables, X).logits)
    merged = merge_adapters(adapted)
    assert not any(isinstance(leaf, Factors) for leaf in flatten(merged).values())
    np.testing.assert_allclose(apply(merged), apply(adapted), rtol=1e-5, atol=1e-6)


def test_optimizers_see_factors_as_the_kernel_they_stand_for():
    """Decay, rates by depth, and masks of other kernels; all from gradients of 0."""
    kernel = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    block = {"up": {"kernel": jnp.asarray(kernel)}, "down": {"kernel": jnp.asarray(kernel)}}
    whole = {"params": {"layers_0": block, "head": {"bias": jnp.ones(2)}}}
    thin = factorise(whole, targets=("*/up",), rank=2)
    masks = n_of_m_masks(whole, targets=("*/down/kernel",))
    tx = optax.chain(
        adamw(1.0, weight_decay=0.5),
        layerwise_decay(0.5, thin),
        gradual_unfreezing(optax.identity(), thin, starts=[0]),
    )
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, thin), tx.init(thin), thin)
    found, before = flatten(updates), flatten(thin)
    for place in ("up", "down"):
        path = f"params/layers_0/{place}/kernel"
        expected = jax.tree.map(lambda x: -0.25 * x, before[path])
        jax.tree.map(np.testing.assert_array_equal, found[path], expected)
    pruned = masked(tx, masks)
    updates, _ = pruned.update(jax.tree.map(jnp.zeros_like, thin), pruned.init(thin), thin)
    done = flatten(optax.apply_updates(thin, updates))
    assert (done["params/layers_0/down/kernel"] == 0).sum() == 8
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, 0.75 * y, rtol=1e-6),
        done["params/layers_0/up/kernel"], before["params/layers_0/up/kernel"],
    )  # fmt: skip


def test_refusals():
    _, variables = made("mlp", "classification")
    for options, said in (
        ({}, "give one of"),
        ({"rank": 2, "energy": 0.5}, "give one of"),
        ({"rank": 4}, "rank=4 must be 1"),
        ({"energy": 0.0}, "energy=0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            factorise(variables, targets=("dense_0",), **options)
    with pytest.raises(ValueError, match="matches no module"):
        factorise(variables, targets=("attn",), rank=1)
    with pytest.raises(ValueError, match="no plain kernel"):
        factorise(factorise(variables, targets=("head",), rank=1), targets=("head",), rank=1)
