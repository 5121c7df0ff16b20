"""Convolutions of every kind against PyTorch's, on this machine's path and on the others'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import assert_near

from fmjax.nn.conv import (
    Conv,
    ConvTranspose,
    _window_maxima,
    average_pool,
    half_a_window,
    max_pool,
    same_padding,
)
from fmjax.nn.convolution import BROAD, _convolution, convolution, window
from fmjax.nn.product import SLOW
from fmjax.nn.vision import pair

KINDS = {  # I, O, size, stride, groups, dilation
    "plain": (8, 6, 3, 2, 1, 1),
    "dilated": (4, 6, 3, 1, 1, 2),
    "grouped": (4, 6, 3, 2, 2, 1),
    "grouped-dilated": (6, 6, 3, 1, 3, 2),
    "depthwise": (5, 5, 5, 2, 5, 1),
    "depthwise-dilated": (5, 5, 3, 1, 5, 2),
    "depthwise-uneven": (5, 5, 3, (2, 1), 5, 1),
    "uneven": (4, 6, 3, (1, 2), 1, 1),
    "wide": (2, 3, 9, (1, 2), 1, 1),
    "multiplied": (3, 6, 3, 1, 3, 1),  # of each feature two
    "pixels": (4, 6, 1, 2, 2, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_pytorch(kind):
    """Outputs and the gradients of images, kernels and biases."""
    width, features, size, stride, groups, dilation = KINDS[kind]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 12, width)).astype(np.float32)
    kernel = rng.normal(size=(size, size, width // groups, features)).astype(np.float32)
    bias = rng.normal(size=features).astype(np.float32)
    conv = Conv(features, size, stride, use_bias=True, groups=groups, dilation=dilation)
    around = half_a_window(window(size, dilation))
    options = {"stride": stride, "around": around, "groups": groups, "dilation": dilation}
    paths = (
        lambda x, k, b: conv.apply({"params": {"kernel": k, "bias": b}}, x),
        lambda x, k, b: _convolution(x, k, **options) + b,  # on an accelerator
    )
    ours = [jax.device_put(array) for array in (x, kernel, bias)]
    theirs = [torch.tensor(array).double().requires_grad_() for array in (x, kernel, bias)]
    out = torch.nn.functional.conv2d(
        theirs[0].movedim(-1, 1), theirs[1].permute(3, 2, 0, 1), theirs[2], stride,
        around[0][0], dilation, groups,
    ).movedim(1, -1)  # fmt: skip
    g = rng.normal(size=tuple(out.shape)).astype(np.float32)
    out.backward(torch.tensor(g).double())
    for path in paths:

        @jax.jit
        def run(arrays, path=path):
            y, pull = jax.vjp(path, *arrays)
            return y, pull(g)

        y, grads = run(ours)
        assert_near(y, out.detach(), "output")
        for name, mine, other in zip(("x", "kernel", "bias"), grads, theirs, strict=True):
            assert_near(mine, other.grad, name)


@pytest.mark.parametrize(
    ("width", "features", "size", "stride", "dilation", "image"),
    [
        (BROAD, BROAD, 3, 1, 1, 12),  # products both ways, one transpose
        (BROAD, 8, 3, 1, 2, 20),
        (8, BROAD, 2, 1, 1, 5),
        (BROAD, BROAD, 3, 1, 1, 4),  # more zeros than pixels
        (BROAD, 8, 3, (2, 1), 1, 9),
        (BROAD, BROAD, 3, 2, 1, 9),  # every second row meets other rows of the kernel
        (8, BROAD, 4, (1, 3), 1, 10),
        (BROAD, BROAD, 1, 2, 1, 9),  # and some meet none
        (8, BROAD, 3, 2, 2, 11),
        (SLOW, 8, 3, 1, 1, 12),
        (3, 8, 3, 2, 1, 9),
    ],
)
def test_bfloat16_is_float32s_rounded(width, features, size, stride, dilation, image):
    """Outputs and gradients, of every way that the products of bfloat16 are made in."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    around = half_a_window(window(size, dilation))
    of = lambda x, k: convolution(x, k, stride=stride, around=around, dilation=dilation)  # noqa: E731
    x, kernel = draw(2, image, image + 1, width), draw(size, size, width, features)

    @jax.jit
    def run(x, kernel, g):
        y, pull = jax.vjp(of, x, kernel)
        return y, *pull(g.astype(y.dtype))

    g = draw(*jax.eval_shape(of, x, kernel).shape)
    whole = [array.astype(jnp.float32) for array in (x, kernel, g)]
    for low, high in zip(run(x, kernel, g), run(*whole), strict=True):
        assert low.dtype == jnp.bfloat16
        # Once rounded: products accumulate in float32.
        assert jnp.abs(low - high).max() < 2**-8 * jnp.abs(high).max()


