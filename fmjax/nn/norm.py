"""Normalisation layers; statistics are always float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba et al. 2016, arXiv:1607.06450), in x's dtype.

    Args:
        epsilon: added to the variance.
        use_bias: whether a bias is added.
        use_scale: whether there is a scale.
    """

    epsilon: float
    use_bias: bool = True
    use_scale: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32, axis=-1, keepdims=True)
        centred = x32 - mean
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.epsilon)
        if self.use_scale:
            scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
            y = y * scale.astype(jnp.float32)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
            y = y + bias.astype(jnp.float32)
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis (Zhang & Sennrich 2019,
    arXiv:1910.07467), in x's dtype.

    Args:
        epsilon: added to the mean square.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(square + self.epsilon)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)
