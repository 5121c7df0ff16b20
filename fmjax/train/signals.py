"""SIGTERM and Ctrl-C as a question the loop asks: finish the step, save, leave."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the context, the first SIGTERM or SIGINT asks the run to end after its step.

    Yields ``should_stop``, for `fit`; what was trained is then saved by the caller. The handlers
    from before come back on the first signal already, so that a second one acts at once.

    >>> with stop_signals() as should_stop:
    ...     should_stop()
    False

    Raises:
        ValueError: outside of the main thread, where Python allows no signal handlers.
    """
    received = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, ask)
    try:
        yield lambda: received
    finally:
        restore()
