"""What the backward pass recomputes: the same gradients in less memory, whatever the policy."""

import dataclasses
import importlib.util
from functools import partial
from itertools import product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmjax.hub as hub
from fmjax.models import bert, gpt2
from fmjax.perf.flops import count_flops
from fmjax.perf.memory import host_bytes
from fmjax.perf.targets import parse_target
from fmjax.tree import stack_layers

POLICIES = ("dots", "block", "offload")
QUICK = {("bert", True), ("resnet", False)}
CASES = [
    pytest.param(name, scan, marks=() if (name, scan) in QUICK else pytest.mark.slow)
    for name, scan in product(("bert", "gpt2", "t5", "vit", "resnet"), (False, True))
    if (name, scan) != ("resnet", True)  # whose blocks differ in shape
]


@pytest.mark.parametrize(("name", "scan"), CASES)
def test_gradients_are_those_of_what_is_kept(name, scan):
    """With dropout, whose masks are drawn again from the same keys."""
    family = hub.family_of(name)
    config = family.VARIANTS["tiny"]
    if hasattr(config, "vocab_size"):
        config = dataclasses.replace(config, vocab_size=99)
    drawn = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * drawn.normal(size=leaf.shape), leaf.dtype),
        hub.abstract_variables(family.Model(config)),
    )
    variables = stack_layers(variables) if scan else variables
    inputs = {
        key: drawn.integers(3, 99, (2, 7))
        if key.endswith("input_ids")
        else drawn.normal(size=(2, *value.shape[1:])).astype(np.float32)
        for key, value in family.inputs(config, "model").items()
    }

    @partial(jax.jit, static_argnums=0)
    def gradient(remat):
        model = family.Model(config, scan=scan, remat=remat)

        def loss(params):
            out = model.apply(
                variables | {"params": params}, **inputs,
                train=True, rngs={"dropout": jax.random.key(3)}, mutable=["batch_stats"],
            )[0]  # fmt: skip
            return jnp.sum(jnp.sin(out.last_hidden_state))

        return jax.grad(loss)(variables["params"])

    plain = gradient("none")
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for remat in POLICIES:
        chex.assert_trees_all_close(gradient(remat), plain, rtol=1e-6, atol=1e-6 * scale)


def deep(family, remat, **sizes):
    """The gradient's function of a model of six narrow layers, and abstract variables for it."""
    config = family.Config(vocab_size=64, **sizes)
    model = family.Model(config, scan=True, remat=remat)
    ids = jnp.ones((8, 64), jnp.int32)

    def gradient(params):
        return jax.grad(
            lambda params: model.apply({"params": params}, ids).last_hidden_state.sum()
        )(params)

    return gradient, hub.abstract_variables(model)["params"]


SHAPES = [
    (gpt2, {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}),
    (
        bert,
        {
            "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4,
            "intermediate_size": 128, "max_position_embeddings": 64,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "sizes"), [SHAPES[0], pytest.param(*SHAPES[1], marks=pytest.mark.slow)]
)
def test_memory_and_work(family, sizes):
    """Less memory for more work, in the order of the policies."""
    bytes_of, flops = {}, {}
    for remat in ("none", "dots", "block"):
        gradient, params = deep(family, remat, **sizes)
        compiled = jax.jit(gradient).lower(params).compile()
        bytes_of[remat] = compiled.memory_analysis().temp_size_in_bytes
        flops[remat] = count_flops(gradient, params).total
    assert bytes_of["block"] < 0.8 * bytes_of["dots"]
    assert bytes_of["dots"] < 0.8 * bytes_of["none"]
    assert flops["none"] < flops["dots"] < flops["block"]


def test_offload_sends_block_inputs_to_the_host():
    family, sizes = SHAPES[0]
    for remat in ("block", "offload"):
        gradient, params = deep(family, remat, **sizes)
        jaxpr = str(jax.make_jaxpr(gradient)(params))
        assert ("f32<host>[6,8,64,32]" in jaxpr) == (remat == "offload")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_offload_compiled_for_a_tpu():
    """The six blocks' inputs, and nothing else, lie in the host's memory."""
    family, sizes = SHAPES[0]
    place = jax.sharding.SingleDeviceSharding(parse_target("v5e:1x1").devices()[0])
    kept = {}
    for remat in ("block", "offload"):
        gradient, params = deep(family, remat, **sizes)
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params
        )
        kept[remat] = host_bytes(jax.jit(gradient).lower(params).compile())
    assert kept["block"] == 0
    assert kept["offload"] >= 6 * 8 * 64 * 32 * 4


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_an_unknown_policy(name):
    family = hub.family_of(name)
    model = family.Model(family.VARIANTS["tiny"], remat="all")
    inputs = family.inputs(model.config, "model")
    with pytest.raises(ValueError, match="remat='all'; choose one of 'none', 'dots', 'block'"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))


def test_families_keep_all_by_default():
    for name in hub.families():
        family = hub.family_of(name)
        config = next(iter(family.VARIANTS.values()))
        assert family.Model(config).remat == "none"
