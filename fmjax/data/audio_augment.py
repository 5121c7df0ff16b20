"""Sounds and their features changed at random, as pure functions that run inside a step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

CROSSINGS = 16
"""Zero crossings of the sinc, to each side, by which `change_speed` reads between samples."""


@dataclasses.dataclass(frozen=True)
class SpecAugment:
    """How much of a spectrogram is warped and masked (Park et al. 2019, arXiv:1904.08779, table 1).

    Attributes:
      time_warp: W, frames by which a point is moved at most; 0 for none.
      frequency_size: F, bins of a mask at most.
      frequency_masks: how many there are.
      time_size: T, frames of a mask at most.
      time_share: p, the same as a share of the utterance's frames.
      time_masks: how many there are.

    Raises:
      ValueError: a size or a share that is none.
    """

    time_warp: int = 80
    frequency_size: int = 27
    frequency_masks: int = 1
    time_size: int = 100
    time_share: float = 1.0
    time_masks: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"{field.name}={getattr(self, field.name)} must be at least 0"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) < 0
        ]
        if self.time_share > 1:
            problems.append(f"time_share={self.time_share} must be at most 1")
        if problems:
            raise ValueError("SpecAugment: " + "; ".join(problems))


POLICIES = {
    "LB": SpecAugment(80, 27, 1, 100, 1.0, 1),
    "LD": SpecAugment(80, 27, 2, 100, 1.0, 2),
    "SM": SpecAugment(40, 15, 2, 70, 0.2, 2),
    "SS": SpecAugment(40, 27, 2, 70, 0.2, 2),
}
"""The paper's for LibriSpeech (basic, double) and Switchboard (mild, strong)."""


def spec_augment(
    rng: Array, features: Array, lengths: Array, policy: SpecAugment, *, value: float = 0.0
) -> Array:
    """Frames warped in time, and spans of time and of bins replaced by a value.

    The warp is straight on both sides of the point that is moved (the paper's is a spline).

    Args:
      rng: a typed key.
      features: [B, N, M], normalised: then 0 is their mean.
      lengths: int [B], frames that are no padding.
      policy: how much.
      value: of what is masked.

    Returns:
      [B, N, M] in the features' dtype.
    """
    rows, frames, bins = features.shape
    warp_key, time_key, bin_key = jax.random.split(rng, 3)
    x = features
    if policy.time_warp:
        x = _time_warp(warp_key, x, lengths, policy.time_warp)
    longest = jnp.minimum(policy.time_size, jnp.floor(policy.time_share * lengths))  # [B]
    in_time = _spans(time_key, longest, lengths, policy.time_masks, frames)  # [B, N]
    widths, sizes = jnp.full(rows, policy.frequency_size), jnp.full(rows, bins)
    in_bins = _spans(bin_key, widths, sizes, policy.frequency_masks, bins)  # [B, M]
    masked = in_time[:, :, None] | in_bins[:, None, :]
    return jnp.where(masked, jnp.asarray(value, x.dtype), x)


def _spans(rng: Array, longest: Array, lengths: Array, count: int, size: int) -> Array:
    """bool [B, size]: spans of 0 to `longest` places, uniformly, that start anywhere they fit."""
    shape = (lengths.shape[0], count)
    width_key, start_key = jax.random.split(rng)
    most = jnp.minimum(longest, lengths)[:, None]
    widths = jnp.floor(jax.random.uniform(width_key, shape) * (most + 1))
    starts = jnp.floor(jax.random.uniform(start_key, shape) * (lengths[:, None] - widths + 1))
    at = jnp.arange(size)
    inside = (at >= starts[..., None]) & (at < (starts + widths)[..., None])  # [B, count, size]
    return inside.any(axis=1)


