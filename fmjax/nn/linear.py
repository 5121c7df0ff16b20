"""Dense layers; what adapts them is read here, if the variables have it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.adapter import adapted, adapters
from fmjax.nn.compact import Compact
from fmjax.nn.parameter import kept, parameter
from fmjax.nn.product import affine, matmul
from fmjax.nn.remat import mark_product

Product = Callable[[Array, Array], Array]
"""``x @ kernel`` in x's dtype: [..., I], [I, O] -> [..., O]. It is called in the layer's module."""
_PRODUCT: ContextVar[Product | None] = ContextVar("dense_product", default=None)
_HEAD = "head"


@contextlib.contextmanager
def dense_product(product: Product) -> Iterator[None]:
    """Chooses how dense layers multiply in what is traced in the ``with`` block.

    Heads multiply as ever, which all that is predicted passes, and so do adapted layers and
    compact kernels.
    """
    token = _PRODUCT.set(product)
    try:
        yield
    finally:
        _PRODUCT.reset(token)


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
        kernel = kept(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = None
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
        if adapters(self) is None and not isinstance(kernel, Compact):
            chosen = _PRODUCT.get()
            if chosen is None or _HEAD in self.path:
                return mark_product(affine(x, kernel, bias))
            y = chosen(x, kernel.astype(x.dtype))
            return mark_product(y if bias is None else y + bias.astype(x.dtype))
        return mark_product(dense(self, x, kernel, bias).astype(x.dtype))


def dense(
    module: nn.Module,
    x: Array,
    kernel: Array | Compact,
    bias: Array | None,
    add: Callable[[Array, Array], Array] = jnp.add,
) -> Array:
    """``x @ kernel + bias`` of a module that has these parameters, and what adapts it.

    Args:
        module: in whose compact method this is called.
        x: [..., I].
        kernel: [I, O].
        bias: [O] or None.
        add: how the bias is added.

    Returns:
        [..., O] float32.
    """
    leaves = adapters(module)
    if leaves is None:
        y = matmul(x, kernel)
        return y if bias is None else add(y, bias)
    drops = "dropout" in leaves and module.has_rng("dropout")
    return adapted(leaves, x, kernel, bias, module.make_rng("dropout") if drops else None)
