"""Recorded prompts of a telephone exchange, 568 of one speaker at 8 kHz, as a TFDS builder.

Allison Smith's recordings for Asterisk (Digium, CC-BY-SA 3.0), 25 minutes: sentences, single words,
numbers, letters, and a few tones and silences. What is said in them is not in the package: give
its file of transcripts, ``core-sounds-en.txt`` of the Asterisk project, or texts by name.

Importing this file imports tensorflow_datasets (about a second), never TensorFlow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fmjax.data import assets
from fmjax.data.audio import RATE
from fmjax.data.audio_sets import AudioExamples
from fmjax.data.builders import prepared, read_split
from fmjax.data.files import decode_utf8, raise_problems
from fmjax.data.resampling import resample
from fmjax.data.splits import SPLITS, hash_split

PROMPTS = 568
RECORDED = 8_000
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip
DIGITS = {f"digits/{number}": NUMBERS[number] for number in range(10)}
"""The ten recordings of a digit each, by the name that they have in the package."""


def load_prompts(
    split: str, transcripts: str | Path | Mapping[str, str] | None = None, *, rate: int = RATE
) -> AudioExamples:
    """The prompts of a split, or those of them that have a transcript; the first call fetches them.

    Args:
      split: "train", "val" or "test" (80, 10 and 10 % by a hash of the name) or "all".
      transcripts: a file (see `read_transcripts`), or texts by name, such as `DIGITS`; None for
        all prompts, without texts.
      rate: samples a second of the result; the recordings have 8,000.

    Raises:
      OSError: the asset cannot be downloaded, or the file of transcripts not read.
      ValueError: no such split, or transcripts of which none is of a prompt in it.
    """
    if split not in (*SPLITS, "all"):
        raise ValueError(f"there is no split {split!r}; there are {[*SPLITS, 'all']}")
    builder = prepared(RecordedPrompts)
    rows = [
        row
        for part in (SPLITS if split == "all" else (split,))
        for row in read_split(builder, part, ("audio", "name"))
    ]
    rows.sort(key=lambda row: row["name"])
    texts = None
    if transcripts is not None:
        said = transcripts if isinstance(transcripts, Mapping) else read_transcripts(transcripts)
        rows = [row for row in rows if row["name"] in said]
        if not rows:
            raise ValueError(
                f"none of {len(said)} transcripts is of a prompt of the split {split!r}; names are "
                "such as 'digits/1' and 'vm-goodbye'"
            )
        texts = [said[row["name"]] for row in rows]
    samples = [resample(row["audio"].astype(np.float32) / 2**15, RECORDED, rate) for row in rows]
    return AudioExamples(samples, rate, texts, names=[row["name"] for row in rows])


def read_transcripts(path: str | Path) -> dict[str, str]:
    """What is said in the prompts, by name, without those that are tones or silence.

    Args:
      path: lines "NAME: TEXT", the name with or without ".wav"; what stands in brackets is said of
        the text and left out.

    Raises:
      OSError: the file cannot be read.
      ValueError: lines of another form, or one prompt with two texts; all are listed.
    """
    place = Path(path).expanduser()
    found: dict[str, str] = {}
    problems = []
    for number, line in enumerate(decode_utf8(place).splitlines(), start=1):
        if not line.strip() or line.startswith(";"):
            continue
        name, colon, text = line.partition(":")
        name = name.strip().removesuffix(".wav")
        if not colon or not name or " " in name:
            problems.append(f"line {number}: {line[:60]!r} is not of the form NAME: TEXT")
            continue
        text = " ".join(re.sub(r"\[[^]]*\]|\([^)]*\)", " ", text).split())
        if text.strip(".") and found.setdefault(name, text) != text:
            problems.append(f"line {number}: {name} has two texts")
    raise_problems(str(place), problems)
    return found


class RecordedPrompts(tfds.core.GeneratorBasedBuilder):
    """Recordings of one speaker with their names."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=str(__doc__),
            # TFDS' Audio needs TensorFlow.
            features=tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16),
                    "name": tfds.features.Text(),
                }
            ),
            homepage="https://www.asterisk.org",
            license="CC-BY-SA 3.0",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # the asset is a package, not a URL
        found = recordings(assets.fetch("prompts"), PROMPTS)
        return {
            split: self._generate_examples(
                {name: path for name, path in found.items() if split_of(name) == split}
            )
            for split in SPLITS
        }

    def _generate_examples(self, found: dict[str, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, path in found.items():
            yield name, {"audio": samples_of(path), "name": name}


def split_of(name: str) -> str:
    """The split of a prompt."""
    return hash_split(f"prompts/{name}")


def recordings(folder: Path, count: int) -> dict[str, Path]:
    """The files of a folder by name, "digits/1".

    Raises:
      ValueError: there are not `count` of them.
    """
    found = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.wav"))
    }
    if len(found) != count:
        raise ValueError(f"{folder}: {len(found)} recordings, where there are {count}")
    return found


def samples_of(path: Path) -> np.ndarray:
    """The samples int16 [T] of a recording; those without any are a sample of silence.

    Raises:
      ValueError: it is no mono WAV file of 8 kHz and 16 bits.
    """
    import wave

    with wave.open(str(path)) as file:
        form = file.getnchannels(), file.getframerate(), file.getsampwidth()
        if form != (1, RECORDED, 2):
            raise ValueError(f"{path}: channels, rate and bytes are {form}, not (1, 8000, 2)")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return samples.astype(np.int16) if len(samples) else np.zeros(1, np.int16)
