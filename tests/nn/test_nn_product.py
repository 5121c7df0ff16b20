"""Products below float32, and lookups as accelerators do them."""

import re

import chex
import jax
import jax.numpy as jnp
import pytest

from fmjax.models import vit
from fmjax.nn.embed import FEW, _look_up_on_accelerators, look_up
from fmjax.nn.product import MANY, SLOW, add_bias, add_to_all, affine, gram, gram_on_cpu


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (MANY, SLOW, 2 * SLOW),
        (MANY, 2 * SLOW, SLOW),
        (8, 3, 5),  # nothing of an odd size falls into halves
        (7, 4, 3),
        (9, 3, 5),
        (9, 1, 1),
        (64, 5, 2),  # the other operand is turned
    ],
)
def test_products_over_rows_on_cpus_are_any_others(rows: int, inputs: int, outputs: int) -> None:
    a, b = (
        jax.random.normal(key, (rows, width), jnp.bfloat16)
        for key, width in zip(jax.random.split(jax.random.key(0)), (inputs, outputs), strict=True)
    )
    ours, plain = jax.jit(gram_on_cpu)(a, b), gram(a.astype("float32"), b.astype("float32"))
    # Sums of exact products of bfloat16, in another order.
    chex.assert_trees_all_close(ours, plain, atol=1e-6 * rows, rtol=0)


@pytest.mark.parametrize("with_bias", [True, False])
def test_affine_below_float32_is_float32s_but_for_rounding(with_bias: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, bias = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, ((3, 5, 16), (16, 6), (6,)), strict=True)
    )

    def outcome(*operands):
        def total(x, kernel, bias):
            y = affine(x, kernel, bias if with_bias else None)
            return jnp.sum(jnp.cos(jnp.arange(y.size).reshape(y.shape)) * y), y

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*operands)

    ours = outcome(x, kernel, bias)
    chex.assert_equal(ours[1][0].dtype, jnp.bfloat16)
    exact = outcome(*(operand.astype(jnp.float32) for operand in (x, kernel, bias)))
    (_, y), gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), ours)
    for one, other in zip((y, *gradients), (exact[0][1], *exact[1]), strict=True):
        # bfloat16 keeps 8 bits of the result, and of the gradient that it is made from.
        assert jnp.abs(one - other).max() <= 2**-7 * jnp.abs(other).max()


def test_a_train_step_on_cpus_copies_no_operand_of_a_product() -> None:
    """Contracted over a batch's two axes, a kernel's gradient would begin with two copies."""
    x, kernel = jnp.ones((4, 16, 32)), jnp.ones((32, 48))

    def loss(x, kernel):
        return jnp.sum(jnp.tanh(affine(jnp.tanh(x), kernel, None)) ** 2)

    program = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile().as_text()
    assert program.count(" dot(") == 3
    assert "copy" not in program


@pytest.mark.parametrize("rows", [3, FEW + 1])
def test_accelerators_look_the_same_up(rows: int) -> None:
    table = jax.random.normal(jax.random.key(0), (rows, 4))
    ids = jnp.array([[0, 1, 1], [2, 2, 2]])
    weight = jnp.arange(24.0).reshape(2, 3, 4)

    def outcome(look):
        return jax.value_and_grad(lambda table: jnp.sum(weight * look(table, ids)))(table)

    chex.assert_trees_all_close(outcome(look_up), outcome(_look_up_on_accelerators), rtol=1e-6)


def _squares(add, x, bias):
    return jnp.sum(jnp.square(add(x, bias)).astype(jnp.float32))


@pytest.mark.parametrize("add", [add_bias, add_to_all])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_over_rows_are_any_others(add, dtype) -> None:
    x, bias = (
        jax.random.normal(jax.random.key(number), shape, dtype)
        for number, shape in enumerate(((5, 3, 8), (8,) if add is add_bias else (3, 8)))
    )
    value, found = jax.jit(jax.value_and_grad(lambda *a: _squares(add, *a), (0, 1)))(x, bias)
    expected, gradients = jax.value_and_grad(lambda *a: _squares(jnp.add, *a), (0, 1))(x, bias)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, (x, bias))
    bits = {"float32": 23, "bfloat16": 7}[dtype]
    for one, other in zip((value, *found), (expected, *gradients), strict=True):
        error = jnp.abs(one.astype("float32") - other.astype("float32")).max()
        assert error <= 2.0 ** (2 - bits) * jnp.abs(other).max()


def _for_gpus(fn, *args) -> str:
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_a_wide_gradient_is_not_written_for_its_bias_on_gpus() -> None:
    """A product's operands are arrays in memory; a sum is fused with what it sums."""
    fn = jax.grad(lambda *a: _squares(add_bias, *a), 1)
    args = (jnp.ones((4, 32)), jnp.ones(32))
    assert "dot_general" not in _for_gpus(fn, *args)
    assert "dot_general" in jax.jit(fn).lower(*args).as_text()


def test_no_sum_over_the_batch_alone_in_vits_train_step() -> None:
    """XLA's GPU compiler would lay out all hidden states for it, with the batch last."""
    model = vit.Model(vit.VARIANTS["tiny"], head="image_classification")
    size = model.config.image_size
    pixels = jnp.zeros((3, size, size, 3), jnp.bfloat16)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), pixels))
    low = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), variables)
    text = _for_gpus(
        jax.grad(lambda variables: model.apply(variables, pixels).logits.sum().astype("float32")),
        low,
    )
    sums = re.findall(r"stablehlo.reduce\(.*dimensions = \[([\d, ]+)\].*\(tensor<3x\d+x\d+x", text)
    assert sums
    assert "0" not in sums
