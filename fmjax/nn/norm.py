"""Normalisation layers; statistics are always float32."""

from __future__ import annotations

from functools import partial
from typing import Any

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
    return _by_rows(x, scale, bias, epsilon, True)


def _by_rows(
    x: Array, scale: Array | None, bias: Array | None, epsilon: float, centred: bool
) -> Array:
    """x by the statistics of its rows, with the derivative that its precision wants."""
    if x.dtype == jnp.float32:
        return _normalised(x, scale, bias, epsilon, centred)[0]
    return _low_precision(x, scale, bias, epsilon, centred)


def _normalised(
    x: Array, scale: Array | None, bias: Array | None, epsilon: float, centred: bool
) -> tuple[Array, tuple[Array | float, Array]]:
    """x by the statistics of its rows, and these: [..., D], ([..., 1] mean, [..., 1] factor)."""
    y = x.astype(jnp.float32)
    mean = jnp.mean(y, axis=-1, keepdims=True) if centred else 0.0
    y = y - mean if centred else y
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    y = y * factor
    if scale is not None:
        y = y * scale.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype), (mean, factor)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _low_precision(
    x: Array, scale: Array | None, bias: Array | None, epsilon: float, centred: bool
) -> Array:
    """The same of x below float32, whose own derivative would keep and pass on float32 arrays as
    large as x: on a GPU these are half of what a norm reads and writes.
    """
    return _normalised(x, scale, bias, epsilon, centred)[0]


def _forward(
    x: Array, scale: Array | None, bias: Array | None, epsilon: float, centred: bool
) -> tuple[Array, tuple[Array, Array | None, Array | None, Array | float, Array]]:
    y, (mean, factor) = _normalised(x, scale, bias, epsilon, centred)
    return y, (x, scale, bias, mean, factor)


