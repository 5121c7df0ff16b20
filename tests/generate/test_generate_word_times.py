"""Alignment of tokens with time, and tokens as words, against transformers' own pieces."""

import numpy as np
import pytest
import torch
from tiny_whisper import tokenizer
from transformers import WhisperTokenizer
from transformers.models.whisper import generation_whisper, tokenization_whisper

from fmjax.generate.word_times import median_filtered, token_times, warped, words_of


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (5, 13), (9, 4)])
def test_the_cheapest_way_is_pytorchs(shape):
    """With equal costs, too."""
    draw = np.random.default_rng(0)
    for costs in (draw.normal(size=shape), draw.integers(0, 2, shape).astype(float)):
        rows, columns = warped(costs)
        expected = generation_whisper._dynamic_time_warping(costs)
        np.testing.assert_array_equal(rows, expected[0])
        np.testing.assert_array_equal(columns, expected[1])


def test_medians_are_pytorchs():
    values = np.random.default_rng(1).normal(size=(2, 3, 9)).astype(np.float32)
    for width in (1, 3, 7):
        expected = generation_whisper._median_filter(torch.tensor(values), width)
        np.testing.assert_array_equal(median_filtered(values, width), expected)
    np.testing.assert_array_equal(median_filtered(values[..., :2], 7), values[..., :2])


def test_times_follow_a_diagonal():
    """Heads that look at frame 4 n while token n is written."""
    weights = np.zeros((2, 5, 20), np.float32)
    for token in range(5):
        weights[:, token, 4 * token : 4 * token + 4] = 1.0
    np.testing.assert_allclose(token_times(weights, 1), [0, 0.08, 0.16, 0.24, 0.32])
    assert token_times(weights[:, :1], 3).tolist() == [0.0]
    assert token_times(weights[:, :0], 3).tolist() == []


@pytest.mark.parametrize(
    "text",
    [
        " Hello, world! It's “fine” (really).", "Grüße aus 東京、 und so", "no-one - knows ... ",
        "  two  spaces", "\ufffd broken \ufffd", "¿Qué? ¡Sí!", "",
    ],
)  # fmt: skip
def test_words_are_pytorchs(text, tmp_path):
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    own = WhisperTokenizer.from_pretrained(
        tmp_path, tokenizer_file=str(tmp_path / "tokenizer.json")
    )
    tokens = own(text, add_special_tokens=False)["input_ids"]
    for language in ("english", "japanese"):
        texts, _, places = tokenization_whisper._combine_tokens_into_words(own, tokens, language)
        found = words_of(tokens, own.decode, spaces=language == "english")
        assert [word.text for word in found] == texts
        assert [(word.first, word.last) for word in found] == [(at[0], at[-1]) for at in places]
