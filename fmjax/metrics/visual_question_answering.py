"""Accuracy of answers to questions about pictures, where ten people have answered each question."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fmjax.types import one_text

ENOUGH = 3  # people that must agree for an answer to be right
_ARTICLES = ("a", "an", "the")
_SIGNS = '/\\,;?!@+-=_<>()[]{}"`'  # the evaluation's: others, such as $ and %, stay
_DIGITS_APART = re.compile(r"\d,\d")
_LAST_POINTS = re.compile(r"\.(?!\d)")
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip


def normalize_answer(text: str) -> str:
    """An answer as it is compared: small letters, digits for numbers up to ten, no articles, few
    signs.

    As the evaluation of Antol et al. 2015 does it, but for its list of misspelt contractions: a
    sign becomes a space, or nothing where it has a space beside it somewhere or digits have a comma
    between them; points go where no digit follows.

    >>> normalize_answer("Two  red-ish cups, $2.50.")
    '2 red ish cups $2.50'
    >>> normalize_answer("1,000")
    '1000'
    """
    text = " ".join(text.split())
    apart = _DIGITS_APART.search(text) is not None
    gone = [s for s in _SIGNS if apart or f"{s} " in text or f" {s}" in text]
    plain = text.translate(str.maketrans(dict.fromkeys(_SIGNS, " ") | dict.fromkeys(gone, "")))
    words = _LAST_POINTS.sub("", plain).lower().split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def agreement(answers: Sequence[str], *, leave_one_out: bool = False) -> dict[str, float]:
    """What each answer that people gave is worth: min(n / 3, 1) where n of them gave it.

    Antol et al. 2015, arXiv:1505.00468, section 3.2 ("accuracy").

    Args:
        answers: of one question, one of each person.
        leave_one_out: the mean of that over all choices of all people but one, as the published
            evaluation has it: of ten people who agree by one, two, three, four, 0.3, 0.6, 0.9, 1.

    Raises:
        ValueError: there are none, or one text.
    """
    if wrong := one_text("answers", answers):
        raise ValueError("; ".join(wrong))
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
        ValueError: different numbers of each, none, or a text in a list's place.
    """
    if wrong := one_text("predictions", predictions) + one_text("answers", answers, rows=True):
        raise ValueError("; ".join(wrong))
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
