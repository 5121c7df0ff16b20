"""Recordings in, texts out, by models of CTC: wav2vec 2.0, HuBERT, Deep Speech 2 and their like.

A recording is heard in overlapping chunks, whose frames are those of the whole, and of which only
the inner ones are kept: of hours no more than some chunks of samples are in memory, and the
probabilities of symbols.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import fmjax.hub as hub
from fmjax.config import read_config
from fmjax.data.audio import Source, open_audio
from fmjax.data.characters import Characters, load_characters
from fmjax.data.files import decode_utf8
from fmjax.data.mel_frames import MelFrames, Processor, load_processor
from fmjax.generate.ctc import Scorer, Span, align, greedy_spans, prefix_beam
from fmjax.metrics.word_ngram import fit_word_ngram, read_arpa
from fmjax.recipes.transcripts import Piece, Transcript
from fmjax.tasks import ctc
from fmjax.types import Variables

CHUNK = 20.0
"""Seconds that are heard at once."""
STRIDE = 2.0
"""Seconds at each end of a chunk that are heard, and left to the chunk beside it."""
SEARCHED = 20.0
"""Seconds that a search over prefixes, or an alignment, takes at once at most."""


class Symbols(NamedTuple):
    """How a model's inputs are made, and what its symbols are: saved beside it."""

    characters: Characters
    processor: Processor

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the files of both, as `fmjax.save` asks for them."""
        self.characters.save_pretrained(folder)
        self.processor.save_pretrained(folder)


@dataclasses.dataclass(frozen=True)
class Speller:
    """A model of CTC, and how its symbols become a text.

    Attributes:
        model: with the head "ctc".
        variables: its variables.
        symbols: its vocabulary and its inputs.
        beams: prefixes that a search keeps; 1 takes the likeliest symbol of each frame.
        scorer: a language model's, for a search.
    """

    model: Any
    variables: Variables
    symbols: Symbols
    beams: int = 1
    scorer: Scorer | None = None

    @property
    def blank(self) -> int:
        """The number of the blank."""
        return ctc.blank_of(self.model)

    @property
    def hop(self) -> int:
        """Samples from one frame of symbols to the next."""
        inputs = 10**6  # of which the ends do not count
        made = self.model.frames(2 * inputs) - self.model.frames(inputs)
        step = round(inputs / made)
        processor = self.symbols.processor
        return step * processor.hop_length if isinstance(processor, MelFrames) else step

    def frames(self, samples: int) -> int:
        """Frames of symbols that so many samples make."""
        processor = self.symbols.processor
        count = processor.count(samples) if isinstance(processor, MelFrames) else samples
        return max(int(self.model.frames(count)), 0)

    def text(self, spans: Sequence[Span]) -> str:
        """What symbols say."""
        return self.symbols.characters.decode(span.symbol for span in spans)


def is_ctc(folder: str | Path) -> bool:
    """Whether a checkpoint's folder is of a model with the head "ctc"."""
    names = read_config(Path(folder)).get("architectures") or [""]
    return str(names[0]).endswith("ForCTC")


def load_speller(
    model: str | Path,
    *,
    language: str | None = None,
    beams: int = 1,
    ngram: str | Path | None = None,
    weight: float = 0.5,
    bonus: float = 1.0,
) -> Speller:
    """Loads a model of CTC with its vocabulary.

    Args:
        model: a folder or hub id.
        language: whose vocabulary, of models that have one for each.
        beams: see `Speller`.
        ngram: n-grams of words for the search: an ARPA file (.arpa), or a text, a sentence a line,
            whose 3-grams are counted.
        weight, bonus: see `fmjax.metrics.word_ngram.WordNgram.scorer`.

    Raises:
        OSError: no such folder or file.
        ValueError: a model that is none of CTC, files that do not go together, or n-grams without a
            search.
    """
    if beams < 1:
        raise ValueError(f"beams={beams} must be at least 1")
    if ngram is not None and beams == 1:
        raise ValueError(f"ngram={str(ngram)!r} is for a search: give beams above 1, such as 32")
    folder = hub.find_folder(model)
    symbols = Symbols(load_characters(folder, language=language), load_processor(folder))
    loaded, variables = hub.load(folder, dtype="float32")
    problems = []
    if loaded.head != "ctc":
        family = hub.family_for(loaded).MODEL_TYPE
        problems.append(f"it is a {family} with the head {loaded.head!r}, not 'ctc'")
    elif len(symbols.characters.symbols) != loaded.config.vocab_size:
        problems.append(
            f"its vocabulary has {len(symbols.characters.symbols)} symbols, its model "
            f"{loaded.config.vocab_size}"
        )
    elif symbols.characters.numbers[symbols.characters.blank] != ctc.blank_of(loaded):
        problems.append(
            f"its vocabulary's blank {symbols.characters.blank!r} is not pad_token_id="
            f"{loaded.config.pad_token_id}"
        )
    if problems:
        raise ValueError(f"{model}: {'; '.join(problems)}")
    scorer = None
    if ngram is not None:
        file = Path(ngram).expanduser()
        counted = file.name.removesuffix(".gz").endswith(".arpa")
        lines = None if counted else decode_utf8(file).splitlines()
        words = read_arpa(file) if lines is None else fit_word_ngram(filter(str.strip, lines))
        scorer = words.scorer(weight=weight, bonus=bonus)
    return Speller(loaded, variables, symbols, beams, scorer)


