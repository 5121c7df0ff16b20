"""Feed-forward blocks and the activations that config.json names."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.dropout import Dropout
from fmjax.nn.linear import Dense


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


class Mlp(nn.Module):
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))`` (Shazeer 2020,
    arXiv:2002.05202).

    Args:
        width: F, the inner width.
        act: name of the activation, as in config.json.
        kernel_init: initializer of the kernels.
        out_init: of the kernel "down"; None is as `kernel_init`.
        use_bias: whether the layers have biases.
        gated: whether there is a gate.
        dropout_rate: of the inner activations.
        train: whether to drop.
    """

    width: int
    act: str
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    out_init: Callable[..., Array] | None = None
    use_bias: bool = True
    gated: bool = False
    dropout_rate: float = 0.0
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
        def dense(name: str) -> Dense:
            return Dense(self.width, self.use_bias, self.kernel_init, name=name)

        hidden = dense("up")(x)  # [..., F]
        act = activation(self.act)
        if self.gated:
            hidden = act(dense("gate")(x)) * hidden
        else:
            hidden = act(hidden)
        hidden = Dropout(self.dropout_rate)(hidden, self.train)
        out_init = self.kernel_init if self.out_init is None else self.out_init
        return Dense(x.shape[-1], self.use_bias, out_init, name="down")(hidden)
