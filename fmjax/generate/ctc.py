"""Decoding of what CTC models say: the best symbol of each frame, or a search over prefixes.

On the host, an utterance at a time, in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Scorer = Callable[[str, str], float]
"""(text, piece) -> what a language model gives for `piece` after `text`; the piece "" ends it."""


def greedy(log_probabilities: np.ndarray, *, blank: int) -> list[int]:
    """The likeliest symbol of each frame, with repeats as one and no blanks.

    Args:
        log_probabilities: [T, V].
        blank: the number of the blank.
    """
    best = np.argmax(log_probabilities, axis=-1)
    new = np.concatenate([[True], best[1:] != best[:-1]]) if len(best) else np.zeros(0, bool)
    return [int(symbol) for symbol in best[new & (best != blank)]]


class Found(NamedTuple):
    """What a search found.

    Args:
        symbols: their numbers.
        score: log-probability (nats) over all alignments, and what the language model gave.
    """

    symbols: list[int]
    score: float


class _Prefix:
    """A beginning of the transcript, by how it ends at the last frame.

    Attributes:
        in_blank, in_symbol: log-probabilities of its alignments that end in a blank or its symbol.
        text: as the language model reads it.
        given: what the language model gave for it.
    """

    __slots__ = ("given", "in_blank", "in_symbol", "text")

    def __init__(self, text: str, given: float) -> None:
        self.in_blank = self.in_symbol = -math.inf
        self.text, self.given = text, given

    @property
    def total(self) -> float:
        """Over all its alignments."""
        return _add(self.in_blank, self.in_symbol)


def _add(first: float, second: float) -> float:
    """log(exp(first) + exp(second))."""
    if first < second:
        first, second = second, first
    return first if second == -math.inf else first + math.log1p(math.exp(second - first))


def prefix_beam(
    log_probabilities: np.ndarray,
    *,
    blank: int,
    beams: int = 16,
    symbols: Sequence[str] = (),
    scorer: Scorer | None = None,
    least: float = math.log(1e-4),
    results: int = 1,
) -> list[Found]:
    """The likeliest transcripts, each over all its alignments (Hannun et al. 2014,
    arXiv:1408.2873, algorithm 1).

    Args:
        log_probabilities: [T, V], nats.
        blank: the number of the blank.
        beams: prefixes that are kept at each frame.
        symbols: what each of V symbols is as text; needed by a scorer.
        scorer: a language model's, such as `fmjax.metrics.word_ngram.WordNgram.scorer`; None for
            none.
        least: symbols less likely than this at a frame are not tried there (the likeliest always
            is), which spares most of the time.
        results: how many transcripts are returned, the best first.

    Raises:
        ValueError: values out of range, or a scorer without symbols.
    """
    scores = np.asarray(log_probabilities, np.float64)
    problems = []
    if scores.ndim != 2 or not 0 <= blank < scores.shape[-1]:
        problems.append(f"log_probabilities {scores.shape} must be [T, V], and blank={blank} in V")
    elif scorer is not None and len(symbols) != scores.shape[1]:
        problems.append(f"a scorer needs a text for each of {scores.shape[1]} symbols")
    if beams < 1 or not 1 <= results <= beams:
        problems.append(f"beams={beams} must be positive and results={results} from 1 to it")
    if problems:
        raise ValueError("prefix_beam: " + "; ".join(problems))
    names = [""] * scores.shape[1] if scorer is None else list(symbols)
    score = _nothing if scorer is None else scorer
    start = _Prefix("", 0.0)
    start.in_blank = 0.0
    beam: dict[tuple[int, ...], _Prefix] = {(): start}
    for frame in scores:
        tried = np.flatnonzero(frame >= min(least, frame.max()))
        costs = [(int(symbol), float(frame[symbol])) for symbol in tried]
        after: dict[tuple[int, ...], _Prefix] = {}

        def reach(ids: tuple[int, ...], like: _Prefix, after: dict = after) -> _Prefix:
            if ids not in after:
                after[ids] = _Prefix(like.text, like.given)
            return after[ids]

        for ids, prefix in beam.items():
            total = prefix.total
            for symbol, value in costs:
                if symbol == blank:
                    same = reach(ids, prefix)
                    same.in_blank = _add(same.in_blank, total + value)
                    continue
                if ids and symbol == ids[-1]:  # without a blank between them they are one
                    same = reach(ids, prefix)
                    same.in_symbol = _add(same.in_symbol, prefix.in_symbol + value)
                    begun = prefix.in_blank + value
                else:
                    begun = total + value
                if begun == -math.inf:
                    continue
                longer = (*ids, symbol)
                known = after.get(longer) or beam.get(longer)
                if known is None:
                    piece = names[symbol]
                    given = prefix.given + score(prefix.text, piece)
                    known = _Prefix(prefix.text + piece, given)
                grown = reach(longer, known)
                grown.in_symbol = _add(grown.in_symbol, begun)
        kept = sorted(after.items(), key=lambda item: -(item[1].total + item[1].given))[:beams]
        beam = dict(kept)
    ended = [
        Found([*ids], prefix.total + prefix.given + score(prefix.text, ""))
        for ids, prefix in beam.items()
    ]
    return sorted(ended, key=lambda found: -found.score)[:results]


def _nothing(text: str, piece: str) -> float:
    return 0.0


class Span(NamedTuple):
    """Where a symbol is.

    Args:
        symbol: its number.
        start, end: its first frame, and the one behind its last.
    """

    symbol: int
    start: int
    end: int


def greedy_spans(log_probabilities: np.ndarray, *, blank: int) -> list[Span]:
    """As `greedy`, with the frames of each symbol.

    Args:
        log_probabilities: [T, V].
        blank: the number of the blank.
    """
    best = np.argmax(log_probabilities, axis=-1)
    if not len(best):
        return []
    starts = np.flatnonzero(np.concatenate([[True], best[1:] != best[:-1]]))
    ends = np.append(starts[1:], len(best))
    spans = [Span(int(best[a]), int(a), int(b)) for a, b in zip(starts, ends, strict=True)]
    return [span for span in spans if span.symbol != blank]


def align(log_probabilities: np.ndarray, symbols: Sequence[int], *, blank: int) -> list[Span]:
    """The likeliest alignment of symbols with frames: Viterbi over the states of Graves et al.
    2006, section 4.1.

    Args:
        log_probabilities: [T, V], nats.
        symbols: N of them, none the blank.
        blank: the number of the blank.

    Raises:
        ValueError: more symbols, with the blanks between equal ones, than frames.
    """
    scores = np.asarray(log_probabilities, np.float64)
    ids = np.asarray(symbols, int)
    needed = len(ids) + int((ids[1:] == ids[:-1]).sum())
    if needed > len(scores):
        raise ValueError(f"{len(ids)} symbols need {needed} frames; there are {len(scores)}")
    if not len(ids):
        return []
    states = np.full(2 * len(ids) + 1, blank)  # blank, symbol, blank, ..., blank
    states[1::2] = ids
    skips = np.zeros(len(states), bool)  # from the symbol before, over the blank between
    skips[3::2] = ids[1:] != ids[:-1]
    best = np.full(len(states), -np.inf)
    best[:2] = scores[0, states[:2]]
    back = np.zeros((len(scores), len(states)), np.int8)
    for time in range(1, len(scores)):
        ways = np.full((3, len(states)), -np.inf)
        ways[0], ways[1, 1:] = best, best[:-1]
        ways[2, 2:] = np.where(skips[2:], best[:-2], -np.inf)
        back[time] = ways.argmax(axis=0)
        best = ways.max(axis=0) + scores[time, states]
    state = len(states) - 1 - int(best[-2] >= best[-1])
    path = np.zeros(len(scores), int)
    for time in range(len(scores) - 1, -1, -1):
        path[time] = state
        state -= back[time, state]
    places = [np.flatnonzero(path == 2 * number + 1) for number in range(len(ids))]
    return [
        Span(int(symbol), int(at[0]), int(at[-1]) + 1)
        for symbol, at in zip(ids, places, strict=True)
    ]
