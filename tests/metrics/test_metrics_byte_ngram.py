import math

import numpy as np
import pytest

from fmjax.metrics.byte_ngram import fit_ngram

TEXT = b"the cat sat on the mat, the rat sat on the hat. " * 3


@pytest.mark.parametrize("order", [1, 2, 5, 8])
def test_probabilities_of_the_next_byte_sum_to_one(order):
    model = fit_ngram(TEXT, order)
    for context in (b"", b"the ", b"zzz", b"the cat sat o"):
        total = sum(math.exp(-model.nats(context + bytes([byte]))[-1]) for byte in range(256))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_by_hand():
    """aab: a twice, b once; after a: a once, b once; smoothed by the number of kinds."""
    model = fit_ngram(b"aab", 2)
    unigram_a = (2 + 2 / 256) / (3 + 2)
    unigram_b = (1 + 2 / 256) / (3 + 2)
    expected = [unigram_a, (1 + 2 * unigram_b) / (2 + 2), (0 + 2 / 256) / 5]
    np.testing.assert_allclose(np.exp(-model.nats(b"abx")), expected)


def test_longer_contexts_predict_better():
    nats = [fit_ngram(TEXT, order).nats(b"the cat sat on the hat").mean() for order in (1, 2, 4)]
    assert nats[0] > nats[1] > nats[2]


def test_scores_of_characters_add_up():
    """To the whole text's, whatever its length; a character may be several bytes."""
    text = "the caté on the mat"
    model = fit_ngram(TEXT + text.encode(), 4)
    score = model.scorer(weight=0.5, bonus=0.25)
    total = sum(score(text[:place], text[place]) for place in range(len(text))) + score(text, "")
    expected = 0.25 * len(text) - 0.5 * model.nats(text.encode()).sum()
    assert total == pytest.approx(expected)


def test_refusals():
    with pytest.raises(ValueError, match="order=9"):
        fit_ngram(TEXT, 9)
    with pytest.raises(ValueError, match="of 0 bytes"):
        fit_ngram(b"", 1)
