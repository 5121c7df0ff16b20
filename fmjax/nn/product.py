"""Products and sums of dense layers: kernels are [I, O], products accumulate in float32."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.nn.compact import Compact, Factors, whole


def matmul(x: Array, kernel: Array | Compact, *, transposed: bool = False) -> Array:
    """``x @ kernel`` (or ``x @ kernel.T``) accumulated and returned in float32.

    Args:
        x: [..., I].
        kernel: [I, O], or [O, I] if `transposed` (an embedding table); cast to x's dtype.
            Of factors the product is not formed.

    Returns:
        [..., O] float32.
    """
    if isinstance(kernel, Factors) and not transposed:
        return matmul(matmul(x, kernel.down).astype(x.dtype), kernel.up)
    array = whole(kernel)
    if array.dtype != x.dtype:
        array = array.astype(x.dtype)
    if x.dtype == jnp.float32:
        return _product(x, array, transposed)
    return _low_precision(x, array, transposed)


def _product(x: Array, kernel: Array, transposed: bool) -> Array:
    contracted = ((x.ndim - 1,), (1 if transposed else 0,))
    return jax.lax.dot_general(
        x, kernel, (contracted, ((), ())), preferred_element_type=jnp.float32
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _low_precision(x: Array, kernel: Array, transposed: bool) -> Array:
    return _product(x, kernel, transposed)


def _forward(x: Array, kernel: Array, transposed: bool) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, transposed), (x, kernel)


def _backward(transposed: bool, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # dot_general's own transpose would promote the operands to the cotangent's float32, and lose
    # the low-precision product in two thirds of the work.
    x, kernel = residuals
    g = g.astype(x.dtype)
    dx = _product(g, kernel, not transposed)  # [..., I]
    rows = x.reshape(-1, x.shape[-1])  # [N, I]
    g = g.reshape(-1, g.shape[-1])  # [N, O]
    first, second = (g, rows) if transposed else (rows, g)
    dkernel = jax.lax.platform_dependent(
        first, second, cpu=_gram_on_cpu, default=gram
    )  # [I, O] or [O, I]
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_low_precision.defvjp(_forward, _backward)


def gram(a: Array, b: Array) -> Array:
    """``a.T @ b``: [N, I], [N, O] -> [I, O]."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _gram_on_cpu(a: Array, b: Array) -> Array:
    """The same: on CPU this product of bfloat16 has no kernel of its own and runs in float32, at
    half the speed, unless the transpose is written out; and a lone transpose is folded back into
    the product, hence two halves.
    """
    half = a.shape[1] // 2
    transposed = jnp.concatenate([a[:, :half].T, a[:, half:].T])  # [I, N]
    return jnp.dot(transposed, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """``x + bias`` for wide outputs: [..., V] + [V], both float32.

    Its gradient sums over all rows, which XLA's CPU reduction takes 40 times longer for than the
    product with a row of ones written here (measured: 233 ms against 6 ms for [1024, 30522]).
    """
    return x + bias


def _add_bias_backward(bias: Array, g: Array) -> tuple[Array, Array]:
    rows = g.reshape(-1, g.shape[-1])  # [N, V]
    total = jnp.dot(jnp.ones((1, rows.shape[0]), g.dtype), rows)[0]
    return g, total.astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (x + bias, bias), _add_bias_backward)
