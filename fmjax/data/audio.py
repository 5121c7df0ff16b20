"""One sound, of a WAV or FLAC file or an array, as float32 samples of one channel at one rate.

What had to be changed is said, and what is no sound is refused. Files are read in blocks: a header
that promises hours allocates nothing, and a file of hours can be read in bounded memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fmjax.data.resampling import rate_problems, resample_blocks

Source = str | Path | bytes | tuple[np.ndarray, int]
"""A path, the bytes of a file, or samples [T] or [T, C] (floats within 1, or integers of their
whole range) with how many there are a second."""

FILES = (".wav", ".flac")
"""Endings of the files that are read."""
RATE = 16_000
"""Samples a second that models of speech take, where nothing else is said."""
MAX_CHANNELS = 32
PEAK = 64.0
"""Floats beyond it, 36 dB above full scale, are no samples within 1."""
MAX_SECONDS = 4 * 3600
"""What is read as a whole; longer sounds are read by `open_audio` in blocks."""
SILENT = "it is silent: all samples are 0"
MAGIC = (b"RIFF", b"RF64", b"fLaC")
FORMATS = ("WAV", "WAVEX", "RF64", "FLAC")
UNKNOWN_SIZE = 0xFFFFFFFF
"""What programs that write into a pipe put into a header for the size of the samples."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sound:
    """Samples of one channel.

    Attributes:
      samples: float32 [T], within 1 unless the source's floats are a little beyond it.
      rate: samples a second.
      changes: what was done to what the source holds, one sentence each; () for nothing.
    """

    samples: np.ndarray
    rate: int
    changes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate


class OpenAudio:
    """A sound that is read as it is needed; made by `open_audio`.

    Attributes:
      rate: samples a second of what `blocks` gives.
      changes: as in `Sound`.
    """

    def __init__(self, parts: Iterator[np.ndarray], rate: int, changes: tuple[str, ...]) -> None:
        self.parts = parts
        self.rate = rate
        self.changes = changes

    def blocks(self, seconds: float = 30.0) -> Iterator[np.ndarray]:
        """Its samples from where they were read to: float32 [rate * seconds], the last one shorter.

        Raises:
          ValueError: the file ends before its header says, is broken, or holds numbers that are not
            finite.
        """
        size = int(self.rate * seconds)
        if size < 1:
            raise ValueError(f"blocks of {seconds} seconds hold no sample; ask for longer ones")
        held, length = [], 0
        for part in self.parts:
            while length + len(part) >= size:
                yield np.concatenate([*held, part[: size - length]])
                part, held, length = part[size - length :], [], 0
            held.append(part)
            length += len(part)
        if length:
            yield np.concatenate(held)


def read_audio(source: Source, rate: int = RATE, *, max_seconds: float = MAX_SECONDS) -> Sound:
    """A whole sound: its channels averaged, at the rate that is asked for.

    Args:
      source: see `Source`.
      rate: samples a second of the result.
      max_seconds: longer sounds are refused, which small compressed files can be.

    Raises:
      OSError: a file cannot be opened.
      ImportError: soundfile, which reads the files, is not installed.
      ValueError: no sound, a broken or truncated one, one without samples, a longer one, or
        numbers that are not finite or far beyond 1.
    """
    parts, length = [], 0
    with open_audio(source, rate) as sound:
        for part in sound.parts:
            parts.append(part)
            length += len(part)
            if length > rate * max_seconds:
                raise ValueError(
                    f"it is longer than {max_seconds} seconds; read it in blocks (open_audio) or "
                    "give a larger max_seconds"
                )
        changes = sound.changes
    if not length:
        raise ValueError("it has no samples; record it again or leave it out")
    samples = np.concatenate(parts)
    if not samples.any():
        changes = (*changes, SILENT)
    return Sound(samples, rate, changes)


@contextlib.contextmanager
def open_audio(source: Source, rate: int = RATE) -> Iterator[OpenAudio]:
    """A sound to be read in blocks; its file is open inside the context.

    Raises:
      OSError: a file cannot be opened.
      ImportError: soundfile, which reads the files, is not installed.
      ValueError: no sound, or of a kind that is not read.
    """
    if isinstance(source, tuple):
        samples, old = source
        if not isinstance(samples, np.ndarray):
            raise ValueError(f"samples are a {type(samples).__name__}; give a NumPy array")
        yield _changed(iter([_of_array(samples)]), samples.ndim - 1 and samples.shape[1], old, rate)
        return
    if not isinstance(source, str | Path | bytes):
        raise ValueError(
            f"a {type(source).__name__} is no sound; give a path, bytes, or (samples, rate)"
        )
    if isinstance(source, bytes):
        file: BinaryIO = io.BytesIO(source)
    else:
        file = Path(source).expanduser().open("rb")
    with file, _decoder(file) as decoder:
        yield _changed(_decoded(decoder), decoder.channels, decoder.samplerate, rate)


