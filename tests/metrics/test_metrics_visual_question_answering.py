import itertools

import numpy as np
import pytest

from fmjax.metrics import visual_question_answering_metrics
from fmjax.metrics.visual_question_answering import agreement, normalize_answer


def test_answers_are_compared_in_one_form():
    for text, same in (
        ("The two cups!", "2 cups"), ("None", "0"), ("it's a dog", "it's dog"),
        ("red/blue", "red blue"), ("$5", "$5"), ("50 %", "50 %"), ("#1 & more", "#1 & more"),
        ("1,000 a-b", "1000 ab"), ("red-ish - blue", "redish blue"), ("2.5", "2.5"),
        ("U.S. dollars.", "us dollars"), ("yes, no", "yes no"), ("a\tcat", "cat"),
    ):  # fmt: skip
        assert normalize_answer(text) == same


@pytest.mark.parametrize("count", range(1, 11))
def test_agreement_is_the_mean_over_choices_of_nine(count):
    """The closed form against the definition: all ten ways to leave one person out."""
    people = ["yes"] * count + ["no"] * (10 - count)
    means = [
        min(sum(one == "yes" for one in nine) / 3, 1) for nine in itertools.combinations(people, 9)
    ]
    assert agreement(people, leave_one_out=True)["yes"] == pytest.approx(np.mean(means))
    assert agreement(people)["yes"] == pytest.approx(min(count / 3, 1))


def test_accuracy_whole_and_by_kind():
    answers = [["yes"] * 2 + ["no"] * 8, ["two", "2", "2", "three"], ["a cat"]]
    found = visual_question_answering_metrics(
        ("Yes", "2", "dog"), answers, ("yes/no", "number", "other")
    )
    assert found == pytest.approx(
        {
            "accuracy": (2 / 3 + 1 + 0) / 3, "accuracy of yes/no": 2 / 3, "accuracy of number": 1.0,
            "accuracy of other": 0.0,
        }
    )  # fmt: skip
    with pytest.raises(ValueError, match="1 predictions for 3 questions"):
        visual_question_answering_metrics(["yes"], answers)
    with pytest.raises(ValueError, match="1 kinds for 3 questions"):
        visual_question_answering_metrics(["yes"] * 3, answers, ["other"])
    with pytest.raises(ValueError, match="a question has no answers"):
        visual_question_answering_metrics(["yes"], [[]])
    with pytest.raises(ValueError, match=r"answers\[0\]: one text was given"):
        visual_question_answering_metrics(["yes"], ["yes"])
    with pytest.raises(ValueError, match="answers: one text was given"):
        agreement("yes")
