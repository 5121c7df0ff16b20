"""Spectra of sounds in JAX: short-time Fourier transform, mel filter banks, cepstra.

Pure functions of samples [..., T], on any device and under jit; what depends on sizes alone is
computed by numpy while tracing. Davis & Mermelstein 1980 for mel cepstra; Stevens, Volkmann &
Newman 1937 for the scale.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

Scale = Literal["htk", "slaney", "kaldi"]
SCALES = ("htk", "slaney", "kaldi")
WINDOWS = ("hann", "hamming", "povey", "boxcar")
FLOOR = float(np.finfo(np.float32).eps)
"""Of energies, before their logarithm: Kaldi's."""


@dataclasses.dataclass(frozen=True)
class Frames:
    """How a sound is cut into frames and transformed.

    Attributes:
      length: samples of a frame.
      hop: samples from one frame to the next.
      fft: samples that a frame is padded to with zeros; None for its own.
      window: "hann", "hamming", "povey" (Kaldi's, hann to the power of 0.85) or "boxcar" for none.
      periodic: whether the window would go on with its next sample, as spectra want it, or ends
        with its first, as filters do and Kaldi's windows.
      center: whether frame n is around sample n * hop, with the sound mirrored at its ends.
      remove_mean: whether each frame's mean is subtracted.
      preemphasis: how much of the sample before is subtracted from each; 0 for none.
      scale: factor of the samples; Kaldi's are integers of 16 bits.

    Raises:
      ValueError: sizes that are no sizes, or an unknown window.
    """

    length: int = 400
    hop: int = 160
    fft: int | None = None
    window: str = "hann"
    periodic: bool = True
    center: bool = False
    remove_mean: bool = False
    preemphasis: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be positive"
            for name in ("length", "hop")
            if getattr(self, name) < 1
        ]
        if self.size < self.length:
            problems.append(f"fft={self.fft} must be at least length={self.length}")
        if self.window not in WINDOWS:
            problems.append(f"window={self.window!r} must be one of {WINDOWS}")
        if not 0 <= self.preemphasis < 1:
            problems.append(f"preemphasis={self.preemphasis} must be at least 0 and below 1")
        if problems:
            raise ValueError("Frames: " + "; ".join(problems))

    @property
    def size(self) -> int:
        """Samples that are transformed."""
        return self.length if self.fft is None else self.fft

    @property
    def bins(self) -> int:
        """F: frequencies from 0 to half the rate."""
        return self.size // 2 + 1

    def count(self, samples: int | Array) -> int | Array:
        """How many frames so many samples have, a number or an array of them."""
        around = self.size // 2 * 2 if self.center else 0
        return (samples + around - (self.size if self.center else self.length)) // self.hop + 1

    def taps(self) -> np.ndarray:
        """float64 [length]: the window."""
        steps = self.length if self.periodic else self.length - 1
        if self.window == "boxcar" or steps < 1:
            return np.ones(self.length)
        cosine = np.cos(2 * np.pi * np.arange(self.length) / steps)
        if self.window == "hamming":
            return 0.54 - 0.46 * cosine
        hann = 0.5 - 0.5 * cosine
        return hann**0.85 if self.window == "povey" else hann


KALDI = Frames(
    length=400, hop=160, fft=512, window="povey", periodic=False, remove_mean=True,
    preemphasis=0.97, scale=2.0**15,
)  # fmt: skip
"""Kaldi's frames of 25 ms every 10 ms at 16 kHz, as Hugging Face's Speech2Text has them."""
TWENTY_MS = Frames(length=320, hop=160, window="hann")
"""20 ms every 10 ms at 16 kHz: the 161 bins of Deep Speech 2."""


def stft(samples: Array, frames: Frames) -> Array:
    """The short-time Fourier transform: [..., T] -> complex64 [..., N, F].

    Raises:
      ValueError: fewer samples than a frame.
    """
    x = samples.astype(jnp.float32) * frames.scale
    length = frames.length
    if frames.center:
        # The window stands in the middle of what is transformed.
        half, inside = frames.size // 2, (frames.size - length) // 2
        if x.shape[-1] <= half:
            raise ValueError(f"{x.shape[-1]} samples; frames in the middle need {half + 1}")
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)], mode="reflect")
    else:
        inside = 0
    count = int(frames.count(samples.shape[-1]))
    if count < 1:
        raise ValueError(f"{samples.shape[-1]} samples have no frame of {length}; pad them")
    at = np.arange(count)[:, None] * frames.hop + inside + np.arange(length)
    x = x[..., at]  # [..., N, length]
    if frames.remove_mean:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    if frames.preemphasis:
        before = jnp.concatenate([x[..., :1], x[..., :-1]], axis=-1)
        x = x - frames.preemphasis * before
    x = x * frames.taps().astype(np.float32)
    if frames.center:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(inside, frames.size - length - inside)])
    return jnp.fft.rfft(x, frames.size)


