"""Products and sums of dense layers: kernels are [I, O], products accumulate in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from fmjax.nn.compact import Compact, Factors, whole

# A left operand of just so many rows, and of many columns, takes XLA's CPU backend twice as long
# (measured in bfloat16 on one core, [I, 8192] times [8192, 128], GFLOP/s: 419 for I = 60, 197 for
# 64, 389 for 65, 440 for 128).
SLOW, MANY = 64, 4096


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
    array = _cast(whole(kernel), x.dtype)
    if x.dtype == jnp.float32:
        return _product(x, array, transposed)
    return _low_precision(x, array, transposed)


def affine(x: Array, kernel: Array, bias: Array | None) -> Array:
    """``x @ kernel + bias`` in x's dtype, accumulated in float32.

    Args:
        x: [..., I].
        kernel: [I, O].
        bias: [O] or None.

    Returns:
        [..., O].
    """
    kernel = _cast(kernel, x.dtype)
    if x.dtype == jnp.float32:
        y = _product(x, kernel, False)
        return y if bias is None else y + bias
    return _low_affine(x, kernel, None if bias is None else _cast(bias, x.dtype))


def _cast(array: Array, dtype: DTypeLike) -> Array:
    """An array that has the dtype stays what it is, which need not be JAX's own class."""
    return array if array.dtype == dtype else array.astype(dtype)


def _product(x: Array, kernel: Array, transposed: bool) -> Array:
    return _dot(x, kernel, transposed, jnp.float32)


