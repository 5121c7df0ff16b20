"""Recordings in, texts out: transcribing files of any length with a saved Whisper."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fmjax.hub as hub
from fmjax.config import read_config
from fmjax.data.audio import SILENT, Source, open_audio
from fmjax.data.audio_features import LogMel, log_energies, scaled
from fmjax.generate.speech import Listener, Segment, hear, hear_recordings
from fmjax.generate.speech_config import SpeechConfig
from fmjax.generate.word_times import WITHOUT_SPACES, words_of
from fmjax.recipes.ctranslate2 import TINY, is_ctranslate2, tiny_english
from fmjax.recipes.transcripts import Piece, Transcript

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Radford et al. 2022, section 4.5: a text that is not believed is heard anew at the next one."""
BELIEVED = {
    "compression_ratio_threshold": 1.35,  # of tokens; the paper's 2.4 is of letters
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6,
}


@dataclasses.dataclass(frozen=True)
class Transcriber:
    """A model that hears, with its tokenizer and how it reads sound."""

    listener: Listener
    tokenizer: Any
    features: LogMel

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say, without times and the like, which all come after the words."""
        end = min(self.listener.config.eos)
        return self.tokenizer.decode([token for token in tokens if token < end]).strip()

    def words(self, segment: Segment) -> list[Piece]:
        """A segment's words with their times and the spaces before them: each from where the token
        before its first one ends to where its last one does."""
        end, tokens = min(self.listener.config.eos), segment.tokens
        places = [place for place, token in enumerate(tokens) if token < end]
        speech = self.listener.speech
        heard = [name for name, token in speech.lang_to_id.items() if token == segment.language]
        language = (speech.language or "".join(heard)).strip("<|>")
        found = words_of(
            [tokens[place] for place in places],
            partial(self.tokenizer.decode, clean_up_tokenization_spaces=False),
            spaces=language not in WITHOUT_SPACES,
        )
        begins = (segment.start, *segment.times)
        return [
            Piece(
                round(begins[places[word.first]], 2),
                round(segment.times[places[word.last]], 2),
                word.text,
            )
            for word in found
        ]


def load_transcriber(
    model: str | Path = TINY,
    *,
    language: str | None = None,
    task: str | None = None,
    condition: bool = False,
    prompt: str | None = None,
    prompt_each: bool = False,
) -> Transcriber:
    """Loads a Whisper.

    Args:
        model: a folder or hub id, or "whisper-tiny.en", which is made of its package.
        language: what is spoken, such as "en"; None is heard, by multilingual models.
        task: "transcribe" or, of multilingual models, "translate" into English.
        condition: whether a window of a long recording is told the text of the one before.
        prompt: what is told beforehand, such as names and how they are written: before each window,
            or, with `condition`, before the first alone.
        prompt_each: whether, with `condition`, the prompt stays before the text of each window.

    Raises:
        OSError: no such folder, or it cannot be fetched.
        ValueError: a model that does not hear, or options that are not its.
    """
    folder = tiny_english() if model == TINY else hub.find_folder(model)
    if is_ctranslate2(folder):
        raise ValueError(
            f"{folder} is a model of CTranslate2: fmjax convert {folder} NEW_FOLDER, and give the "
            "new folder"
        )
    kind = read_config(Path(folder)).get("model_type")
    if kind != "whisper":  # whose preprocessor_config.json is of another kind too
        raise ValueError(f"{model} is a {kind}; only a whisper or a model of CTC is heard with")
    features = LogMel.read(folder)
    loaded, variables = hub.load(folder, dtype="float32")
    if loaded.head != "seq2seq_lm":
        raise ValueError(
            f"{model} is a whisper with the head {loaded.head!r}; transcribing needs one with the "
            "head 'seq2seq_lm'"
        )
    if (features.frames, features.feature_size) != (
        loaded.config.frames,
        loaded.config.num_mel_bins,
    ):
        raise ValueError(
            f"{folder}: its preprocessor_config.json makes windows of {features.frames} frames of "
            f"{features.feature_size} bins, its model reads {loaded.config.frames} of "
            f"{loaded.config.num_mel_bins}"
        )
    speech = SpeechConfig.read(folder)
    changes: dict[str, Any] = {} if language is None else {"language": language}
    changes |= {} if task is None else {"task": task}
    changes |= {"condition_on_prev_tokens": True} if condition else {}
    tokenizer, config = hub.load_tokenizer(folder), hub.load_generation_config(folder)
    if prompt is not None:
        changes["prompt_ids"] = prompt_tokens(tokenizer, prompt, min(config.eos))
    if prompt_each:
        if prompt is None:
            raise ValueError("prompt_each is for a prompt; give one")
        changes["prompt_condition_type"] = "all-segments"
    speech = dataclasses.replace(speech, **BELIEVED, **changes)
    return Transcriber(Listener(loaded, variables, config, speech), tokenizer, features)


def prompt_tokens(tokenizer: Any, prompt: str, end: int) -> tuple[int, ...]:
    """The tokens of what is told beforehand.

    Args:
        tokenizer: the model's.
        prompt: a text.
        end: the first of the tokens that are no text.

    Raises:
        ValueError: it is empty, or has tokens that are no text.
    """
    ids = tokenizer(" " + prompt.strip(), add_special_tokens=False)["input_ids"]
    if not prompt.strip() or max(ids) >= end:
        raise ValueError(f"prompt={prompt!r} must be a text, without tokens such as <|...|>")
    return tuple(ids)


def transcribe(
    transcriber: Transcriber,
    sources: Sequence[Source],
    *,
    timestamps: bool = False,
    words: bool = False,
    batch_size: int = 8,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
) -> list[Transcript]:
    """Transcripts of recordings of any length.

    Those that fit into a window are heard in batches, longer ones window by window; of each
    recording no more than a window is in memory. One whose samples are all 0 has no text.

    Args:
        transcriber: from `load_transcriber`.
        sources: N files, or samples with their rate: see `fmjax.data.audio.Source`.
        timestamps: whether short recordings get times too.
        words: whether each word has its times, by the model's ``alignment_heads``.
        batch_size: recordings at a time.
        temperatures: see `fmjax.generate.speech.hear`.
        seed: of the draws at temperatures above 0.

    Raises:
        OSError: a file cannot be opened.
        ValueError: no recordings, or some that are no sound; all of them are named, before any is
            heard.
    """
    if not sources:
        raise ValueError("no recordings")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    opened = _measured(sources, transcriber.features)
    result: list[Transcript | None] = [None] * len(sources)
    rng = jax.random.key(seed)
    limit = transcriber.features.samples
    timed = [timestamps or words or sound.samples > limit for sound in opened]
    for i, sound in enumerate(opened):
        if sound.silent:  # in which Whisper hears words
            result[i] = sound.transcript("", () if timed[i] else None)
    short = [i for i in range(len(sources)) if result[i] is None and not timed[i]]
    # Of similar length: a batch takes as many steps as its longest text.
    short.sort(key=lambda i: opened[i].samples)
    for start in range(0, len(short), batch_size):
        chosen = short[start : start + batch_size]
        filled = chosen + chosen[-1:] * (min(batch_size, len(short)) - len(chosen))
        heard = hear(
            transcriber.listener,
            transcriber.features([opened[i].whole() for i in filled])["input_features"],
            temperatures=temperatures,
            rng=jax.random.fold_in(rng, start),
        )
        for i, text in zip(chosen, heard, strict=False):
            said = "" if text.silent else transcriber.text(text.tokens)
            result[i] = opened[i].transcript(said)
    long = [i for i in range(len(sources)) if result[i] is None]
    pieces: dict[int, list[Piece]] = {i: [] for i in long}
    if long:  # which not all models can hear
        for place, segment in hear_recordings(
            transcriber.listener,
            [opened[i] for i in long],
            batch_size=batch_size,
            words=words,
            temperatures=temperatures,
            rng=rng,
        ):
            said = transcriber.words(segment) if words else [_piece(transcriber, segment)]
            pieces[long[place]] += said
    for i in long:
        said = [piece for piece in pieces[i] if piece.text.strip()]
        text = "".join(p.text for p in said) if words else " ".join(p.text for p in said)
        shown = tuple(dataclasses.replace(piece, text=piece.text.strip()) for piece in said)
        result[i] = opened[i].transcript(text.strip(), shown)
    return [transcript for transcript in result if transcript is not None]


def _piece(transcriber: Transcriber, segment: Segment) -> Piece:
    text = transcriber.text(segment.tokens)
    return Piece(round(segment.start, 2), round(segment.end, 2), text)


def _measured(sources: Sequence[Source], features: LogMel) -> list[StreamedRecording]:
    """The recordings, each read through once."""
    opened, problems = [], []
    for number, source in enumerate(sources):
        try:
            opened.append(StreamedRecording(source, features))
        except ValueError as error:
            name = source if isinstance(source, str | Path) else f"recording {number}"
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("these are not transcribed:\n  " + "\n  ".join(problems))
    return opened


class StreamedRecording:
    """A recording whose frames are computed as they are heard: it is read from its start to its
    end, once to learn how loud it is, and once more window by window.

    Args:
        source: see `fmjax.data.audio.Source`.
        settings: of the frames.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no sound, or has no samples.
    """

    def __init__(self, source: Source, settings: LogMel) -> None:
        self.source, self.settings = source, settings
        self.samples, self.loudest, self.silent = 0, -np.inf, True
        self.changes: tuple[str, ...] = ()
        self.read, self.held, self.first = None, np.zeros(0, np.float32), 0
        with open_audio(source, settings.sampling_rate) as sound:
            self.changes = sound.changes
            for block in sound.blocks(settings.chunk_length):
                self.samples += len(block)
                self.silent = self.silent and not block.any()
        if not self.samples:
            raise ValueError("it has no samples; record it again or leave it out")
        if self.silent:
            self.changes = (*self.changes, SILENT)

    @property
    def frames(self) -> int:
        """Of the whole recording; a shorter one than a frame has one."""
        return max(self.samples // self.settings.hop_length, 1)

    @property
    def seconds(self) -> float:
        return self.samples / self.settings.sampling_rate

    def transcript(self, text: str, pieces: tuple[Piece, ...] | None = None) -> Transcript:
        """What was heard in it."""
        return Transcript(self.seconds, text, pieces, self.changes)

    def whole(self) -> np.ndarray:
        """All its samples, float32 [N]."""
        with open_audio(self.source, self.settings.sampling_rate) as sound:
            return np.concatenate(list(sound.blocks(self.settings.chunk_length)))

    def window(self, start: int) -> np.ndarray:
        """float32 [T, M]: the frames from `start` on, which never falls; zeros behind the last."""
        if not np.isfinite(self.loudest):
            self.loudest = max(float(e.max()) for e, _ in self._all_windows())
            self._rewind()
        energies, count = self._energies(start)
        frames = np.array(scaled(energies, self.loudest))
        frames[count:] = 0.0
        return frames

    def _all_windows(self) -> Iterator[tuple[np.ndarray, int]]:
        self._rewind()
        for start in range(0, self.frames, self.settings.frames):
            energies, count = self._energies(start)
            yield energies[:count], count

    def _energies(self, start: int) -> tuple[np.ndarray, int]:
        """Log energies [T, M] of a window, and how many of its frames the recording has."""
        settings = self.settings
        half, hop = settings.n_fft // 2, settings.hop_length
        low, high = start * hop - half, (start + settings.frames - 1) * hop + half
        samples = self._samples(max(low, 0), min(high, self.samples))
        # The ends are reflected, as far as there is something to reflect.
        before, after = max(-low, 0), max(min(high, self.samples + half) - self.samples, 0)
        if len(samples) > 1:
            samples = np.pad(samples, (before, after), mode="reflect")
        samples = np.pad(samples, (0, max(high - low - len(samples), 0)))
        energies = log_energies(samples[None], settings, padded=True)[0]
        return np.asarray(energies), min(settings.frames, self.frames - start)

    def _samples(self, start: int, stop: int) -> np.ndarray:
        """A range of samples, none of them before those of an earlier call's start."""
        if self.read is None:
            self._rewind()
        assert self.read is not None
        self._drop(start)
        while self.first + len(self.held) < stop:
            self.held = np.concatenate([self.held, next(self.read)])
            self._drop(start)
        return self.held[: stop - start]

    def _drop(self, start: int) -> None:
        """Forgets what is held before a sample."""
        gone = min(start - self.first, len(self.held))
        self.held, self.first = self.held[gone:], self.first + gone

    def _rewind(self) -> None:
        self.read, self.held, self.first = self._blocks(), np.zeros(0, np.float32), 0

    def _blocks(self) -> Iterator[np.ndarray]:
        with open_audio(self.source, self.settings.sampling_rate) as sound:
            yield from sound.blocks(self.settings.chunk_length)
