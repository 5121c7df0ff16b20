"""Accuracy of answers to questions about pictures, where ten people have answered each question."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

ENOUGH = 3  # people that must agree for an answer to be right
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SIGNS = str.maketrans(dict.fromkeys(string.punctuation.replace("'", ""), " "))
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip


def normalize_answer(text: str) -> str:
    """An answer as it is compared: small letters, digits for numbers up to ten, no articles, no
    signs but apostrophes.

    As the evaluation of Antol et al. 2015 does it, but for its list of misspelt contractions.

    >>> normalize_answer("Two  red-ish cups.")
    '2 red ish cups'
    """
    words = _ARTICLES.sub(" ", text.lower().translate(_SIGNS)).split()
    return " ".join(_NUMBERS.get(word, word) for word in words)


def agreement(answers: Sequence[str], *, leave_one_out: bool = False) -> dict[str, float]:
    """What each answer that people gave is worth: min(n / 3, 1) where n of them gave it.

    Antol et al. 2015, arXiv:1505.00468, section 3.2 ("accuracy").

    Args:
        answers: of one question, one of each person.
        leave_one_out: the mean of that over all choices of all people but one, as the published
            evaluation has it: of ten people who agree by one, two, three, four, 0.3, 0.6, 0.9, 1.

    Raises:
        ValueError: there are none.
    """
    if not answers:
        raise ValueError("a question has no answers")
    people, counts = len(answers), Counter(map(normalize_answer, answers))

    def worth(count: int) -> float:
        whole = min(count / ENOUGH, 1.0)
        if not leave_one_out or people == 1:
            return whole
        less = min((count - 1) / ENOUGH, 1.0)
        return (count * less + (people - count) * whole) / people

    return {answer: worth(count) for answer, count in counts.items()}


def visual_question_answering_metrics(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    kinds: Sequence[str] | None = None,
    *,
    leave_one_out: bool = False,
) -> dict[str, float]:
    """The mean worth of the predicted answers, whole and for each kind of question.

    Args:
        predictions: N answers.
        answers: of each question, those that people gave.
        kinds: of each question, such as "number"; None reports no kinds.
        leave_one_out: see `agreement`.

    Returns:
        "accuracy", and "accuracy of KIND" for each.

    Raises:
        ValueError: different numbers of each, or none.
    """
    if len(predictions) != len(answers) or not len(answers):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} questions")
    if kinds is not None and len(kinds) != len(answers):
        raise ValueError(f"{len(kinds)} kinds for {len(answers)} questions")
    worth = np.array(
        [
            agreement(given, leave_one_out=leave_one_out).get(normalize_answer(predicted), 0.0)
            for predicted, given in zip(predictions, answers, strict=True)
        ]
    )
    scores = {"accuracy": float(worth.mean())}
    for kind in sorted(set(kinds or ())):
        of_kind = np.array([kind == own for own in kinds or ()])
        scores[f"accuracy of {kind}"] = float(worth[of_kind].mean())
    return scores
