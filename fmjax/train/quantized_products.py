"""Dense layers that multiply in 8 bits while they train, forward and backward, by qwix.

Each row of what is multiplied, and each column of the kernel, is rounded to 8 bits by a scale of
its own, the products are of 8 bits, and sums are rescaled. Weights, gradients and moments stay as
they are. Jacob et al. 2018, arXiv:1712.05877, section 2; of float8 Micikevicius et al. 2022,
arXiv:2209.05433.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.nn.linear import dense_product
from fmjax.types import Aux, Batch, LossFn, Variables

Quantized = Literal["int8", "float8"]
# Of what is multiplied, forward, and of the gradients that come back: these range further.
_TYPES: dict[str, tuple[Any, Any]] = {
    "int8": (jnp.int8, jnp.int8),
    "float8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


def quantized_products(loss: LossFn, dtype: Quantized) -> LossFn:
    """The loss of a model whose dense layers multiply in 8 bits; so do their gradients.

    It composes as `cast` does, which goes around it: what is rounded is in the computation's
    precision. Attention's scores, convolutions, experts of a mixture, embeddings, adapted layers
    and heads multiply as they did. qwix's own ``quantize_model`` would find the products of a model
    in float32 alone, and attention's: in bfloat16 the gradients of `fmjax.nn.product` are a custom
    rule's, which it does not see. So dense layers are given qwix's product itself.

    Args:
        loss: any task's.
        dtype: "int8", which TPUs since v5e and NVIDIA GPUs multiply at twice bfloat16's rate, or
            "float8", forward in e4m3 and backward in e5m2, as GPUs since Hopper and TPUs since v7
            do. Elsewhere it is computed all the same, and takes longer.

    Raises:
        ValueError: another dtype.
        ImportError: qwix is not installed.
    """
    if dtype not in get_args(Quantized):
        raise ValueError(f"dtype={dtype!r}; choose 'int8' or 'float8'")
    try:
        import qwix
    except ImportError as error:
        raise ImportError(
            "products of 8 bits are computed by qwix, which is not installed: "
            "pip install fmjax[qwix]"
        ) from error
    forward, backward = _TYPES[dtype]
    provider = qwix.QtProvider(
        [qwix.QtRule(weight_qtype=forward, act_qtype=forward, bwd_qtype=backward)]
    )

    def product(x: Array, kernel: Array) -> Array:
        # Rows, as gradients are scaled by row too. Three axes: qwix would take rows that happen to
        # have the kernel's shape for the kernel itself.
        rows = x.reshape(1, -1, x.shape[-1])  # [1, N, I]
        y = provider.dot_general(rows, kernel, (((2,), (0,)), ((), ())))  # [1, N, O]
        return y.reshape(*x.shape[:-1], -1).astype(x.dtype)

    def quantized(variables: Variables, batch: Batch, rng: Array | None) -> tuple[jax.Array, Aux]:
        with dense_product(product):
            return loss(variables, batch, rng)

    return quantized
