"""Weights in few bits: how far they are off, how many bytes they take, what trains beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from made_up import made, texts

import fmjax
from fmjax.methods import compressed_files, lora, low_rank
from fmjax.methods.adapted_layers import merge_adapters
from fmjax.methods.quantization import (
    is_float,
    quantization_aware,
    quantize,
    sizes,
    straight_through,
)
from fmjax.nn.compact import Quantized, normal_levels, packed, rows, unpacked, whole, whole_arrays
from fmjax.tasks import sequence_classification
from fmjax.train import gradient, init_state
from fmjax.tree import flatten, stack_layers, unstack_layers

W = np.random.default_rng(0).normal(size=(3, 16, 6)).astype(np.float32)
W[0, :8, 1] = 0.0  # a group of zeros


def one(weights, **options):
    variables = {"params": {"layers": {"kernel": jnp.asarray(weights)}}}
    return quantize(variables, **options)["params"]["layers"]["kernel"]


@pytest.mark.parametrize(
    ("bits", "group"),
    [(8, None), pytest.param(8, 4, marks=pytest.mark.slow), (4, 8), (4, None)],
)
def test_no_weight_is_off_by_more_than_half_a_scale(bits, group):
    kept = one(W, bits=bits, group=group)
    size = 16 if group is None else group
    groups = W.reshape(3, 16 // size, size, 6)
    scales = np.abs(groups).max(2) / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(kept.scales, scales, rtol=1e-6)
    restored = np.asarray(kept.array()).reshape(groups.shape)
    off = np.abs(restored - groups)
    assert (off <= scales[:, :, None] / 2 * (1 + 1e-5)).all()
    assert (off.max((0, 1, 3)) > 0).all()  # and they are rounded
    assert (kept.shape, kept.dtype, kept.size) == (W.shape, jnp.float32, W.size)
    assert kept.nbytes == W.size * bits // 8 + scales.size * 4
    # What is rounded already stays: the levels are the same.
    again = one(kept.array(), bits=bits, group=group)
    np.testing.assert_array_equal(again.codes, kept.codes)


def test_packing_goes_both_ways():
    codes = np.random.default_rng(0).integers(-8, 8, (2, 6, 4)).astype(np.int8)
    pairs = packed(jnp.asarray(codes), -1)
    assert pairs.dtype == jnp.uint8
    assert pairs.shape == (2, 6, 2)
    np.testing.assert_array_equal(unpacked(pairs, -1), codes)


def test_normal_levels_are_the_published_ones():
    """Dettmers et al. 2023, appendix E."""
    levels = normal_levels()
    published = {0: -1.0, 1: -0.6961928, 6: -0.0910500, 7: 0.0, 8: 0.0795803, 14: 0.7229568, 15: 1}
    for place, level in published.items():
        assert levels[place] == pytest.approx(level, abs=1e-6)
    kept = one(W, bits=4, group=8, normal=True)
    groups = W.reshape(3, 2, 8, 6)
    largest = np.abs(groups).max(2, keepdims=True)
    units = groups / np.where(largest == 0, 1, largest)
    nearest = np.abs(units[..., None] - np.asarray(levels)).argmin(-1)
    expected = np.asarray(levels)[nearest] * largest
    np.testing.assert_allclose(kept.array(), expected.reshape(W.shape), rtol=1e-5, atol=1e-7)


def test_low_precision_scales_keep_the_bound():
    weights = jnp.asarray(W, jnp.bfloat16)
    kept = one(weights, bits=4, group=8)
    assert kept.dtype == jnp.bfloat16
    scales = np.asarray(kept.scales, np.float32)[:, :, None]
    exact = np.asarray(kept.astype(jnp.float32).array()).reshape(3, 2, 8, 6)
    off = np.abs(exact - np.asarray(weights, np.float32).reshape(exact.shape))
    assert (off <= scales / 2 * (1 + 1e-5)).all()


def test_rows_of_tables():
    table = quantize(
        {"params": {"embed": {"embedding": jnp.asarray(W[1])}}}, bits=4, group=2, targets=("*",)
    )["params"]["embed"]["embedding"]
    assert (table.codes.shape, table.scales.shape) == ((16, 3), (16, 3))
    ids = jnp.array([[3, 0], [15, 3]])
    np.testing.assert_array_equal(rows(table, ids), np.asarray(table.array())[ids])


@pytest.mark.slow
def test_a_scanned_model_reads_integers_layer_by_layer():
    """Kernels, a table for lookups and tied logits: the function of the arrays they stand for."""
    model, variables = made("gpt2", "causal_lm", scan=True)
    options = {"bits": 4, "group": 4, "targets": ("params/*/kernel", "params/embed/word/*")}
    kept = quantize(variables, **options)
    table = kept["params"]["embed"]["word"]["embedding"]
    assert table.scales.shape == (20, 2)
    ids = texts()["input_ids"]
    apply = jax.jit(lambda variables: model.apply(variables, ids).logits)
    expected = apply(whole_arrays(kept))
    np.testing.assert_allclose(apply(kept), expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(apply(variables), expected, atol=1e-3)
    # Stacked or not, they are the same.
    apart = quantize(unstack_layers(variables), **options)
    jax.tree.map(np.testing.assert_array_equal, stack_layers(apart), kept)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(kept), apart)
    bytes_of = sizes(kept)
    assert bytes_of["before"] == sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    assert bytes_of["quantised"] == sum(
        leaf.nbytes for leaf in flatten(kept).values() if isinstance(leaf, Quantized)
    )


@pytest.mark.slow
def test_adapters_of_integers_are_merged():
    """Into the arrays they stand for; `compositions` train such adapters."""
    _, variables = made("mlp", "classification")
    kept = quantize(variables, bits=8)
    adapted = lora.add(kept, jax.random.key(0), rank=2, alpha=2.0, targets=("dense_0",))
    up = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    adapted["adapters"]["dense_0"]["up"] = jnp.asarray(up)
    merged = flatten(merge_adapters(adapted))["params/dense_0/kernel"]
    kernel = flatten(kept)["params/dense_0/kernel"]
    expected = np.asarray(kernel.array()) + adapted["adapters"]["dense_0"]["down"] @ up
    np.testing.assert_allclose(merged, expected, rtol=1e-5)
    trains = is_float(kept)
    assert trains("params/dense_0/bias")
    assert not trains("params/dense_0/kernel")


def test_training_for_rounding():
    """Of many bits it is the loss; of few the loss of what is left, with the rounded gradient."""
    model, variables = made("mlp", "classification")
    loss = sequence_classification.loss(model)
    batch = {
        "features": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32),
        "labels": np.arange(8) % 2,
        "weight": np.ones(8, np.float32),
    }

    def value_and_grads(loss):
        differentiate = jax.jit(gradient(loss))

        def call(variables):
            grads, value, _ = differentiate(variables, {}, batch, None)
            return value, grads

        return call

    of_loss = value_and_grads(loss)
    plain = of_loss(variables)
    fine = value_and_grads(quantization_aware(loss, bits=16))(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), fine, plain)
    coarse = value_and_grads(quantization_aware(loss, bits=8))(variables)
    rounded = of_loss(whole_arrays(quantize(variables, bits=8)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), coarse, rounded
    )
    assert coarse[0] != plain[0]
    # The estimator alone: the gradient of the identity.
    slope = jax.grad(lambda w: jnp.sum(straight_through(w, bits=2) * W))(jnp.asarray(W))
    np.testing.assert_array_equal(slope, W)


def test_files(tmp_path):
    """What is kept is written as it is; a model's own files take plain arrays alone."""
    model, variables = made("mlp", "classification")
    kept = quantize(variables, bits=4, normal=True, targets=("params/head/kernel",), but=())
    kept = low_rank.factorise(kept, targets=("dense_0",), rank=2)
    file = compressed_files.write(tmp_path / "small.safetensors", kept)
    read = compressed_files.read(file)
    assert jax.tree.structure(read) == jax.tree.structure(kept)
    jax.tree.map(np.testing.assert_array_equal, read, kept)
    with pytest.raises(ValueError, match="whole_arrays"):
        fmjax.save(tmp_path / "model", model, kept)
    folder = fmjax.save(tmp_path / "model", model, whole_arrays(kept))
    _, plain = fmjax.load(folder)
    jax.tree.map(np.testing.assert_array_equal, plain, whole_arrays(kept))
    with pytest.raises(ValueError, match="not of compressed"):
        compressed_files.read(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 3, "targets": ("*/nothing",)}, r"(?s)bits=3.*matches no leaf"),
        ({"bits": 8, "normal": True}, "must be 4"),
        ({"bits": 8, "group": 5}, "groups of 5 do not fill"),
        ({"bits": 4, "targets": ("params/dense_0/kernel",)}, "even number"),
        ({"bits": 8, "targets": ("params/*/bias",)}, "no matrix"),
        ({"bits": 8, "but": ("*",)}, "nothing is left"),
    ],
)
def test_refusals(options, said):
    _, variables = made("mlp", "classification")  # of 3 features
    with pytest.raises(ValueError, match=said):
        quantize(variables, **options)


def test_twice_is_refused():
    _, variables = made("mlp", "classification")
    kept = quantize(variables, bits=8)
    assert whole(flatten(kept)["params/dense_0/kernel"]).shape == (3, 8)
    with pytest.raises(ValueError, match="Quantized"):
        quantize(kept, bits=8)
    with pytest.raises(ValueError, match="targets: one text was given"):
        quantize(variables, bits=8, targets="params/*/kernel")
    with pytest.raises(
        ValueError, match=r"chooses params/dense_0/kernel \(1 in all\), which are w"
    ):
        init_state(kept, optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(ValueError, match="2 to 16"):
        quantization_aware(lambda *_: None, bits=1)
