import pytest

from fmjax.metrics.transcription import character_error_rate, spoken, word_error_rate


def test_error_rates_by_hand():
    """All texts together: 1 replaced, 1 inserted, 1 deleted of 5 words; 1 of 2 characters."""
    references = ["the cat sat", "", "on mats"]
    predictions = ["the bat sat", "hm", "on"]
    assert word_error_rate(references, predictions) == pytest.approx(3 / 5)
    assert character_error_rate(["ab"], ["b"]) == pytest.approx(1 / 2)
    assert word_error_rate(["a b"], ["a b"]) == 0.0


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="1 texts for 2 references"):
        word_error_rate(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="all references are empty"):
        character_error_rate([" "], ["a"])
    with pytest.raises(ValueError, match="a list of texts"):
        word_error_rate("a", ["a"])


def test_words_are_compared_as_they_sound():
    assert spoken("Agent login -- press \u201cPOUND\u201d, don\u2019t wait... 'now'_") == (
        "agent login press pound don't wait now"
    )
    assert spoken(" ?! ") == ""