def _dot(x: Array, kernel: Array, transposed: bool, dtype: DTypeLike) -> Array:
    # Of rows: contracted over several axes, the kernel's gradient would first copy both its
    # operands on CPUs (measured, forward and both gradients: 127 ms against 90 ms for
    # [8, 128, 768] and 3072 features on one core).
    rows = x.reshape(-1, x.shape[-1])  # [N, I]
    contracted = ((1,), (1 if transposed else 0,))
    y = jax.lax.dot_general(rows, kernel, (contracted, ((), ())), preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _rounded(x: Array, kernel: Array, bias: Array | None, transposed: bool) -> Array:
    """The product with its bias in the operands' dtype, which is below float32.

    On a GPU it is asked for in that dtype, and the bias is added to what is rounded: the product
    would be written in float32 otherwise, twice the bytes for it and all that reads it. On CPUs
    float32 products are the quicker ones.
    """

    def on_cpu(x: Array, kernel: Array, bias: Array | None) -> Array:
        y = _product(x, kernel, transposed)
        return (y if bias is None else y + bias).astype(x.dtype)

    def elsewhere(x: Array, kernel: Array, bias: Array | None) -> Array:
        y = _dot(x, kernel, transposed, x.dtype)
        return y if bias is None else y + bias

    return jax.lax.platform_dependent(x, kernel, bias, cpu=on_cpu, default=elsewhere)


def _backward(x: Array, kernel: Array, g: Array, transposed: bool) -> tuple[Array, Array]:
    """The gradients of a product of operands below float32: of x and of the kernel."""
    # dot_general's own transpose would promote the operands to the cotangent's float32, and lose
    # the low-precision product in two thirds of the work.
    g = g.astype(x.dtype)
    dx = _rounded(g, kernel, None, not transposed)  # [..., I]
    rows = x.reshape(-1, x.shape[-1])  # [N, I]
    g = g.reshape(-1, g.shape[-1])  # [N, O]
    first, second = (g, rows) if transposed else (rows, g)
    dkernel = jax.lax.platform_dependent(
        first, second, cpu=gram_on_cpu, default=gram
    )  # [I, O] or [O, I]
    return dx, dkernel.astype(kernel.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _low_precision(x: Array, kernel: Array, transposed: bool) -> Array:
    return _product(x, kernel, transposed)


def _forward(x: Array, kernel: Array, transposed: bool) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, transposed), (x, kernel)


def _reverse(transposed: bool, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    return _backward(*residuals, g, transposed)


_low_precision.defvjp(_forward, _reverse)


@jax.custom_vjp
def _low_affine(x: Array, kernel: Array, bias: Array | None) -> Array:
    return _rounded(x, kernel, bias, False)


def _affine_backward(
    residuals: tuple[Array, Array, Array | None], g: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = residuals
    dx, dkernel = _backward(x, kernel, g, False)
    if bias is None:
        return dx, dkernel, None
    dbias = jnp.sum(g, axis=tuple(range(g.ndim - 1)), dtype=jnp.float32)
    return dx, dkernel, dbias.astype(bias.dtype)


_low_affine.defvjp(
    lambda x, kernel, bias: (_rounded(x, kernel, bias, False), (x, kernel, bias)),
    _affine_backward,
)


def gram(a: Array, b: Array) -> Array:
    """``a.T @ b``: [N, I], [N, O] -> [I, O]."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def gram_on_cpu(a: Array, b: Array) -> Array:
    """The same of operands below float32.

    On CPU this product has no kernel of its own and runs in float32, at half the speed, unless the
    transpose is written out: of what has fewer columns, where turning the result is the smaller
    work (measured on one core: 16 ms against 9 ms for [25088, 256] and 64 columns, 50 against 30
    for [1568, 3072] and 768).
    """
    (rows, inputs), outputs = a.shape, b.shape[1]
    of_b = rows * (inputs - outputs) >= inputs * outputs
    if rows >= MANY and SLOW in (inputs, outputs) and max(inputs, outputs) >= 2 * SLOW:
        of_b = inputs == SLOW
    if of_b:
        return transposed(jnp.dot(transposed(b), a, preferred_element_type=jnp.float32))
    return jnp.dot(transposed(a), b, preferred_element_type=jnp.float32)


def transposed(a: Array) -> Array:
    """``a.T`` written out, as `gram_on_cpu` wants it: [N, I] -> [I, N].

    A lone transpose of two axes is folded back into the product that follows, hence three.
    """

    def turn(a: Array) -> Array:
        rows, columns = a.shape
        if columns % 2:
            parts = a.reshape(2, rows // 2, columns).transpose(2, 0, 1)
        else:
            parts = a.reshape(rows, 2, columns // 2).transpose(1, 2, 0)
        return parts.reshape(columns, rows)

    if a.shape[0] % 2 and a.shape[1] % 2:
        return jnp.concatenate([a[:1].T, transposed(a[1:])], axis=1)
    return moved(turn, a)


def moved(move: Callable[..., Any], *arrays: Array) -> Any:
    """What `move` makes of arrays of one dtype, an array or a tree, where it only moves numbers, on
    CPUs.

    There XLA has arithmetic below float32 done in float32 and counts moving among it, so that a
    transpose becomes a loop with two conversions for each number (measured on one core: 0.86 ms
    against 0.22 ms for [25088, 64] in bfloat16). As integers they are only moved.
    """
    dtype = arrays[0].dtype
    if dtype.itemsize != 2:
        return move(*arrays)
    bits = [jax.lax.bitcast_convert_type(a, jnp.uint16) for a in arrays]
    return jax.tree.map(lambda bits: jax.lax.bitcast_convert_type(bits, dtype), move(*bits))


def _row_sum(rows: Array) -> Array:
    """The sum of rows as a product, float32: [N, O] -> [O]."""
    ones = jnp.ones((1, len(rows)), rows.dtype)
    return jnp.dot(ones, rows, preferred_element_type=jnp.float32)[0]


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """``x + bias`` for wide outputs: [..., V] + [V], both float32.

    Its gradient sums over all rows, which XLA's CPU reduction takes 40 times longer for than the
    product with a row of ones written here (measured: 233 ms against 6 ms for [1024, 30522]). On
    a GPU the product would have all of the gradient written in float32 first.
    """
    return x + bias


def _add_bias_backward(bias: Array, g: Array) -> tuple[Array, Array]:
    rows = g.reshape(-1, g.shape[-1])  # [N, V]

    plain = partial(jnp.sum, axis=0, dtype=jnp.float32)
    total = jax.lax.platform_dependent(rows, cpu=_row_sum, default=plain)
    return g, total.astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (x + bias, bias), _add_bias_backward)


@jax.custom_vjp
def add_to_all(x: Array, rows: Array) -> Array:
    """``x + rows`` for a table that all examples share: [B, ...] + [...].

    Its gradient is the sum over the batch as a product. For a plain sum over the first axis XLA's
    GPU compiler lays x out with the batch last, and after it all that is made of x: each block
    then transposes what it reads and writes.
    """
    return x + rows


def _add_to_all_backward(rows: Array, g: Array) -> tuple[Array, Array]:
    total = _row_sum(g.reshape(len(g), -1))
    return g, total.reshape(rows.shape).astype(rows.dtype)


add_to_all.defvjp(lambda x, rows: (x + rows, rows), _add_to_all_backward)
