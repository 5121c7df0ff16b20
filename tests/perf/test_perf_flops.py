"""FLOP counts against hand formulas, and against what XLA counts for the same program."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fmjax.nn.conv import Conv
from fmjax.nn.convolution import _convolution_on_cpu
from fmjax.perf.flops import count_flops


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def mlp(x, kernels):
    for kernel in kernels:
        x = jnp.tanh(x @ kernel)
    return x.sum()


def test_dense_layers() -> None:
    kernels = [shape(16, 32), shape(32, 8)]
    count = count_flops(mlp, shape(4, 16), kernels)
    assert count.total == 2 * 4 * 16 * 32 + 2 * 4 * 32 * 8
    assert count.by_primitive == {"dot_general": count.total}
    assert count.matmuls == {(1, 4, 16, 32): 1, (1, 4, 32, 8): 1}
    assert count.unbounded == 0
    assert count.opaque == {}


def test_elementwise_work_is_not_counted() -> None:
    assert count_flops(lambda x: jnp.exp(x).sum() * 2, shape(128, 128)).total == 0


def test_gradient_is_three_forwards_less_the_input_gradient() -> None:
    x, kernels = shape(4, 16), [shape(16, 32), shape(32, 8)]
    forward = count_flops(mlp, x, kernels).total
    kernels_only = count_flops(jax.value_and_grad(mlp, argnums=1), x, kernels).total
    everything = count_flops(jax.value_and_grad(mlp, argnums=(0, 1)), x, kernels).total
    assert everything == 3 * forward
    assert kernels_only == 3 * forward - 2 * 4 * 16 * 32


def test_attention() -> None:
    def attention(q, k, v):
        probs = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        return jnp.einsum("bhts,bshk->bthk", probs, v)

    q, kv = shape(2, 5, 3, 8), shape(2, 7, 3, 8)
    count = count_flops(attention, q, kv, kv)
    assert count.total == 2 * (2 * (2 * 3) * 5 * 7 * 8)
    assert sum(count.matmuls.values()) == 2
    loss = lambda q, k, v: attention(q, k, v).sum()  # noqa: E731
    assert count_flops(jax.grad(loss, argnums=(0, 1, 2)), q, kv, kv).total == 3 * count.total


def test_vmap_multiplies_by_the_batch() -> None:
    one = count_flops(jnp.matmul, shape(3, 4), shape(4, 5)).total
    assert count_flops(jax.vmap(jnp.matmul), shape(6, 3, 4), shape(6, 4, 5)).total == 6 * one


def test_scan_is_the_loop() -> None:
    def looped(x, kernels):
        for i in range(6):
            x = jnp.tanh(x @ kernels[i])
        return x.sum()

    def scanned(x, kernels):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0].sum()

    args = shape(4, 8), shape(6, 8, 8)
    assert count_flops(scanned, *args).total == count_flops(looped, *args).total == 6 * 512
    grads = [count_flops(jax.grad(f, argnums=(0, 1)), *args).total for f in (looped, scanned)]
    assert grads == [3 * 6 * 512] * 2


def test_fori_loop_with_fixed_bounds_is_exact() -> None:
    count = count_flops(lambda x: lax.fori_loop(0, 5, lambda i, x: x @ x, x), shape(4, 4))
    assert (count.total, count.unbounded) == (5 * 128, 0)


def test_while_counts_once_and_says_so() -> None:
    def loop(x):
        return lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x)

    def plain(x):
        return lax.while_loop(lambda x: x.sum() > 0, lambda x: x - 1, x)

    count = count_flops(loop, shape(4, 4))
    assert (count.total, count.unbounded) == (128, 1)
    assert count_flops(plain, shape(4, 4)).unbounded == 0


def test_cond_is_its_most_expensive_branch() -> None:
    def branch(i, x, w):
        return lax.switch(i, [lambda: x, lambda: x @ w @ w, lambda: x @ w], *())

    count = count_flops(branch, shape(dtype=jnp.int32), shape(4, 4), shape(4, 4))
    assert count.total == 2 * 128


@jax.custom_vjp
def squared(x):
    return x @ x


squared.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))


@jax.custom_jvp
def cubed(x):
    return x @ x @ x


cubed.defjvp(lambda p, t: (cubed(*p), t[0] @ p[0]))


@pytest.mark.parametrize(
    ("fn", "products"),
    [
        (jax.jit(lambda x: x @ x), 1),
        (jax.checkpoint(lambda x: x @ x), 1),
        (squared, 1),
        (cubed, 2),
        (jax.grad(lambda x: squared(x).sum()), 3),
        (jax.jit(lambda x: jax.jit(jax.checkpoint(cubed))(squared(x))), 3),
    ],
)
def test_nested_calls(fn, products: int) -> None:
    assert count_flops(fn, shape(4, 4)).total == products * 128


def test_shard_map_counts_every_device() -> None:
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def product(x, w):
        return x @ w

    sharded = jax.shard_map(
        product, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec
    )
    args = shape(8 * devices, 4), shape(4, 16)
    assert count_flops(jax.jit(sharded), *args).total == count_flops(product, *args).total


def test_ragged_dot_gives_each_row_one_expert() -> None:
    def loss(x, w, sizes):
        return lax.ragged_dot(x, w, sizes).sum()

    args = shape(12, 8), shape(3, 8, 5), shape(3, dtype=jnp.int32)
    forward = 2 * 12 * 8 * 5
    assert count_flops(loss, *args).total == forward
    assert count_flops(jax.value_and_grad(loss, argnums=(0, 1)), *args).total == 3 * forward


def test_typed_keys_and_keyword_arguments() -> None:
    def dropped(x, *, w, rng):
        return (x * jax.random.bernoulli(rng, 0.9, x.shape)) @ w

    key = jax.eval_shape(jax.random.key, 0)
    assert count_flops(dropped, shape(2, 3), w=shape(3, 4), rng=key).total == 2 * 2 * 3 * 4


def conv(x, w, **kwargs):
    return lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs)


def test_conv_valid_strided_dilated_grouped_by_hand() -> None:
    def count(x, w, **kwargs):
        return count_flops(lambda x, w: conv(x, w, **kwargs), x, w).total

    image = shape(2, 12, 10, 6)
    one = (1, 1)
    # valid: every tap meets the image
    expected = 2 * 2 * (10 * 8) * (3 * 3) * 6 * 8
    assert count(image, shape(3, 3, 6, 8), window_strides=one, padding="VALID") == expected
    # stride 2: rows (12 - 3) // 2 + 1 = 5, columns (10 - 3) // 2 + 1 = 4
    expected = 2 * 2 * (5 * 4) * (3 * 3) * 6 * 8
    assert count(image, shape(3, 3, 6, 8), window_strides=(2, 2), padding="VALID") == expected
    # kernel dilated by 2 spans 5
    expected = 2 * 2 * (8 * 6) * (3 * 3) * 6 * 8
    dilated = count(
        image, shape(3, 3, 6, 8), window_strides=one, padding="VALID", rhs_dilation=(2, 2)
    )
    assert dilated == expected
    # three groups: each output feature sees 6 / 3 inputs
    expected = 2 * 2 * (10 * 8) * (3 * 3) * 2 * 9
    grouped = count(
        image, shape(3, 3, 2, 9), window_strides=one, padding="VALID", feature_group_count=3
    )
    assert grouped == expected
    # 3 taps, 12 positions, same padding: one tap is lost at each end
    expected = 2 * 2 * (3 * 12 - 2) * (3 * 10 - 2) * 6 * 8
    assert count(image, shape(3, 3, 6, 8), window_strides=one, padding="SAME") == expected


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(5, 12),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    rhs_dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    low=st.integers(0, 2),
    high=st.integers(0, 2),
)
def test_conv_gradients_each_cost_the_forward(
    size, kernel, stride, rhs_dilation, groups, low, high
) -> None:
    # dilated, negative-padded and batch-grouped convolutions all appear in these gradients
    if (kernel - 1) * rhs_dilation >= size:
        return

    def loss(x, w):
        return conv(
            x,
            w,
            window_strides=(stride, 1),
            padding=((low, high), (0, 0)),
            rhs_dilation=(rhs_dilation, 1),
            feature_group_count=groups,
        ).sum()

    args = shape(3, size, 6, 4), shape(kernel, 2, 4 // groups, 8)
    forward = count_flops(loss, *args).total
    assert forward > 0
    assert count_flops(jax.value_and_grad(loss, argnums=(0, 1)), *args).total == 3 * forward


def test_transposed_conv_counts_no_inserted_zero() -> None:
    def up(x, w):
        return lax.conv_transpose(x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    # each input element meets each of the 3 x 3 taps once
    count = count_flops(up, shape(2, 5, 4, 6), shape(3, 3, 6, 8))
    assert count.total == 2 * 2 * (5 * 4) * (3 * 3) * 6 * 8


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_agrees_with_xla(padding: str, stride: int) -> None:
    def fn(x, w):
        return conv(x, w, window_strides=(stride, stride), padding=padding)

    args = shape(2, 9, 8, 4), shape(3, 3, 4, 8)
    analysis = jax.jit(fn).lower(*args).cost_analysis()
    assert analysis is not None
    assert count_flops(fn, *args).total == analysis["flops"]


def test_one_dimensional_batch_grouped_conv() -> None:
    def fn(x, w):
        return lax.conv_general_dilated(x, w, (1,), "VALID", batch_group_count=2)

    # [N=4, I=3, 8] with [O=6, I=3, 3] in two batch groups: output [2, 6, 6]
    assert count_flops(fn, shape(4, 3, 8), shape(6, 3, 3)).total == 2 * 2 * 6 * 6 * 3 * 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_convolution_costs_what_xlas_does(dtype) -> None:
    """Also where this machine multiplies zeros, to be faster."""

    def ours(x, w):
        return Conv(64, 3).apply({"params": {"kernel": w}}, x).sum()

    def plain(x, w):
        return conv(x, w, window_strides=(1, 1), padding="SAME").sum()

    args = shape(2, 14, 14, 64, dtype=dtype), shape(3, 3, 64, 64, dtype=dtype)
    for of in (lambda fn: fn, lambda fn: jax.value_and_grad(fn, argnums=(0, 1))):
        assert count_flops(of(ours), *args).total == count_flops(of(plain), *args).total


def test_an_images_gradient_has_no_forward_convolution_in_it() -> None:
    args = shape(2, 9, 9, 8), shape(3, 3, 8, 16)
    around = ((1, 1), (1, 1))
    forward = count_flops(lambda x, w: _convolution_on_cpu(x, w, 2, around, 1), *args).total
    of_x = jax.grad(lambda x, w: _convolution_on_cpu(x, w, 2, around, 1).sum())
    # Forward, and of the image; the kernel's are products.
    assert count_flops(of_x, *args).by_primitive["conv_general_dilated"] == 2 * forward
