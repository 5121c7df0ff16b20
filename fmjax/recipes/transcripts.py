"""What was heard in recordings, as text and with times."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a transcript: seconds from the start, and its text."""

    start: float
    end: float
    text: str


@dataclasses.dataclass(frozen=True)
class Transcript:
    """What was heard in one recording.

    Attributes:
        seconds: how long it is.
        text: all of it.
        pieces: with times, where these were asked for or the recording is longer than a window.
        changes: what had to be done to the sound, a sentence each.
    """

    seconds: float
    text: str
    pieces: tuple[Piece, ...] | None = None
    changes: tuple[str, ...] = ()
