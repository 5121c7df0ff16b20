"""Several streams of batches as one: which comes next is drawn, or one of each comes together.

Every name in a batch begins with its stream's: ``"tags/input_ids"``. The number of a batch and the
seed determine the draw, so that resuming is exact, and all processes draw alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from fmjax.data.batches import check_state
from fmjax.types import Batch


def part(batch: Batch, name: str) -> dict[str, Any]:
    """What a batch has of one stream, by the stream's own names.

    Raises:
        ValueError: nothing.
    """
    found = {
        key.removeprefix(f"{name}/"): value
        for key, value in batch.items()
        if key.startswith(f"{name}/")
    }
    if not found:
        raise ValueError(f"the batch has nothing called {name}/..., only {sorted(batch)}")
    return found


class Stream(Protocol):
    """What `fmjax.data.BatchStream` is, and a `Mixture` too."""

    @property
    def batches_per_epoch(self) -> int: ...
    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def mixing_rates(
    sizes: Mapping[str, float], *, limit: float = math.inf, temperature: float = 1.0
) -> dict[str, float]:
    """The share of each set in a mixture: ``min(size, limit) ^ (1 / temperature)``, normalised.

    Raffel et al. 2020, arXiv:1910.10683, section 3.5.2: at temperature 1 in proportion to the
    examples, with an artificial limit on a set's size; the higher the temperature, the more alike.

    Args:
        sizes: examples of each set.
        limit: K there.
        temperature: T there; infinity mixes equally.

    Raises:
        ValueError: no sets, or numbers that are not positive.
    """
    wrong = {name: size for name, size in sizes.items() if not 0 < size < math.inf}
    problems = [f"sizes {wrong} must be above 0"] if wrong or not sizes else []
    problems += [
        f"{name}={value} must be above 0"
        for name, value in (("limit", limit), ("temperature", temperature))
        if not value > 0
    ]
    if problems:
        raise ValueError("; ".join(problems))
    shares = {name: min(size, limit) ** (1 / temperature) for name, size in sizes.items()}
    return {name: share / sum(shares.values()) for name, share in shares.items()}


class Mixture(Iterator[dict[str, np.ndarray]]):
    """Batches of several streams.

    Attributes:
      batches_per_epoch: of all streams together; where one of each comes, of the longest.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        rates: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Args:
        streams: by name, without a "/"; endless ones, unless the run is shorter than any.
        rates: how often each is drawn, summing to 1 (see `mixing_rates`); None joins one batch of
            each.
        seed: of the draws.

        Raises:
          ValueError: names that do not fit, or rates that are none.
        """
        problems = []
        if wrong := [name for name in streams if "/" in name] or not streams:
            problems.append(f"streams {wrong or list(streams)} need names, and none with a '/'")
        if rates is not None and not (
            rates.keys() == streams.keys()
            and min(rates.values(), default=0) >= 0
            and math.isclose(sum(rates.values()), 1, rel_tol=1e-6)
        ):
            problems.append(f"rates={dict(rates)} must be shares of {list(streams)}, 1 in all")
        if seed < 0:
            problems.append(f"seed={seed} must be at least 0")
        if problems:
            raise ValueError("; ".join(problems))
        self._streams, self._seed, self._position = dict(streams), seed, 0
        self._rates = None if rates is None else {name: float(rates[name]) for name in streams}
        epochs = [stream.batches_per_epoch for stream in streams.values()]
        self.batches_per_epoch = max(epochs) if rates is None else sum(epochs)

    def drawn(self, number: int) -> list[str]:
        """Of which streams batch `number` is."""
        if self._rates is None:
            return list(self._streams)
        at = np.random.default_rng([self._seed, number]).random() * sum(self._rates.values())
        ends = np.cumsum(list(self._rates.values()))
        return [list(self._rates)[int(np.searchsorted(ends[:-1], at, side="right"))]]

    def __next__(self) -> dict[str, np.ndarray]:
        batch = {
            f"{name}/{key}": value
            for name in self.drawn(self._position)
            for key, value in next(self._streams[name]).items()
        }
        self._position += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, after the last batch that was returned, ready for json.dumps."""
        parts = {name: stream.get_state() for name, stream in self._streams.items()}
        position = {"next_index": self._position, "streams": parts}
        return {"position": position, "stream": self._identity}

    @property
    def _identity(self) -> dict[str, Any]:
        return {"names": list(self._streams), "rates": self._rates, "seed": self._seed}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a position, bitwise as the mixture it was taken from would have.

        Raises:
          ValueError: a state of another mixture, or of other streams.
        """
        check_state(state, self._identity)
        for name, stream in self._streams.items():
            stream.set_state(state["position"]["streams"][name])
        self._position = state["position"]["next_index"]

    def close(self) -> None:
        """Ends the streams' prefetching; none can be used any more."""
        for stream in self._streams.values():
            stream.close()
