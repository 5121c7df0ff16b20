"""The activations that config.json names."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def gelu(x: Array) -> Array:
    """Hendrycks & Gimpel 2016, arXiv:1606.08415, exact; computed in float32, in x's dtype.

    jax.nn.gelu goes through erfc, which takes XLA's CPU backend more than twice as long.
    """
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1.0 + jax.lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
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