def power(samples: Array, frames: Frames) -> Array:
    """Squared magnitudes: [..., T] -> float32 [..., N, F]."""
    spectrum = stft(samples, frames)
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def log_spectrogram(samples: Array, frames: Frames = TWENTY_MS) -> Array:
    """Logarithms of `power`, what Deep Speech 2 reads: [..., T] -> float32 [..., N, F]."""
    return jnp.log(jnp.maximum(power(samples, frames), FLOOR))


def to_mel(hertz: np.ndarray | float, scale: Scale) -> np.ndarray:
    """Frequencies on a mel scale: "htk" (O'Shaughnessy 1987), "kaldi" (the same in natural
    logarithms) or "slaney" (linear up to 1 kHz; Slaney 1998).
    """
    hertz = np.asarray(hertz, np.float64)
    if scale == "htk":
        return 2595.0 * np.log10(1.0 + hertz / 700.0)
    if scale == "kaldi":
        return 1127.0 * np.log(1.0 + hertz / 700.0)
    high = 15.0 + np.log(np.maximum(hertz, 1000.0) / 1000.0) * (27.0 / np.log(6.4))
    return np.where(hertz < 1000.0, 3.0 * hertz / 200.0, high)


def to_hertz(mels: np.ndarray, scale: Scale) -> np.ndarray:
    """The inverse of `to_mel`."""
    if scale == "htk":
        return 700.0 * (np.power(10.0, mels / 2595.0) - 1.0)
    if scale == "kaldi":
        return 700.0 * (np.exp(mels / 1127.0) - 1.0)
    high = 1000.0 * np.exp((np.maximum(mels, 15.0) - 15.0) * (np.log(6.4) / 27.0))
    return np.where(mels < 15.0, 200.0 * mels / 3.0, high)


def mel_filters(
    frames: Frames,
    mels: int,
    rate: int,
    *,
    low: float = 0.0,
    high: float | None = None,
    scale: Scale = "htk",
    equal_area: bool = False,
    in_mels: bool = False,
) -> np.ndarray:
    """Overlapping triangles, equally wide on the mel scale: float32 [F, M].

    With many filters the lowest ones may lie between two bins, and are 0 everywhere, as are those
    of AST's 128.

    Args:
      frames: whose bins they are sums of.
      mels: M.
      rate: samples a second.
      low, high: Hz, of the first triangle's begin and the last one's end; None is half the rate.
      scale: see `to_mel`.
      equal_area: whether they are divided by their widths (Slaney's), or all have the height 1.
      in_mels: whether their sides are straight on the mel scale, as Kaldi's, or in Hz.

    Raises:
      ValueError: an unknown scale, or frequencies out of order.
    """
    top = rate / 2 if high is None else high
    problems = []
    if scale not in SCALES:
        problems.append(f"scale={scale!r} must be one of {SCALES}")
    if not 0 <= low < top <= rate / 2:
        problems.append(f"low={low} and high={top} must rise from 0 to half the rate, {rate / 2}")
    if mels < 1:
        problems.append(f"mels={mels} must be positive")
    if problems:
        raise ValueError("mel_filters: " + "; ".join(problems))
    edges = np.linspace(to_mel(low, scale), to_mel(top, scale), mels + 2)
    hertz = np.linspace(0.0, rate / 2, frames.bins)
    if in_mels:
        # Kaldi's bins are of the even transform, without the last one.
        hertz = np.arange(frames.bins) * (rate / frames.size)
        places = to_mel(hertz, scale)
    else:
        places, edges = hertz, to_hertz(edges, scale)
    left, middle, right = edges[:-2], edges[1:-1], edges[2:]
    up = (places[:, None] - left) / (middle - left)
    down = (right - places[:, None]) / (right - middle)
    filters = np.maximum(0.0, np.minimum(up, down))
    if equal_area:
        widths = edges if not in_mels else to_hertz(edges, scale)
        filters = filters * (2.0 / (widths[2:] - widths[:-2]))
    return filters.astype(np.float32)