def _backward(
    epsilon: float,
    centred: bool,
    residuals: tuple[Array, Array | None, Array | None, Array | float, Array],
    g: Array,
) -> tuple[Array, Array | None, Array | None]:
    # The compiler would find the forward pass's float32 arrays again, and keep one after all.
    (x, scale, bias, mean, factor), g = jax.lax.optimization_barrier((residuals, g))
    unit = (x.astype(jnp.float32) - mean) * factor  # [..., D]
    g32 = g.astype(jnp.float32)
    to_unit = g32 if scale is None else g32 * scale.astype(jnp.float32)
    to_x = to_unit - unit * jnp.mean(to_unit * unit, axis=-1, keepdims=True)
    if centred:
        to_x = to_x - jnp.mean(to_unit, axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    to_scale = None if scale is None else jnp.sum(g32 * unit, rows).astype(scale.dtype)
    to_bias = None if bias is None else jnp.sum(g32, rows).astype(bias.dtype)
    return (to_x * factor).astype(x.dtype), to_scale, to_bias


_low_precision.defvjp(_forward, _backward)


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
        return _by_rows(x, scale, None, self.epsilon, False)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018, arXiv:1803.08494): each example by itself, over all its
    pixels and a group of features; in x's dtype.

    One group is layer normalisation of a whole image with a scale and a bias a feature.

    Args:
        groups: parts of as many neighbouring features each.
        epsilon: added to the variance.
    """

    groups: int
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, ..., C] -> [B, ..., C]
        features = x.shape[-1]
        if features % self.groups:
            raise ValueError(f"{features} features do not fall into {self.groups} groups")
        scale = parameter(self, "scale", nn.initializers.ones, (features,))
        bias = parameter(self, "bias", nn.initializers.zeros, (features,))
        shape = (len(x), -1, self.groups, features // self.groups)
        parts = x.astype(jnp.float32).reshape(shape)  # [B, N, G, C / G]
        centred = parts - jnp.mean(parts, axis=(1, 3), keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=(1, 3), keepdims=True)
        y = (centred * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


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
    def __call__(self, x: Array, mask: Array | None = None) -> Array:  # [..., C] -> [..., C]
        """The normalised values.

        Args:
            x: [..., C].
            mask: the statistics are of what it keeps (nonzero), with x's first axes; None for all.
        """
        size = (x.shape[-1],)
        scale = parameter(self, "scale", nn.initializers.ones, size)
        bias = parameter(self, "bias", nn.initializers.zeros, size)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        if self.train and _moves(self):
            count.value = count.value + 1
        return _batch_normalised(self, x, scale, bias, self.train, mask)


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
    module: BatchNorm | FrozenBatchNorm,
    x: Array,
    scale: Array,
    bias: Array,
    own: bool,
    mask: Array | None = None,
) -> Array:
    """x by the batch's own statistics, which move the running ones, or by the running ones."""
    size = (x.shape[-1],)
    running_mean = module.variable("batch_stats", "mean", jnp.zeros, size)
    running_variance = module.variable("batch_stats", "variance", jnp.ones, size)
    if own:
        values = x.size // x.shape[-1]
        if values < 2:
            raise ValueError(
                f"batch normalisation of {x.shape} in training has {values} value a channel, "
                "which has no variance; use more examples or larger images"
            )
        if mask is None:
            y, *statistics = _whitened(x, scale, bias, module.epsilon)
            mean, variance = jax.lax.stop_gradient(statistics)
            correction = values / (values - 1)
        else:
            kept = mask.astype(jnp.float32).reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
            values = jnp.maximum(jnp.sum(kept) * (values // mask.size), 1)
            axes, x32 = tuple(range(x.ndim - 1)), x.astype(jnp.float32)
            mean = jnp.sum(x32 * kept, axes) / values
            variance = jnp.sum(jnp.square((x32 - mean) * kept), axes) / values
            y = _by_statistics(x, scale, bias, mean, variance, module.epsilon)
            correction = values / jnp.maximum(values - 1, 1)
        if _moves(module):
            unbiased = variance * correction
            for running, value in ((running_mean, mean), (running_variance, unbiased)):
                old = running.value.astype(jnp.float32)
                new = (1 - module.momentum) * old + module.momentum * value
                running.value = new.astype(running.value.dtype)
        return y
    mean = running_mean.value.astype(jnp.float32)
    variance = running_variance.value.astype(jnp.float32)
    return _by_statistics(x, scale, bias, mean, variance, module.epsilon)


def _by_statistics(
    x: Array, scale: Array, bias: Array, mean: Array, variance: Array, epsilon: float
) -> Array:
    factor = jax.lax.rsqrt(variance + epsilon) * scale.astype(jnp.float32)
    y = (x.astype(jnp.float32) - mean) * factor + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def _by_own_statistics(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[Array, Array, Array]:
    """x by the mean and variance over all axes but the last, and these, float32 [C]."""
    axes = tuple(range(x.ndim - 1))
    if x.dtype == jnp.float32:
        mean, variance = jnp.mean(x, axes), jnp.var(x, axes)
    else:
        # In one pass about one of the values, so that a variance far below the mean's square is not
        # lost (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance").
        shift = x[(0,) * (x.ndim - 1)].astype(jnp.float32)
        moved = x.astype(jnp.float32) - shift
        mean, square = jnp.mean(moved, axes), jnp.mean(jnp.square(moved), axes)
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        mean = mean + shift
    return _by_statistics(x, scale, bias, mean, variance, epsilon), mean, variance


def _batch_forward(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    found = _by_own_statistics(x, scale, bias, epsilon)
    return found, (x, scale, bias, *found[1:])


def _batch_backward(
    epsilon: float, residuals: tuple[Array, ...], cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, variance = jax.lax.optimization_barrier(residuals)
    g = cotangents[0]
    values, axes = x.size // x.shape[-1], tuple(range(x.ndim - 1))
    factor = jax.lax.rsqrt(variance + epsilon)
    unit = (x.astype(jnp.float32) - mean) * factor
    g32 = g.astype(jnp.float32)
    to_bias, to_scale = jnp.sum(g32, axes), jnp.sum(g32 * unit, axes)
    to_x = (g32 - to_bias / values - unit * (to_scale / values)) * (factor * scale)
    return to_x.astype(x.dtype), to_scale.astype(scale.dtype), to_bias.astype(bias.dtype)


# The derivative that JAX finds reads x more often, and below float32 keeps float32 arrays of it.
# Of the statistics there is none.
_whitened: Any = jax.custom_vjp(_by_own_statistics, nondiff_argnums=(3,))
_whitened.defvjp(_batch_forward, _batch_backward)