def _changed(parts: Iterator[np.ndarray], channels: int, old: int, rate: int) -> OpenAudio:
    """Frames [T_i, C] of a source as one channel at a rate, and what that takes."""
    if problems := rate_problems(old, "its rate of") + rate_problems(rate, "the rate asked for,"):
        raise ValueError("; ".join(problems))
    changes = []
    if channels > 1:
        changes.append(f"its {channels} channels were averaged")
    if old != rate:
        changes.append(f"it was resampled from {old} to {rate} Hz")
    single = (part.mean(axis=1) if part.shape[1] > 1 else part[:, 0] for part in parts)
    return OpenAudio(resample_blocks(single, old, rate), rate, tuple(changes))


def _of_array(samples: np.ndarray) -> np.ndarray:
    """Frames float32 [T, C] of an array."""
    frames = samples[:, None] if samples.ndim == 1 else samples
    kind = samples.dtype.kind
    if frames.ndim != 2 or kind not in "fi" or not 1 <= frames.shape[1] <= MAX_CHANNELS:
        raise ValueError(
            f"samples are {samples.dtype} {list(samples.shape)}; they must be floats or signed "
            f"integers [T] or [T, C] of at most {MAX_CHANNELS} channels"
        )
    scale = 1.0 if kind == "f" else -float(np.iinfo(samples.dtype).min)
    frames = (frames / scale).astype(np.float32)
    _check_numbers(frames, 0)
    return frames


def _check_numbers(frames: np.ndarray, start: int) -> None:
    peak = float(np.abs(frames).max(initial=0))  # nan is below nothing
    if PEAK < peak < np.inf:
        place = start + int(np.abs(frames).max(axis=1).argmax())
        raise ValueError(
            f"sample {place} is {peak:g}; floats are within 1, and these look like integers that "
            "were only converted: divide them by 32768 (of 16 bits), or give the integers"
        )
    if len(wrong := np.flatnonzero(~np.isfinite(frames).all(axis=1))):
        raise ValueError(
            f"{len(wrong)} samples are no finite numbers, the first is number {start + wrong[0]}; "
            "the file is broken, or was computed wrongly"
        )


@contextlib.contextmanager
def _decoder(file: BinaryIO) -> Iterator[Any]:
    """A soundfile.SoundFile whose header can be believed."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(
            "reading sounds needs the package soundfile: pip install fmjax[audio]"
        ) from error
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    magic = file.read(4)
    if magic not in MAGIC:
        raise ValueError(f"its {size} bytes are no sound; it must be a WAV or FLAC file")
    if magic != b"fLaC":
        _check_size(file, size)
    file.seek(0)
    try:
        decoder = soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"the file is broken ({error.error_string}); save or fetch it again"
        ) from error
    with decoder:
        if decoder.format not in FORMATS or not 1 <= decoder.channels <= MAX_CHANNELS:
            raise ValueError(
                f"it is a {decoder.format} file of {decoder.channels} channels; it must be WAV or "
                f"FLAC, of at most {MAX_CHANNELS}"
            )
        yield decoder


def _check_size(file: BinaryIO, size: int) -> None:
    """Refuses a WAV file whose samples end before its header says.

    Raises:
      ValueError: it does.
    """
    file.seek(12)
    while len(head := file.read(8)) == 8:
        name, length = head[:4], int.from_bytes(head[4:], "little")
        there = size - file.tell()
        if name == b"data":
            if length > there and length != UNKNOWN_SIZE:
                raise ValueError(
                    f"the file is truncated: its header has {length} bytes of samples and {there} "
                    "are there; save or fetch it again"
                )
            return
        file.seek(length + length % 2, io.SEEK_CUR)
    raise ValueError("the file is broken: it has no samples; save or fetch it again")


def _decoded(decoder: Any) -> Iterator[np.ndarray]:
    """A file's frames float32 [T_i, C], a second each."""
    import soundfile

    seen, promised = 0, decoder.frames
    while True:
        try:
            frames = decoder.read(decoder.samplerate, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f"the file is broken at sample {seen} of {promised} ({error.error_string}); save "
                "or fetch it again"
            ) from error
        if not len(frames):
            break
        _check_numbers(frames, seen)
        seen += len(frames)
        yield frames
    # Of a stream whose length its writer did not know, libsndfile says the largest there is.
    if seen < promised < 2**62:
        raise ValueError(
            f"the file is truncated: its header has {promised} samples and {seen} are there; save "
            "or fetch it again"
        )
