"""Sounds at another rate: polyphase filtering, of a whole sound or block by block, with one result.

The filter is a Kaiser-windowed sinc of 64 zero crossings to each side that cuts what is above the
lower of the two Nyquist frequencies by 100 dB and keeps what is below nine tenths of it (Kaiser
1974; Crochiere & Rabiner 1983, "Multirate digital signal processing", chapter 4).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

import numpy as np

CROSSINGS = 64
STOP = 100.0  # dB
LEAST_RATE, MOST_RATE = 1_000, 384_000


def rate_problems(rate: int, what: str) -> list[str]:
    """What is wrong with a number of samples a second."""
    if isinstance(rate, int | np.integer) and LEAST_RATE <= rate <= MOST_RATE:
        return []
    return [
        f"{what} {rate} Hz is no rate of sounds; it must be an integer from {LEAST_RATE} to "
        f"{MOST_RATE}"
    ]


def resample(samples: np.ndarray, old: int, new: int) -> np.ndarray:
    """A sound at another rate.

    Args:
      samples: float32 [T].
      old: samples a second.
      new: the same of the result.

    Returns:
      float32 [ceil(T * new / old)].

    Raises:
      ValueError: a rate that no sound has.
    """
    if not len(samples):
        return np.zeros(0, np.float32)
    return np.concatenate(list(resample_blocks([samples], old, new)))


def resample_blocks(blocks: Iterable[np.ndarray], old: int, new: int) -> Iterator[np.ndarray]:
    """The same of a sound that comes in blocks float32 [T_i], as blocks of about their length.

    What is kept of a block for the next is as long as the filter, so memory is bounded.

    Raises:
      ValueError: a rate that no sound has.
    """
    if problems := rate_problems(old, "from") + rate_problems(new, "to"):
        raise ValueError("resampling: " + "; ".join(problems))
    if old == new:
        yield from blocks
        return
    from scipy.signal import upfirdn

    up, down = new // math.gcd(old, new), old // math.gcd(old, new)
    taps, half = _filter(up, down)
    lead = -half % down  # zeros before it, so that its middle is at one of the results
    taps = np.concatenate([np.zeros(lead, np.float32), taps])
    middle = (half + lead) // down
    held = np.zeros(0, np.float32)
    first = 0  # the number of the first sample held, a multiple of `down`
    given = 0  # results so far

    def results(end: int) -> np.ndarray:
        """Results number `given` to `end`, of what is held."""
        offset = middle - first // down * up
        return upfirdn(taps, held, up, down)[given + offset : end + offset].astype(np.float32)

    seen = 0
    for block in blocks:
        held = np.concatenate([held, block.astype(np.float32, copy=False)])
        seen += len(block)
        # Result t is made of the samples k with |t * down - k * up| <= half.
        end = ((seen - 1) * up - half) // down + 1
        if end <= given:
            continue
        yield results(end)
        given = end
        start = max(0, (given * down - half) // up // down * down)
        held, first = held[start - first :], start
    if (end := -(-seen * up // down)) > given:
        yield results(end)


@functools.lru_cache(maxsize=8)
def _filter(up: int, down: int) -> tuple[np.ndarray, int]:
    """The filter float32 [2 * half + 1] at `up` times the old rate, and half its length."""
    from scipy.signal import kaiser_beta

    slower = max(up, down)
    half = CROSSINGS * slower
    # The transition band, a part of the Nyquist frequency, at which it ends.
    width = (STOP - 7.95) / (2.285 * np.pi * 2 * CROSSINGS)
    places = np.arange(-half, half + 1, dtype=np.float64)
    taps = np.sinc(places * (1 - width / 2) / slower) * np.kaiser(2 * half + 1, kaiser_beta(STOP))
    return (taps * (up / taps.sum())).astype(np.float32), half
