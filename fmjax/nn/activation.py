"""The activations that config.json names."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def _keeping_input(fn: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """`fn` in float32 and in x's dtype, of which, below float32, x alone is kept for the gradient.

    By its own derivative several float32 arrays as large as x, the widest of a block, would be
    written and read again; what they hold is computed anew from x while the gradient passes.
    """

    @jax.custom_vjp
    def low_precision(x: Array) -> Array:
        return fn(x.astype(jnp.float32)).astype(x.dtype)

    def backward(x: Array, g: Array) -> tuple[Array]:
        # The compiler would find what it has computed before, and keep it after all.
        x32 = jax.lax.optimization_barrier(x).astype(jnp.float32)
        (to_x,) = jax.vjp(fn, x32)[1](g.astype(jnp.float32))
        return (to_x.astype(x.dtype),)

    low_precision.defvjp(lambda x: (low_precision(x), x), backward)
    return lambda x: fn(x) if x.dtype == jnp.float32 else low_precision(x)


@_keeping_input
def gelu(x: Array) -> Array:
    """Hendrycks & Gimpel 2016, arXiv:1606.08415, exact.

    jax.nn.gelu goes through erfc, which takes XLA's CPU backend more than twice as long.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


_gelu_tanh = _keeping_input(partial(jax.nn.gelu, approximate=True))
_silu = _keeping_input(jax.nn.silu)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "quick_gelu": _keeping_input(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": _silu,
    "swish": _silu,
    "mish": _keeping_input(jax.nn.mish),
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The function that ``hidden_act`` names in a Hugging Face config.

    Raises:
        ValueError: the name is not known.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not known; use one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]
