"""Several streams of the same shapes as one: a batch of each comes together, leaves [K, B, ...].

Members of an ensemble that train in one program see data in orders of their own through it, or
different data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fmjax.data.batches import check_state
from fmjax.data.mixture import Stream


class SideBySide(Iterator[dict[str, np.ndarray]]):
    """One batch of each stream, stacked.

    Attributes:
      batches_per_epoch: of the longest stream.
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        """Args:
        streams: K, whose batches have the same names and shapes; of texts, with one bucket.

        Raises:
          ValueError: there are none.
        """
        if not streams:
            raise ValueError("there are no streams; give at least one")
        self._streams = list(streams)
        self.batches_per_epoch = max(stream.batches_per_epoch for stream in streams)

    def __next__(self) -> dict[str, np.ndarray]:
        parts = [next(stream) for stream in self._streams]
        forms = [{name: np.shape(leaf) for name, leaf in part.items()} for part in parts]
        if differing := [form for form in forms if form != forms[0]]:
            raise ValueError(
                f"batches of streams side by side have different shapes, {forms[0]} and "
                f"{differing[0]}: give them one batch size, and texts one bucket"
            )
        return {name: np.stack([part[name] for part in parts]) for name in forms[0]}

    def get_state(self) -> dict[str, Any]:
        """The position, after the last batch that was returned, ready for json.dumps."""
        position = [stream.get_state() for stream in self._streams]
        return {"position": position, "stream": {"streams": len(self._streams)}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a position, bitwise as the streams it was taken from would have.

        Raises:
          ValueError: a state of other streams, or of another number of them.
        """
        check_state(state, {"streams": len(self._streams)})
        for stream, part in zip(self._streams, state["position"], strict=True):
            stream.set_state(part)

    def close(self) -> None:
        """Ends the streams' prefetching; none can be used any more."""
        for stream in self._streams:
            stream.close()
