"""Feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable

from flax import linen as nn
from jax import Array

from fmjax.nn.activation import activation
from fmjax.nn.dropout import Dropout
from fmjax.nn.linear import Dense
from fmjax.nn.parameter import columns_held


class Mlp(nn.Module):
    """``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))`` (Shazeer 2020,
    arXiv:2002.05202).

    Once units were removed, the inner width is what the kernels have.

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
        width = columns_held(self, "up", self.width)

        def dense(name: str) -> Dense:
            return Dense(width, self.use_bias, self.kernel_init, name=name)

        hidden = dense("up")(x)  # [..., F]
        act = activation(self.act)
        if self.gated:
            hidden = act(dense("gate")(x)) * hidden
        else:
            hidden = act(hidden)
        hidden = Dropout(self.dropout_rate)(hidden, self.train)
        out_init = self.kernel_init if self.out_init is None else self.out_init
        return Dense(x.shape[-1], self.use_bias, out_init, name="down")(hidden)