def _time_warp(rng: Array, x: Array, lengths: Array, most: int) -> Array:
    """A random point moved by up to `most` frames, what is before and behind it stretched.

    Utterances of no more than twice as many frames have no such point and stay.
    """
    point_key, move_key = jax.random.split(rng)
    rows, frames = x.shape[:2]
    last = (lengths - 1).astype(jnp.float32)  # [B]
    point = most + jax.random.uniform(point_key, (rows,)) * (last - 2 * most)
    move = jax.random.uniform(move_key, (rows,), minval=-most, maxval=most)
    moved = jnp.clip(point + move, 1.0, jnp.maximum(last - 1.0, 1.0))
    time = jnp.arange(frames, dtype=jnp.float32)[None]  # [1, N]
    point, moved, end = point[:, None], moved[:, None], last[:, None]
    before = time * (point / moved)
    behind = point + (time - moved) * (end - point) / jnp.maximum(end - moved, 1e-6)
    source = jnp.where(time < moved, before, behind)  # [B, N], where each frame comes from
    stays = (lengths <= 2 * most)[:, None] | (time > end)
    source = jnp.where(stays, time, jnp.clip(source, 0.0, jnp.maximum(end, 0.0)))
    first = jnp.clip(jnp.floor(source).astype(jnp.int32), 0, frames - 1)
    second = jnp.minimum(first + 1, frames - 1)
    share = (source - first).astype(x.dtype)[..., None]
    one, other = (jnp.take_along_axis(x, at[..., None], axis=1) for at in (first, second))
    return one * (1 - share) + other * share


def change_speed(samples: Array, lengths: Array, factors: Array, size: int) -> tuple[Array, Array]:
    """Sounds played faster or slower, pitch and all (Ko et al. 2015, "Audio augmentation for
    speech recognition").

    Args:
      samples: [B, T]; padding is 0.
      lengths: int [B], samples that are no padding.
      factors: [B]; 1.1 is a tenth faster. Faster sounds lose what is above their new Nyquist
        frequency.
      size: T' of the result; what does not fit is cut.

    Returns:
      ([B, T'], int [B] of their lengths).
    """
    x = samples.astype(jnp.float32)
    new = jnp.minimum(jnp.ceil(lengths / factors), size).astype(jnp.int32)
    # Of a faster sound the filter is as much longer as its cut-off is lower.
    cut = jnp.minimum(1.0, 1.0 / factors)[:, None]  # [B, 1]
    # Exact steps of whole samples, so that float32 holds the places of long sounds.
    place = jnp.arange(size)[None] * factors[:, None]  # [B, T']
    whole = jnp.floor(place)
    share, whole = place - whole, whole.astype(jnp.int32)
    reach = 2 * CROSSINGS  # of sounds up to twice as fast

    def add(total: Array, step: Array) -> tuple[Array, None]:
        at = whole + step
        distance = (step - share) * cut
        inside = jnp.clip(1.0 - jnp.square(distance / CROSSINGS), 0.0)
        # A Kaiser window of beta 8: its side lobes are 80 dB below.
        window = jax.scipy.special.i0(8.0 * jnp.sqrt(inside)) / float(np.i0(8.0))
        weight = cut * jnp.sinc(distance) * jnp.where(inside > 0, window, 0.0)
        there = (at >= 0) & (at < lengths[:, None])
        value = jnp.take_along_axis(x, jnp.clip(at, 0, x.shape[1] - 1), axis=1)
        return total + jnp.where(there, value, 0.0) * weight, None

    steps = jnp.arange(-reach + 1, reach + 1)
    total, _ = jax.lax.scan(add, jnp.zeros((x.shape[0], size), jnp.float32), steps)
    keep = jnp.arange(size) < new[:, None]
    return jnp.where(keep, total, 0.0).astype(samples.dtype), new


def perturb_speed(
    rng: Array,
    samples: Array,
    lengths: Array,
    *,
    factors: tuple[float, ...] = (0.9, 1.0, 1.1),
) -> tuple[Array, Array]:
    """Each sound at a speed drawn from a few; see `change_speed`.

    Args:
      rng: a typed key.
      samples: [B, T]; padding is 0.
      lengths: int [B], samples that are no padding.
      factors: the speeds, at most 2.

    Returns:
      ([B, T / least factor], int [B] of the new lengths).

    Raises:
      ValueError: no factors, or factors that are not between 0.1 and 2.
    """
    if not factors or not all(0.1 <= factor <= 2.0 for factor in factors):
        raise ValueError(f"factors={factors} must be some, each from 0.1 to 2")
    chosen = jax.random.choice(rng, jnp.asarray(factors, jnp.float32), samples.shape[:1])
    size = int(np.ceil(samples.shape[1] / min(factors)))
    return change_speed(samples, lengths, chosen, size)
