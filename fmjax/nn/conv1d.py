"""Convolutions along time: kernels are [X, I, O]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.parameter import parameter
from fmjax.nn.product import add_bias


def windows(x: Array, size: int, *, stride: int = 1, dilation: int = 1) -> Array:
    """The frames of every window side by side: [B, T, C] -> [B, T', size * C].

    Args:
        x: frames.
        size: frames of a window.
        stride: frames between windows.
        dilation: frames from one place of a window to the next.
    """
    length = x.shape[1] - dilation * (size - 1)
    starts = range(0, dilation * size, dilation)
    return jnp.concatenate([x[:, start : start + length : stride] for start in starts], axis=-1)


def convolve(
    x: Array,
    kernel: Array,
    *,
    stride: int = 1,
    around: tuple[int, int] = (0, 0),
    groups: int = 1,
) -> Array:
    """A convolution along time: [B, T, I] -> [B, T', O].

    Args:
        x: frames.
        kernel: [X, I / groups, O].
        stride: frames between windows.
        around: zeros before the first frame and after the last.
        groups: I and O fall into as many parts, each convolved by itself.
    """
    plain = partial(_convolution, stride=stride, around=around, groups=groups)
    if groups == 1 or stride > 1:
        return plain(x, kernel)
    on_cpu = partial(_groups_on_cpu, around=around, groups=groups)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)


def _convolution(
    x: Array, kernel: Array, *, stride: int, around: tuple[int, int], groups: int
) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride,),
        padding=(around,),
        dimension_numbers=("NTC", "TIO", "NTC"),
        feature_group_count=groups,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _groups_on_cpu(x: Array, kernel: Array, around: tuple[int, int], groups: int) -> Array:
    """One group after the other, and the kernel's gradient as a product for each of its places.

    XLA's CPU backend takes for that gradient a hundred times as long as for the convolution
    (measured for wav2vec2's positions, [2, 249, 768] in 16 groups with 128 places: the gradients
    of both together 3736 ms, and so 203 ms).
    """
    one = partial(_convolution, stride=1, around=around, groups=1)
    parts = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    return jnp.concatenate([one(*part) for part in parts], -1)


def _forward(x: Array, kernel: Array, around: tuple[int, int], groups: int) -> tuple[Array, Any]:
    return _groups_on_cpu(x, kernel, around, groups), (x, kernel)


def _backward(around: tuple[int, int], groups: int, saved: Any, g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    size, inner, outer = kernel.shape
    # Of the frames: the same, of the gradient's frames, by the kernel from its end.
    turned = kernel[::-1].reshape(size, inner, groups, outer // groups)
    turned = turned.transpose(0, 3, 2, 1).reshape(size, outer // groups, groups * inner)
    before, after = (size - 1 - zeros for zeros in around)
    dx: Array = _groups_on_cpu(g, turned, (before, after), groups)
    # Of the kernel: what each of its places saw.
    padded = jnp.pad(x, ((0, 0), around, (0, 0)))
    parts = g.reshape(-1, groups, outer // groups)  # [B * T', G, O / G]

    def place(number: Array) -> Array:
        seen = jax.lax.dynamic_slice_in_dim(padded, number, g.shape[1], axis=1)
        seen = seen.reshape(-1, groups, inner)
        return jnp.einsum("NGI,NGO->IGO", seen, parts)

    dkernel = jax.lax.map(place, jnp.arange(size))
    return dx.astype(x.dtype), dkernel.reshape(kernel.shape).astype(kernel.dtype)


_groups_on_cpu.defvjp(_forward, _backward)


class Conv1d(nn.Module):
    """A convolution along time, in its kernel's dtype.

    Args:
        features: O.
        size: frames of a window.
        stride: frames between windows.
        kernel_init: initializer of the kernel [X, I, O].
        use_bias: whether a bias is added.
        around: zeros before the first frame and after the last.
    """

    features: int
    size: int
    stride: int = 1
    kernel_init: Callable[..., Array] = nn.initializers.he_normal()
    use_bias: bool = True
    around: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, T, I] -> [B, T', O]
        shape = (self.size, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape)
        # Samples are float32 whatever the weights are.
        y = convolve(x.astype(kernel.dtype), kernel, stride=self.stride, around=self.around)
        if not self.use_bias:
            return y
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        return add_bias(y.astype(jnp.float32), bias).astype(kernel.dtype)
