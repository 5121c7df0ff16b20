"""Dense layers: kernels are [I, O], products accumulate in float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array


def matmul(x: Array, kernel: Array) -> Array:
    """``x @ kernel`` accumulated and returned in float32.

    Args:
        x: [..., I].
        kernel: [I, O], cast to x's dtype.

    Returns:
        [..., O] float32.
    """
    kernel = kernel.astype(x.dtype)
    if x.dtype == jnp.float32:
        return jnp.dot(x, kernel)
    return _low_precision_matmul(x, kernel)


@jax.custom_vjp
def _low_precision_matmul(x: Array, kernel: Array) -> Array:
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _low_precision_matmul(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # dot_general's own transpose would promote the operands to the cotangent's float32, and lose
    # the low-precision product in exactly two thirds of the work.
    x, kernel = residuals
    g = g.astype(x.dtype)
    dx = jax.lax.dot_general(
        g, kernel, (((g.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )  # [..., I]
    batch = tuple(range(x.ndim - 1))
    dkernel = jax.lax.dot_general(
        x, g, ((batch, batch), ((), ())), preferred_element_type=jnp.float32
    )  # [I, O]
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_low_precision_matmul.defvjp(_forward, _backward)


class Dense(nn.Module):
    """``x @ kernel + bias`` in x's dtype, accumulated in float32.

    Args:
        features: O, the width of the output.
        use_bias: whether there is a bias.
        kernel_init: initializer of the kernel [I, O].
    """

    features: int
    use_bias: bool = True
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., I] -> [..., O]
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = matmul(x, kernel)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))
        return y.astype(x.dtype)
