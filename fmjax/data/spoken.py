"""Spoken digits and commands, synthesised in many voices, as a TFDS builder.

espeak-ng's voices are computed from formants; flite's are made of what four people have recorded,
and say a third of the training sounds. Held-out voices make the splits: no voice of the validation
or test sounds is among the training ones. espeak-ng (GPL-3) and flite (as free as BSD's) are
programs that the machine must have; what they say is ours.

Importing this file imports tensorflow_datasets (about a second), never TensorFlow.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from fmjax.data.audio import RATE, read_audio
from fmjax.data.audio_sets import AudioExamples
from fmjax.data.builders import prepared, read_split
from fmjax.data.prompts import NUMBERS
from fmjax.data.resampling import resample
from fmjax.data.splits import SPLITS

PROGRAM, HUMAN = "espeak-ng", "flite"
PEOPLE = ("flite/slt", "flite/rms", "flite/awb", "flite/kal16")
# Accents and, behind "+", timbres, all of espeak-ng's own.
VOICES = {
    "train": (
        *PEOPLE,
        "en-us+m1", "en-us+m2", "en-us+f1", "en-us+f2", "en-us+m7", "en-us+f4", "en-gb+m1",
        "en-gb+m3", "en-gb+f2", "en-gb+f5", "en-gb-x-rp+m4", "en-gb-x-rp+f1", "en-gb-scotland+m2",
        "en-gb-scotland+f4", "en-029+m3", "en-029+f5", "en-gb-x-gbclan+m7", "en-gb-x-gbclan+f2",
        "en-us+m3", "en-us+f5", "en-us+adam", "en-us+Alicia", "en-us+Andrea", "en-us+Andy",
        "en-us-nyc+Annie", "en-us+belinda", "en-gb+benjamin", "en-us+boris", "en-gb+caleb",
        "en-us+david", "en-us+ed", "en-gb-x-rp+edward", "en-us+Gene", "en-us-nyc+john",
        "en-us+Lee", "en-gb+linda", "en-us+max", "en-us-nyc+Michael", "en-us+Mike", "en-us+paul",
        "en-gb-scotland+quincy", "en-us+rob", "en-us-nyc+robert", "en-us+steph", "en-us+zac",
        "en-us+anika", "en-us+klatt2", "en-gb+klatt4", "en-us+shelby", "en-us+victor",
    ),
    "val": ("en-us+m6", "en-gb-x-gbcwmd+m5", "en-us+croak"),
    "test": ("en-us+m5", "en-gb+m6", "en-us+f3", "en-gb-x-rp+f3", "en-us+m8"),
}  # fmt: skip
SIZES = {"train": 2_400, "val": 150, "test": 300}
SPEEDS = (80, 200)  # words a minute: people say single words half as fast as they talk
PITCHES = (30, 70)  # espeak-ng's, of 0 to 99
WORDS = {
    "digits": NUMBERS[:10],
    # Warden 2018, "Speech commands", arXiv:1804.03209, its words for a device.
    "commands": ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"),
}
MOST_WORDS = 5  # of an utterance
SINGLE = 0.3  # of utterances, beside those that are drawn with one word


class Utterance(NamedTuple):
    """What is said, and how.

    Attributes:
      text: in small letters.
      voice: espeak-ng's name, or flite's behind "flite/".
      speed: words a minute.
      pitch: 0 to 99, of espeak-ng's voices.
    """

    text: str
    voice: str
    speed: int
    pitch: int


def load_spoken(words: str, split: str, *, rate: int = RATE) -> AudioExamples:
    """Sequences of one to five words in voices of a split; the first call synthesises them.

    Args:
      words: "digits" or "commands".
      split: "train" (2,400 in 54 voices), "val" (150 in 3 others) or "test" (300 in 5 others).
      rate: samples a second of the result.

    Raises:
      ValueError: there are no such words, or no such split.
      OSError: the sounds are not made yet, and espeak-ng or flite is not installed or fails.
    """
    problems = []
    if words not in WORDS:
        problems.append(f"there are no words {words!r}; there are {list(WORDS)}")
    if split not in SPLITS:
        problems.append(f"there is no split {split!r}; there are {list(SPLITS)}")
    if problems:
        raise ValueError("; ".join(problems))
    builder = prepared(SpokenWords, config=words)
    rows = read_split(builder, split, ("audio", "text", "voice"))
    samples = [resample(row["audio"].astype(np.float32) / 2**15, RATE, rate) for row in rows]
    voices = VOICES[split]
    return AudioExamples(
        samples,
        rate,
        [row["text"] for row in rows],
        np.array([voices.index(row["voice"]) for row in rows], np.int32),
        voices,
    )


def _run(name: str, arguments: list[str], text: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which(name)
    if program is None:
        raise OSError(
            f"synthesising speech needs {name}, which is not installed here: apt-get install "
            f"{name} (on Debian)"
        )
    run = subprocess.run(
        [program, *arguments], input=text, capture_output=True, text=True, errors="replace",
        check=False,
    )  # fmt: skip
    if run.returncode:
        raise OSError(f"{name} {arguments} failed ({run.returncode}): {run.stderr[-300:]}")
    return run


@functools.cache
def _known() -> tuple[frozenset[str], frozenset[str]]:
    """The languages and timbres there are; espeak-ng takes another in silence for a name it has
    not."""
    languages = re.findall(r"^ *\d+ +(\S+)", _run(PROGRAM, ["--voices"], "").stdout, re.MULTILINE)
    timbres = re.findall(r"!v/(\S+)", _run(PROGRAM, ["--voices=variant"], "").stdout)
    return frozenset(languages), frozenset(timbres)


@functools.cache
def _known_people() -> frozenset[str]:
    """flite's voices; it takes another in silence, too."""
    return frozenset(_run(HUMAN, ["-lv"], "").stdout.partition(":")[2].split())


