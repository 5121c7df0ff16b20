"""SQuAD's scores: the scripts' rules one by one, and their threshold against trying all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmjax.metrics.spans import (
    best_threshold,
    exact_match,
    normalize_answer,
    squad_metrics,
    squad_scores,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("an  Apple a\tday", "apple day"),
        ("Theatre", "theatre"),  # no article
        ("state-of-the-art", "stateoftheart"),  # signs go first, so no article is left
        ("10,000 m²", "10000 m²"),
        ("“Élan”", "“élan”"),  # only ASCII signs
        ("the a an", ""),
    ],
)
def test_normalisation(text, normal):
    assert normalize_answer(text) == normal


def test_f1_counts_words_as_a_bag():
    assert token_f1("the cat sat", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert token_f1("to be or not to be", "to be") == pytest.approx(2 * 2 / (6 + 2))
    assert token_f1("dog", "cat") == 0
    assert (token_f1("", ""), token_f1("", "x"), token_f1("the", "")) == (1, 0, 1)
    assert exact_match("The Cat.", "cat") == 1


def test_the_best_of_several_answers_counts():
    # Answers of the first question of SQuAD 1.1's development set.
    scores = squad_metrics(
        ["the Denver Broncos", "Carolina"],
        [["Denver Broncos", "Denver Broncos"], ["Carolina Panthers", "the Panthers"]],
    )
    assert scores == {"exact_match": 50.0, "f1": pytest.approx(100 * (1 + 2 / 3) / 2), "total": 2}


def test_one_text_is_no_list():
    with pytest.raises(ValueError, match=r"answers\[1\]: one text was given where a list"):
        squad_metrics(["Paris", "Rome"], [["Paris"], "Rome"])
    with pytest.raises(ValueError, match="predictions: one text was given"):
        squad_metrics("P", [["P"]])


def test_questions_without_an_answer():
    scores = squad_metrics(["", "Paris", "", "in Paris"], [[], [], ["Rome"], ["Paris"]])
    assert scores["no_answer_exact_match"] == 50.0
    assert scores["has_answer_exact_match"] == 0.0
    assert scores["has_answer_f1"] == pytest.approx(100 * (0 + 2 / 3) / 2)
    assert scores["exact_match"] == 25.0
    assert (scores["has_answer_total"], scores["no_answer_total"], scores["total"]) == (2, 2, 4)
    assert squad_metrics(["x"], [[]])["has_answer_total"] == 0
    # An answer of nothing but an article is none, as in the script.
    assert squad_scores([""], [["the"]])[0].tolist() == [1.0]


@given(st.lists(st.tuples(st.sampled_from(["x", "y", ""]), st.booleans(), st.integers(-3, 3))
                .map(lambda row: (*row[:2], float(row[2]))), min_size=1, max_size=8,
                unique_by=lambda row: row[2]))  # fmt: skip
def test_best_threshold_is_the_best_of_all(rows):
    texts = [text for text, _, _ in rows]
    answers = [["x"] if has else [] for _, has, _ in rows]
    values = [value for _, _, value in rows]
    found = best_threshold(texts, answers, values)
    # Answering nothing, or all questions up to some value.
    tried = []
    for threshold in [-np.inf, *values]:
        said = [
            text if value <= threshold else "" for text, value in zip(texts, values, strict=True)
        ]
        tried.append(squad_metrics(said, answers)["exact_match"])
    assert found["best_exact_match"] == pytest.approx(max(tried))
    at = found["best_exact_match_threshold"]
    said = [text if value <= at else "" for text, value in zip(texts, values, strict=True)]
    reached = squad_metrics(said, answers)["exact_match"]
    assert reached == pytest.approx(found["best_exact_match"])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="1 predictions for 2 questions"):
        squad_metrics(["a"], [["a"], []])
    with pytest.raises(ValueError, match=r"shape \(2,\) for 1 questions"):
        best_threshold(["a"], [["a"]], [0.0, 1.0])