class _Chunk(NamedTuple):
    """Samples of a recording, and which of their frames are kept."""

    number: int
    samples: np.ndarray
    first: int
    last: int | None


def chunks(
    speller: Speller, blocks: Iterator[np.ndarray], chunk: float = CHUNK, stride: float = STRIDE
) -> Iterator[_Chunk]:
    """A recording in overlapping pieces: each frame of the whole is kept of one of them.

    Args:
        speller: for its rate and its frames.
        blocks: of samples, in their order.
        chunk, stride: see `CHUNK` and `STRIDE`.

    Raises:
        ValueError: a chunk that its strides fill.
    """
    hop, rate = speller.hop, speller.symbols.processor.sampling_rate
    aside = max(1, round(stride * rate / hop))  # frames
    step = round(chunk * rate / hop) - 2 * aside
    if step < 1:
        raise ValueError(f"chunk={chunk} seconds must be more than two strides of {stride}")
    held, offset, ended, number = np.zeros(0, np.float32), 0, False, 0
    while True:
        start = max(0, number * step - aside) * hop
        stop = ((number + 1) * step + aside) * hop
        held, offset = held[start - offset :], start
        # One sample more, so that what ends here is known to be the last.
        while not ended and len(held) <= stop - start:
            block = next(blocks, None)
            ended = block is None
            held = held if block is None else np.concatenate([held, block])
        first = number * step - start // hop
        if ended and len(held) <= stop - start:
            yield _Chunk(number, held, first, None)
            return
        yield _Chunk(number, held[: stop - start], first, first + step)
        number += 1


@partial(jax.jit, static_argnames="model")
def _predict(model: Any, variables: Variables, batch: dict[str, Any]) -> Any:
    return ctc.predict(model)(variables, batch)


class Heard(NamedTuple):
    """What was heard in a recording.

    Args:
        log_probabilities: float32 [T, V], nats.
        seconds: how long it is.
        changes: what had to be done to the sound.
    """

    log_probabilities: np.ndarray
    seconds: float
    changes: tuple[str, ...]