def speak(utterance: Utterance, rate: int = RATE) -> np.ndarray:
    """What espeak-ng or flite says: float32 [T].

    Raises:
      OSError: it is not installed, or fails.
      ValueError: it says nothing, or has no such voice.
    """
    if utterance.voice.startswith(f"{HUMAN}/"):
        return _by_person(utterance, rate)
    language, plus, timbre = utterance.voice.partition("+")
    languages, timbres = _known()
    if language not in languages or (plus and timbre not in timbres):
        raise ValueError(
            f"{PROGRAM} has no voice {utterance.voice!r}; it must be LANGUAGE or LANGUAGE+TIMBRE "
            f"of what {PROGRAM} --voices and --voices=variant list"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "said.wav"
        arguments = ["-v", utterance.voice, "-s", str(utterance.speed), "-p", str(utterance.pitch)]
        # The text comes through a pipe, so that none is taken for an option.
        run = _run(PROGRAM, [*arguments, "-w", str(file), "--stdin"], utterance.text)
        if not file.exists():
            raise ValueError(f"{PROGRAM} said nothing of {utterance}: {run.stderr[-300:]!r}")
        return read_audio(file, rate).samples


def _by_person(utterance: Utterance, rate: int) -> np.ndarray:
    """What flite says."""
    voice = utterance.voice.removeprefix(f"{HUMAN}/")
    if voice not in _known_people():
        raise ValueError(f"{HUMAN} has no voice {voice!r}; it has {sorted(_known_people())}")
    with tempfile.TemporaryDirectory() as folder:
        said, text = Path(folder) / "said.wav", Path(folder) / "text"
        # In a file, so that none is taken for an option.
        text.write_text(utterance.text, "utf-8")
        stretch = f"duration_stretch={160 / utterance.speed:.3f}"  # it says about 160 as it is
        arguments = ["-voice", voice, "--setf", stretch, "-f", str(text), "-o", str(said)]
        run = _run(HUMAN, arguments, "")
        if not said.exists():
            raise ValueError(f"{HUMAN} said nothing of {utterance}: {run.stderr[-300:]!r}")
        return read_audio(said, rate).samples


def utterances(words: str, split: str) -> list[Utterance]:
    """What is to be said in a split, the same on every machine."""
    rng = np.random.default_rng([list(WORDS).index(words), SPLITS.index(split)])
    chosen = []
    computed = [voice for voice in VOICES[split] if voice not in PEOPLE]
    for number in range(SIZES[split]):
        length = 1 if rng.random() < SINGLE else int(rng.integers(1, MOST_WORDS + 1))
        text = " ".join(rng.choice(WORDS[words], length))
        speed, pitch = int(rng.integers(*SPEEDS)), int(rng.integers(*PITCHES))
        voice = computed[number % len(computed)]
        if split == "train" and number % 3 == 0:
            voice = PEOPLE[number // 3 % len(PEOPLE)]
        chosen.append(Utterance(text, voice, speed, pitch))
    return chosen


class SpokenWords(tfds.core.GeneratorBasedBuilder):
    """Sequences of words in many voices."""

    VERSION = tfds.core.Version("2.0.0")

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=words) for words in WORDS]  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=str(__doc__),
            features=tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16),
                    "text": tfds.features.Text(),
                    "voice": tfds.features.Text(),
                }
            ),
            homepage="https://github.com/espeak-ng/espeak-ng",
            license="the sounds are free; espeak-ng is GPL-3, flite free software like BSD's",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # there is nothing to download
        assert self.builder_config is not None  # it has one always
        words = self.builder_config.name
        return {split: self._generate_examples(utterances(words, split)) for split in SPLITS}

    def _generate_examples(self, said: list[Utterance]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, utterance in enumerate(said):
            samples = np.round(speak(utterance) * 2**15).clip(-(2**15), 2**15 - 1)
            row = {"audio": samples.astype(np.int16), "text": utterance.text}
            yield number, {**row, "voice": utterance.voice}