def log_mel(samples: Array, frames: Frames, filters: np.ndarray, *, floor: float = FLOOR) -> Array:
    """Logarithms of energies under filters: [..., T] -> float32 [..., N, M]."""
    energies = jnp.matmul(power(samples, frames), filters, precision="highest")
    return jnp.log(jnp.maximum(energies, floor))


def kaldi_filter_banks(
    samples: Array, *, mels: int = 80, rate: int = 16_000, frames: Frames = KALDI
) -> Array:
    """Kaldi's log-mel filter banks, which Speech2Text, AST and SeamlessM4T read.

    Args:
      samples: [..., T], within 1.
      mels: M.
      rate: samples a second.
      frames: 25 ms every 10 ms of 16 kHz; AST's have a hann window and the scale 1.

    Returns:
      float32 [..., N, M], not normalised.
    """
    filters = mel_filters(frames, mels, rate, low=20.0, scale="kaldi", in_mels=True)
    return log_mel(samples, frames, filters)


def cosine_transform(size: int, kept: int) -> np.ndarray:
    """The orthonormal DCT-II's first coefficients, as a matrix float32 [M, kept]."""
    places, order = np.arange(size)[:, None], np.arange(kept)
    matrix = np.sqrt(2.0 / size) * np.cos(np.pi * (places + 0.5) * order / size)
    matrix[:, 0] = size**-0.5
    return matrix.astype(np.float32)


def mfcc(log_mels: Array, coefficients: int = 13, *, lifter: float = 0.0) -> Array:
    """Mel-frequency cepstral coefficients of log-mel filter banks: [..., M] -> [..., K].

    Args:
      log_mels: of `log_mel`.
      coefficients: K, the first one included.
      lifter: L of coefficient k's factor 1 + L / 2 * sin(pi k / L), Kaldi's is 22; 0 for none.

    Raises:
      ValueError: more coefficients than filters.
    """
    size = log_mels.shape[-1]
    if not 1 <= coefficients <= size:
        raise ValueError(f"coefficients={coefficients} must be from 1 to the {size} filters")
    y = jnp.matmul(log_mels, cosine_transform(size, coefficients), precision="highest")
    if not lifter:
        return y
    factors = 1.0 + lifter / 2.0 * np.sin(np.pi * np.arange(coefficients) / lifter)
    return y * factors.astype(np.float32)


def deltas(features: Array, reach: int = 2) -> Array:
    """Slopes over time by regression (Furui 1986): [..., N, M] -> [..., N, M].

    Args:
      features: frames; those at the ends are repeated.
      reach: frames to each side.
    """
    count = features.shape[-2]
    padded = jnp.pad(
        features, [(0, 0)] * (features.ndim - 2) + [(reach, reach), (0, 0)], mode="edge"
    )
    total = jnp.zeros_like(features)
    for step in range(1, reach + 1):
        after = padded[..., reach + step : reach + step + count, :]
        before = padded[..., reach - step : reach - step + count, :]
        total = total + step * (after - before)
    return total / (2 * sum(step**2 for step in range(1, reach + 1)))


def normalise(features: Array, mask: Array | None = None, *, epsilon: float = 1e-5) -> Array:
    """Each feature with mean 0 and variance 1 over an utterance's frames; padding becomes 0.

    Args:
      features: [..., N, M].
      mask: [..., N], nonzero = keep; None keeps everything.
      epsilon: added to the variance: of silence it is 0.
    """
    x = features.astype(jnp.float32)
    keep = jnp.ones(x.shape[:-1], bool) if mask is None else mask.astype(bool)
    keep = keep[..., None]
    count = jnp.maximum(keep.sum(axis=-2, keepdims=True), 1)
    mean = jnp.where(keep, x, 0).sum(axis=-2, keepdims=True) / count
    centred = jnp.where(keep, x - mean, 0)
    variance = jnp.square(centred).sum(axis=-2, keepdims=True) / count
    return centred / jnp.sqrt(variance + epsilon)