def hear(
    speller: Speller,
    sources: Sequence[Source],
    *,
    batch_size: int = 8,
    chunk: float = CHUNK,
    stride: float = STRIDE,
) -> list[Heard]:
    """Probabilities of symbols at each frame of recordings.

    Models whose inputs have a mask hear `batch_size` chunks at a time, of about one length; others
    one at a time, as zeros behind a sound would change what they hear.

    Args:
        speller: who hears.
        sources: see `fmjax.data.audio.Source`.
        batch_size: chunks at a time.
        chunk, stride: see `CHUNK` and `STRIDE`.

    Raises:
        OSError: a file cannot be opened.
        ValueError: some that are no sound, all of which are named; or a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    processor, hop = speller.symbols.processor, speller.hop
    masked = isinstance(processor, MelFrames) or processor.return_attention_mask
    least = hop
    while not speller.frames(least):
        least += hop
    together = batch_size if masked else 1
    waiting: dict[int, list[tuple[int, _Chunk]]] = {}
    found: list[list[np.ndarray]] = [[] for _ in sources]
    order: list[list[int]] = [[] for _ in sources]

    def flush(size: int) -> None:
        rows = waiting.pop(size)
        sounds = [piece.samples for _, piece in rows]
        filled = sounds + sounds[-1:] * (together - len(sounds))
        batch = processor(filled, processor.sampling_rate, length=size)
        values = np.asarray(_predict(speller.model, speller.variables, batch))
        for (recording, piece), row in zip(rows, values, strict=False):
            count = speller.frames(len(piece.samples))
            found[recording].append(row[:count][piece.first : piece.last])
            order[recording].append(piece.number)

    lengths, problems = [0] * len(sources), []
    changes: list[tuple[str, ...]] = [()] * len(sources)
    for recording, source in enumerate(sources):
        try:
            with open_audio(source, processor.sampling_rate) as sound:
                changes[recording] = sound.changes

                def blocks(sound: Any = sound, recording: int = recording) -> Iterator[np.ndarray]:
                    for block in sound.blocks(chunk):
                        lengths[recording] += len(block)
                        yield block

                for piece in chunks(speller, blocks(), chunk, stride):
                    size = max(len(piece.samples), least)
                    # Padded to few lengths, each of which is compiled for.
                    size = -(-size // (32 * hop)) * 32 * hop if masked else size
                    if len(piece.samples):
                        waiting.setdefault(size, []).append((recording, piece))
                        if len(waiting[size]) == together:
                            flush(size)
            if not lengths[recording]:
                raise ValueError("it has no samples; record it again or leave it out")
        except ValueError as error:
            name = source if isinstance(source, str | Path) else f"recording {recording}"
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("these are not transcribed:\n  " + "\n  ".join(problems))
    for size in list(waiting):
        flush(size)
    return [
        Heard(
            np.concatenate([pieces[place] for place in np.argsort(numbers)]),
            length / processor.sampling_rate,
            change,
        )
        for pieces, numbers, length, change in zip(found, order, lengths, changes, strict=True)
    ]


def parts(log_probabilities: np.ndarray, blank: int, most: int) -> list[tuple[int, int]]:
    """Frames cut into stretches of at most `most`, each in the middle of the longest run of blanks
    of its second half: (first, behind the last) of each."""
    silent = np.argmax(log_probabilities, axis=-1) == blank
    result, start = [], 0
    while len(silent) - start > most:
        half = start + most // 2
        window = np.concatenate([[False], silent[half : start + most], [False]])
        edges = np.flatnonzero(window[1:] != window[:-1]).reshape(-1, 2)  # of runs of blanks
        runs = edges[:, 1] - edges[:, 0]
        cut = start + most if not len(runs) else half + int(edges[runs.argmax()].sum()) // 2
        result.append((start, max(cut, start + 1)))
        start = result[-1][1]
    return [*result, (start, len(silent))]


def spelled(speller: Speller, log_probabilities: np.ndarray) -> list[Span]:
    """The symbols of a recording, with their frames.

    A search, and the alignment of what it finds, is over stretches of at most `SEARCHED` seconds,
    between which n-grams are not told what came before.

    Args:
        speller: how to decode.
        log_probabilities: float32 [T, V], nats.
    """
    blank, spans = speller.blank, []
    if speller.beams == 1:
        return greedy_spans(log_probabilities, blank=blank)
    most = round(SEARCHED * speller.symbols.processor.sampling_rate / speller.hop)
    for start, end in parts(log_probabilities, blank, most):
        rows = log_probabilities[start:end]
        found = prefix_beam(
            rows, blank=blank, beams=speller.beams, symbols=speller.symbols.characters.pieces,
            scorer=speller.scorer,
        )  # fmt: skip
        for span in align(rows, found[0].symbols, blank=blank):
            spans.append(Span(span.symbol, span.start + start, span.end + start))
    return spans


def words(speller: Speller, spans: Sequence[Span]) -> list[Piece]:
    """Symbols as words with their times, seconds."""
    characters = speller.symbols.characters
    step = speller.hop / speller.symbols.processor.sampling_rate
    space = characters.numbers.get(characters.delimiter)
    result, held = [], []
    for span in [*spans, None]:
        if span is not None and span.symbol != space:
            held.append(span)
            continue
        if text := speller.text(held):
            result.append(Piece(held[0].start * step, held[-1].end * step, text))
        held = []
    return result


def spell(
    speller: Speller,
    sources: Sequence[Source],
    *,
    timestamps: bool = False,
    batch_size: int = 8,
    chunk: float = CHUNK,
    stride: float = STRIDE,
) -> list[Transcript]:
    """Transcripts of recordings of any length.

    Args:
        speller: from `load_speller`.
        sources: N files, or samples with their rate: see `fmjax.data.audio.Source`.
        timestamps: whether words have times.
        batch_size, chunk, stride: see `hear`.

    Raises:
        OSError: a file cannot be opened.
        ValueError: no recordings, or what `hear` refuses.
    """
    if not sources:
        raise ValueError("no recordings")
    result = []
    for heard in hear(speller, sources, batch_size=batch_size, chunk=chunk, stride=stride):
        spans = spelled(speller, heard.log_probabilities)
        said = tuple(words(speller, spans)) if timestamps else None
        result.append(Transcript(heard.seconds, speller.text(spans), said, heard.changes))
    return result
