"""Decoding of CTC: against all alignments, one by one."""

import itertools
import math

import numpy as np
import pytest

from fmjax.generate.ctc import greedy, prefix_beam


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def collapsed(path, blank):
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != blank)


def all_alignments(scores, blank):
    """{transcript: log-probability}, summed over every path."""
    found = {}
    for path in itertools.product(range(scores.shape[1]), repeat=len(scores)):
        value = sum(scores[t, symbol] for t, symbol in enumerate(path))
        ids = collapsed(path, blank)
        found[ids] = np.logaddexp(found.get(ids, -np.inf), value)
    return found


@pytest.mark.parametrize("blank", [0, 2])
def test_the_search_finds_what_is_likeliest(blank):
    for seed in range(8):
        scores = log_softmax(np.random.default_rng(seed).normal(size=(6, 3)))
        expected = sorted(all_alignments(scores, blank).items(), key=lambda item: -item[1])
        found = prefix_beam(scores, blank=blank, beams=200, least=-math.inf, results=3)
        for (ids, score), (wanted, value) in zip(found, expected, strict=False):
            assert tuple(ids) == wanted
            assert score == pytest.approx(value)


def test_greedy_is_the_best_path_collapsed():
    scores = np.full((8, 3), -9.0)
    for t, symbol in enumerate([1, 1, 0, 1, 2, 2, 0, 0]):
        scores[t, symbol] = 0.0
    assert greedy(scores, blank=0) == [1, 1, 2]
    assert greedy(scores[:0], blank=0) == []
    # The best path is blanks, but more alignments say 1.
    scores = np.log(np.array([[0.6, 0.4], [0.6, 0.4]]))
    assert greedy(scores, blank=0) == []
    assert prefix_beam(scores, blank=0)[0].symbols == [1]
    assert prefix_beam(scores, blank=0)[0].score == pytest.approx(math.log(1 - 0.36))


def test_a_language_model_has_its_say():
    """As rescoring all transcripts by it would have it; the end of the text counts."""
    symbols = ["", "a", " "]

    def scorer(text, piece):
        if piece in (" ", ""):  # a word has ended
            return 0.5 - 2.0 * abs(len(text.split(" ")[-1]) - 2)
        return 0.0

    for seed in range(8):
        scores = log_softmax(np.random.default_rng(seed).normal(size=(6, 3)))
        rescored = {}
        for ids, value in all_alignments(scores, 0).items():
            text, given = "", 0.0
            for symbol in ids:
                given += scorer(text, symbols[symbol])
                text += symbols[symbol]
            rescored[ids] = value + given + scorer(text, "")
        best = max(rescored, key=lambda ids: rescored[ids])
        (found,) = prefix_beam(
            scores, blank=0, beams=200, least=-math.inf, symbols=symbols, scorer=scorer
        )
        assert tuple(found.symbols) == best
        assert found.score == pytest.approx(rescored[best])


def test_what_does_not_fit_is_refused():
    scores = np.zeros((4, 3))
    with pytest.raises(ValueError, match="blank=3 in V"):
        prefix_beam(scores, blank=3)
    with pytest.raises(ValueError, match="a text for each of 3 symbols"):
        prefix_beam(scores, blank=0, scorer=lambda text, piece: 0.0)
    with pytest.raises(ValueError, match="beams=2 must be positive and results=3"):
        prefix_beam(scores, blank=0, beams=2, results=3)
