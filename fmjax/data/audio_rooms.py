"""Sounds as other rooms, microphones and telephones would have them, at random: pure functions of
samples [B, T] whose padding is 0, that run inside a step.

Reverberation and noise for training as in Ko et al. 2017, "A study on data augmentation of
reverberant speech for robust speech recognition"; here rooms are drawn, not measured.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Rooms:
    """What is drawn for each sound, uniformly between two numbers.

    Attributes:
      silence: seconds before the sound, and behind it.
      reverberation: seconds in which an echo falls by 60 dB.
      echo: energy of the echoes as a share of the sound's own; 0 for none.
      tilt: decibels that an octave above 500 Hz gets more than one below.
      low, high: Hz between which a telephone lets pass; as shares of half the rate for `high`.
      noise: decibels of the sound above the noise.
      speakers: factor of the frequencies of whoever speaks (Jaitly & Hinton 2013, "Vocal tract
        length perturbation (VTLP) improves speech recognition").

    Raises:
      ValueError: ranges that are none.
    """

    silence: Range = (0.0, 0.35)
    reverberation: Range = (0.05, 0.4)
    echo: Range = (0.0, 0.3)
    tilt: Range = (-4.0, 4.0)
    low: Range = (0.0, 250.0)
    high: Range = (0.8, 1.0)
    noise: Range = (10.0, 50.0)
    speakers: Range = (0.85, 1.15)

    def __post_init__(self) -> None:
        problems = [
            f"{name}={bounds} must be two numbers, the lower first"
            for name, bounds in vars(self).items()
            if len(bounds) != 2 or not bounds[0] <= bounds[1]
        ]
        for name in ("silence", "echo", "low"):
            if not problems and vars(self)[name][0] < 0:
                problems.append(f"{name}={vars(self)[name]} must be at least 0")
        for name in ("reverberation", "high", "speakers"):
            if not problems and vars(self)[name][0] <= 0:
                problems.append(f"{name}={vars(self)[name]} must be above 0")
        if problems:
            raise ValueError("Rooms: " + "; ".join(problems))


def drawn(rng: Array, count: int, bounds: Range) -> Array:
    """float32 [count], uniformly."""
    return jax.random.uniform(rng, (count,), minval=bounds[0], maxval=bounds[1])


def surround(
    rng: Array, samples: Array, lengths: Array, rate: int, seconds: Range
) -> tuple[Array, Array]:
    """Silence before and behind each sound, of a length each: ([B, T'], int [B] of the lengths).

    Args:
      rng: a typed key.
      samples: [B, T].
      lengths: int [B], samples that are no padding.
      rate: samples a second.
      seconds: bounds of either silence; T' is T and twice the higher.
    """
    first, second = jax.random.split(rng)
    rows = samples.shape[0]
    before, behind = (
        jnp.round(drawn(key, rows, seconds) * rate).astype(jnp.int32) for key in (first, second)
    )
    size = samples.shape[1] + 2 * int(np.ceil(seconds[1] * rate))
    at = jnp.arange(size) - before[:, None]
    inside = (at >= 0) & (at < lengths[:, None])
    moved = jnp.take_along_axis(samples, jnp.clip(at, 0, samples.shape[1] - 1), axis=1)
    return jnp.where(inside, moved, 0), lengths + before + behind


def through(rng: Array, samples: Array, rate: int, rooms: Rooms) -> Array:
    """Sounds with echoes, and through a channel that favours some frequencies: [B, T].

    Args:
      rng: a typed key.
      samples: [B, T].
      rate: samples a second.
      rooms: what is drawn.
    """
    rows, size = samples.shape
    keys = jax.random.split(rng, 6)
    decay = drawn(keys[0], rows, rooms.reverberation)[:, None]
    tail = int(rooms.reverberation[1] * rate)
    time = jnp.arange(1, tail + 1) / rate
    # 60 dB are a factor of 1000 in magnitude.
    echoes = jax.random.normal(keys[1], (rows, tail)) * jnp.exp(-jnp.log(1e3) * time / decay)
    energy = jnp.sum(jnp.square(echoes), axis=1, keepdims=True)
    echoes *= jnp.sqrt(drawn(keys[2], rows, rooms.echo)[:, None] / energy)
    response = jnp.concatenate([jnp.ones((rows, 1)), echoes], axis=1)
    length = 1 << (size + tail).bit_length()
    hertz = jnp.fft.rfftfreq(length, 1 / rate)
    octaves = jnp.log2(jnp.maximum(hertz, 60.0) / 500.0)
    tilt = drawn(keys[3], rows, rooms.tilt)[:, None] * octaves  # decibels
    low = drawn(keys[4], rows, rooms.low)[:, None]
    high = drawn(keys[5], rows, rooms.high)[:, None] * rate / 2
    # Of a fourth order at the lower end, steeper at the upper one, as telephones are.
    passed = 1 / jnp.sqrt(1 + (low / jnp.maximum(hertz, 1e-3)) ** 4)
    passed *= 1 / jnp.sqrt(1 + (hertz / high) ** 24)
    channel = passed * 10 ** (tilt / 20)
    spectrum = jnp.fft.rfft(samples, length) * jnp.fft.rfft(response, length) * channel
    return jnp.fft.irfft(spectrum, length)[:, :size].astype(samples.dtype)


def with_noise(rng: Array, samples: Array, lengths: Array, decibels: Range) -> Array:
    """Noise so many decibels below each sound, white or, as likely, falling by 6 dB an octave.

    Args:
      rng: a typed key.
      samples: [B, T].
      lengths: int [B]; padding stays 0.
      decibels: bounds of what is drawn.
    """
    rows, size = samples.shape
    noise_key, level_key, kind_key = jax.random.split(rng, 3)
    white = jax.random.normal(noise_key, (rows, size))
    bins = jnp.arange(size // 2 + 1)
    brown = jnp.fft.irfft(jnp.fft.rfft(white) / jnp.maximum(bins, size / 200), size)
    noise = jnp.where(jax.random.bernoulli(kind_key, 0.5, (rows, 1)), white, brown)
    keep = jnp.arange(size) < lengths[:, None]

    def energy(x: Array) -> Array:
        return jnp.sum(jnp.square(jnp.where(keep, x, 0)), axis=1, keepdims=True)

    ratio = 10 ** (-drawn(level_key, rows, decibels)[:, None] / 10)
    scale = jnp.sqrt(energy(samples) * ratio / jnp.maximum(energy(noise), 1e-12))
    return jnp.where(keep, samples + scale * noise, 0).astype(samples.dtype)


def warp_frequencies(powers: Array, factors: Array) -> Array:
    """Spectra with their frequencies multiplied: a shorter throat has higher ones.

    Args:
      powers: [B, N, F], from 0 to half the rate; what comes from beyond it is the last.
      factors: [B].
    """
    last = powers.shape[-1] - 1
    place = jnp.clip(jnp.arange(last + 1) / factors[:, None], 0, last)  # [B, F]
    whole = jnp.floor(place).astype(jnp.int32)
    share = (place - whole)[:, None]
    take = jax.vmap(lambda rows, at: rows[:, at])
    lower, upper = take(powers, whole), take(powers, jnp.minimum(whole + 1, last))
    return lower * (1 - share) + upper * share


def without_silence(
    samples: np.ndarray, rate: int, *, below: float = 40.0, margin: float = 0.02
) -> np.ndarray:
    """A sound from where it begins to where it ends, on the host: float32 [T].

    Args:
      samples: [T].
      rate: samples a second.
      below: decibels below the loudest hundredth of a second that are silence.
      margin: seconds of it that stay at either end.
    """
    width = max(1, rate // 100)
    energy = np.convolve(np.square(samples, dtype=np.float64), np.ones(width) / width, "same")
    loud = np.flatnonzero(energy > energy.max() * 10 ** (-below / 10))
    if not len(loud):
        return samples
    kept = round(margin * rate)
    return samples[max(loud[0] - kept, 0) : loud[-1] + 1 + kept]