@pytest.mark.parametrize(("features", "stride", "dtype"), [(3, 2, "float32"), (8, 2, "bfloat16")])
def test_gradients_of_gradients_are_xlas(features, stride, dtype):
    """As a critic's penalty has them, and once more."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, 7, 6, features)), dtype)
    kernel = jnp.asarray(rng.normal(size=(3, 3, features, 4)) / 9, dtype)
    around = ((1, 1), (0, 1))

    def third(of, x, kernel):
        def length(x, kernel):
            y = lambda x: jnp.sum(jnp.sin(of(x, kernel).astype(jnp.float32)))  # noqa: E731
            return jnp.sum(jnp.square(jax.grad(y)(x).astype(jnp.float32)))

        total = lambda x, kernel: jnp.sum(  # noqa: E731
            jnp.square(jax.grad(length, 1)(x, kernel).astype(jnp.float32))
        )
        return jax.jit(jax.grad(total, (0, 1)))(x, kernel)

    ours = third(lambda x, k: convolution(x, k, stride=stride, around=around), x, kernel)
    plain = third(
        lambda x, k: _convolution(x, k, stride=stride, around=around),
        x.astype("float32"), kernel.astype("float32"),
    )  # fmt: skip
    # In bfloat16 every order rounds: 0.0073 measured over three seeds, and the same of XLA's own.
    bound = 1e-5 if dtype == "float32" else 0.01
    for mine, other in zip(ours, plain, strict=True):
        assert jnp.abs(mine.astype("float32") - other).max() < bound * jnp.abs(other).max()


def test_same_padding_is_tensorflows():
    """As many windows as strides fit, an odd zero at the end."""
    for size, stride, image in ((3, 1, (9, 12)), (5, 2, (9, 12)), (3, 2, (9, 12)), (3, 2, (8, 7))):
        around = same_padding(image, size, stride)
        for length, (before, after) in zip(image, around, strict=True):
            windows = (length + before + after - size) // stride + 1
            assert windows == -(-length // stride)
            assert after - before in (0, 1)


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 0)]
)
def test_largest_of_windows_equals_pytorch(size, stride, padding):
    """The gradient too, which goes to the first of equal pixels."""
    rng = np.random.default_rng(size)
    x = rng.integers(-3, 4, (2, 11, 14, 3)).astype(np.float32)
    theirs = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_(True)
    pooled = torch.nn.functional.max_pool2d(theirs, size, stride, padding)
    weight = rng.normal(size=tuple(pooled.permute(0, 2, 3, 1).shape)).astype(np.float32)
    (pooled.permute(0, 2, 3, 1) * torch.tensor(weight)).sum().backward()
    ours, back = jax.vjp(lambda x: max_pool(x, size, stride, padding), x)
    np.testing.assert_array_equal(ours, pooled.detach().permute(0, 2, 3, 1))
    assert_near(back(weight)[0], theirs.grad.permute(0, 2, 3, 1), 1e-6)
    around = ((padding, padding), (padding, padding))
    elsewhere = _window_maxima(x, size=size, stride=stride, around=around)
    np.testing.assert_array_equal(ours, elsewhere)


@pytest.mark.parametrize(
    ("size", "width", "features", "groups", "around", "dtype"),
    [
        ((1, 3), BROAD, BROAD, 1, ((1, 1), (1, 1)), jnp.bfloat16),  # more than a window reaches
        (3, BROAD, BROAD, 1, ((-1, 2), (0, -2)), jnp.bfloat16),  # pixels left out
        (3, 4, 6, 1, ((-1, 2), (0, -2)), jnp.float32),
        (3, 4, 4, 4, ((-1, 2), (0, -2)), jnp.float32),
        (1, 4, 6, 1, ((1, 1), (1, 1)), jnp.float32),
    ],
)
def test_whatever_is_put_around_is_xlas(size, width, features, groups, around, dtype):
    rng = np.random.default_rng(2)
    conv = Conv(features, size, around=around, groups=groups)
    x = jnp.asarray(rng.normal(size=(1, 5, 6, width)), dtype)
    kernel = jnp.asarray(rng.normal(size=(*pair(size), width // groups, features)), dtype)

    def plain(x, kernel):
        return _convolution(x, kernel, stride=1, around=around, groups=groups)

    g = jnp.asarray(rng.normal(size=jax.eval_shape(plain, x, kernel).shape), dtype)

    def both(fn, *args):
        y, pull = jax.vjp(fn, *args)
        return y, *pull(g.astype(y.dtype))

    run = jax.jit(both, static_argnums=0)
    low = run(lambda x, k: conv.apply({"params": {"kernel": k}}, x), x, kernel)
    high = run(plain, *(array.astype(jnp.float32) for array in (x, kernel)))
    tolerance = 2**-8 if dtype == jnp.bfloat16 else 1e-5
    for one, other in zip(low, high, strict=True):
        assert one.shape == other.shape
        assert jnp.abs(one - other).max() < tolerance * jnp.abs(other).max()


@pytest.mark.parametrize(
    ("size", "stride", "padding", "more", "side"),
    [(2, 2, 0, 1, 3), (4, 2, 0, 1, 1), (3, 2, 1, 1, 3), (2, 3, 1, 2, 4)],
)
def test_transposed_convolution_equals_pytorch(size, stride, padding, more, side):
    """Also where pixels are added beyond all windows."""
    rng = np.random.default_rng(3)
    x, kernel = rng.normal(size=(2, side, side, 3)), rng.normal(size=(size, size, 3, 5))
    bias = rng.normal(size=5)
    y = ConvTranspose(5, size, stride, padding, more, use_bias=True).apply(
        {"params": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}, x
    )
    expected = torch.nn.functional.conv_transpose2d(
        torch.tensor(x).movedim(-1, 1), torch.tensor(kernel).permute(2, 3, 0, 1),
        torch.tensor(bias), stride, padding, more,
    )  # fmt: skip
    assert_near(y, expected.movedim(1, -1), "output")


@pytest.mark.parametrize(
    "of",
    [
        lambda x: max_pool(x, 4, 2),
        lambda x: average_pool(x, 4, 2),
        lambda x: convolution(x, jnp.ones((4, 1, 2, 2)), stride=1, around=((0, 0), (0, 0))),
    ],
)
def test_images_smaller_than_a_window_are_refused(of):
    with pytest.raises(ValueError, match=r"images of 3 x 9.*smaller than a window of 4 x .*larger"):
        of(jnp.ones((1, 3, 9, 2)))
