"""Normalisation layers; statistics are always float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.parameter import parameter


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
        size = (x.shape[-1],)
        scale = parameter(self, "scale", nn.initializers.ones, size) if self.use_scale else None
        bias = parameter(self, "bias", nn.initializers.zeros, size) if self.use_bias else None
        return layer_norm(x, scale, bias, self.epsilon)


def layer_norm(x: Array, scale: Array | None, bias: Array | None, epsilon: float) -> Array:
    """`LayerNorm` as a function of its parameters [D]: [..., D] -> [..., D]."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    centred = x32 - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + epsilon)
    if scale is not None:
        y = y * scale.astype(jnp.float32)
    if bias is not None:
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
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(square + self.epsilon)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


def unit_length(x: Array) -> Array:
    """Vectors [..., D] divided by their length, float32; those of length 0 stay."""
    x = x.astype(jnp.float32)
    # Not the norm itself: its derivative at 0 is nan.
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (Ioffe & Szegedy 2015, arXiv:1502.03167).

    In training the batch's own mean and variance are used, and the running ones, in the collection
    ``batch_stats``, move towards them where that collection is mutable: as in PyTorch towards the
    variance with n - 1 in the denominator. ``count`` is how often they moved. Everything is float32
    inside and the result in x's dtype. Under jit over several devices the statistics are those of
    the whole batch.

    Args:
        train: whether the batch's own statistics are used.
        epsilon: added to the variance.
        momentum: share of the batch in the new running statistics.
    """

    train: bool
    epsilon: float = 1e-5
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., C] -> [..., C]
        size = (x.shape[-1],)
        scale = parameter(self, "scale", nn.initializers.ones, size)
        bias = parameter(self, "bias", nn.initializers.zeros, size)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        if self.train and _moves(self):
            count.value = count.value + 1
        return _batch_normalised(self, x, scale, bias, self.train)


class FrozenBatchNorm(nn.Module):
    """Batch normalisation whose scale and bias are constants, and in training its statistics too.

    Detectors have it in their backbones, since their batches are too small to estimate statistics
    from. All four arrays are in the collection ``batch_stats``, so that nothing trains them.

    Args:
        train, epsilon, momentum: see `BatchNorm`.
        moving: whether the statistics behave as `BatchNorm`'s: for a backbone that starts from
            random weights, whose statistics are not known yet.
    """

    train: bool
    epsilon: float = 1e-5
    momentum: float = 0.1
    moving: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., C] -> [..., C]
        size = (x.shape[-1],)
        scale = self.variable("batch_stats", "scale", jnp.ones, size).value
        bias = self.variable("batch_stats", "bias", jnp.zeros, size).value
        return _batch_normalised(self, x, scale, bias, self.train and self.moving)


def _moves(module: nn.Module) -> bool:
    """Whether running statistics are to be changed."""
    return module.is_mutable_collection("batch_stats") and not module.is_initializing()


def _batch_normalised(
    module: BatchNorm | FrozenBatchNorm, x: Array, scale: Array, bias: Array, own: bool
) -> Array:
    """x by the batch's own statistics, which move the running ones, or by the running ones."""
    size = (x.shape[-1],)
    running_mean = module.variable("batch_stats", "mean", jnp.zeros, size)
    running_variance = module.variable("batch_stats", "variance", jnp.ones, size)
    x32 = x.astype(jnp.float32)
    if own:
        values = x.size // x.shape[-1]
        if values < 2:
            raise ValueError(
                f"batch normalisation of {x.shape} in training has {values} value a channel, "
                "which has no variance; use more examples or larger images"
            )
        axes = tuple(range(x.ndim - 1))
        mean, variance = jnp.mean(x32, axes), jnp.var(x32, axes)
        if _moves(module):
            unbiased = variance * (values / (values - 1))
            for running, value in ((running_mean, mean), (running_variance, unbiased)):
                old = running.value.astype(jnp.float32)
                new = (1 - module.momentum) * old + module.momentum * value
                running.value = new.astype(running.value.dtype)
    else:
        mean = running_mean.value.astype(jnp.float32)
        variance = running_variance.value.astype(jnp.float32)
    factor = jax.lax.rsqrt(variance + module.epsilon) * scale.astype(jnp.float32)
    return ((x32 - mean) * factor + bias.astype(jnp.float32)).astype(x.dtype)
