"""Batches in which every example takes part independently, as accounts of privacy suppose.

"Poisson sampling": batch k holds each of N examples with the same probability, so its size varies,
and is padded to a fixed one (rows of weight 0 at its end).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import numpy as np

from fmjax.data.batches import BatchStream, Planned, check_options
from fmjax.data.columns import Columns

UNLIKELY = 1e-10
"""A chance of more examples than rows, in all batches of a run, that may be neglected."""


def drawn(rng: np.random.Generator, size: int, rate: float, capacity: int) -> np.ndarray:
    """Which of `size` examples take part: int64 [capacity], in order, -1 for padding at the end.

    Where more than `capacity` were drawn, that many of them stay, each as likely as the others.
    """
    chosen = np.flatnonzero(rng.random(size) < rate)
    if len(chosen) > capacity:
        chosen = np.sort(rng.choice(chosen, capacity, replace=False))
    rows = np.full(capacity, -1, np.int64)
    rows[: len(chosen)] = chosen
    return rows


def overflow(size: int, rate: float, capacity: int, batches: int) -> float:
    """An upper bound of the chance that any of `batches` draws exceeds `capacity` (union bound)."""
    from scipy.stats import binom

    return float(min(1.0, batches * binom.sf(capacity, size, rate)))


def capacity_of(
    size: int, rate: float, batches: int, *, multiple: int = 1, chance: float = UNLIKELY
) -> int:
    """The least number of rows, a multiple of `multiple`, that `batches` draws hardly ever exceed.

    Args:
      size: N, the examples.
      rate: at which each takes part.
      batches: of the whole run.
      multiple: such as the microbatch size, times the processes.
      chance: of any overflow in the run.
    """
    from scipy.stats import binom

    rows = int(binom.isf(chance / batches, size, rate))
    while rows < size and overflow(size, rate, rows, batches) > chance:
        rows += 1
    return max(1, -(-rows // multiple)) * multiple


@dataclasses.dataclass(frozen=True, eq=False)
class Draws:
    """Which examples make batch k, drawn by its number and the seed.

    Attributes:
      size, rate, capacity: see `drawn`.
      lengths: in tokens, of each ragged part: those of the longest example, as a length that is
        chosen by who takes part would tell.
      seed: of the draws.
      total: batches in the stream.
    """

    size: int
    rate: float
    capacity: int
    lengths: tuple[int, ...]
    seed: int
    total: int

    def __len__(self) -> int:
        return self.total

    @property
    def batches_per_epoch(self) -> int:
        return max(1, round(1 / self.rate))

    def __getitem__(self, index: int) -> Planned:
        rng = np.random.default_rng([self.seed, index])
        return Planned(index, self.lengths, drawn(rng, self.size, self.rate, self.capacity))


def sampled_batches(
    data: Columns,
    *,
    rate: float,
    capacity: int,
    seed: int = 0,
    batches: int | None = None,
    length: int | Sequence[int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 4,
) -> BatchStream:
    """A stream of batches in which each example takes part with probability `rate`.

    The draws are numpy's, by batch number and `seed`: who knows the seed knows who takes part, so
    for a guarantee towards others it must be secret, and not 0.

    Args:
      data: N examples; an `EncodedText` gives its own by `columns(pad_id)`.
      rate: the sampling rate of the account.
      capacity: rows of a global batch; see `capacity_of`. A draw of more is cut, and the chance of
        that (`overflow`) belongs to the account.
      seed: of the draws.
      batches: None for a stream that never ends.
      length: tokens of each ragged part; by default those of the longest example.
      process_index, process_count, prefetch: as in `fmjax.data.batches.batches`.

    Returns:
      Batches as there; an "epoch" is ``1 / rate`` of them, in which an example takes part once on
      average.

    Raises:
      ValueError: no examples, a rate outside (0, 1], a capacity below the expected batch size or
        that the processes do not divide, or lengths that do not hold the examples.
    """
    problems = check_options(
        batch_size=capacity,
        seed=seed,
        epochs=batches,
        process_index=process_index,
        process_count=process_count,
        prefetch=prefetch,
    )
    if not 0 < rate <= 1:
        problems.append(f"rate={rate} must be above 0 and at most 1")
    elif capacity < rate * len(data):
        problems.append(
            f"capacity={capacity} is below the expected {rate * len(data):.6g} examples of a "
            "batch; give that of capacity_of"
        )
    if not len(data):
        raise ValueError("; ".join([*problems, "there are no examples"]))
    longest, lengths = data.chosen_lengths(None), data.chosen_lengths(length)
    if len(lengths) != len(longest) or (np.array(lengths) < longest).any():
        problems.append(f"length={length} does not hold the longest examples, {list(longest)}")
    if problems:
        raise ValueError("; ".join(problems))
    source = Draws(
        size=len(data),
        rate=rate,
        capacity=capacity,
        lengths=lengths,
        seed=seed,
        total=sys.maxsize if batches is None else batches,
    )
    return BatchStream(
        source,
        lambda planned, mine: data.assemble(planned.rows[mine], planned.lengths),
        shapes=[(capacity // process_count, *lengths)],
        identity={
            "data": data.fingerprint,
            "rate": rate,
            "capacity": capacity,
            "seed": seed,
            "lengths": list(lengths),
        },
        process_index=process_index,
        process_count=process_count,
        prefetch=prefetch,
    )
