"""Metrics of extractive answers: exact match and F1 as SQuAD's evaluation scripts compute them.

The rules are those of evaluate-v2.0.py (Rajpurkar et al. 2018, arXiv:1806.03822); version 1.1's
script (2016, arXiv:1606.05250) gives the same unless an answer is nothing but articles and signs.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from fmjax.types import one_text

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_SIGNS = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """An answer as it is compared: lower case, no ASCII punctuation, no articles, single spaces.

    >>> normalize_answer("The  Eiffel-Tower!")
    'eiffeltower'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_SIGNS)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 if both are the same once they are normalised, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the words of both, as bags; of no words, 1 if neither has any."""
    found, true = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not found or not true:
        return float(found == true)
    same = sum((Counter(found) & Counter(true)).values())
    return 2.0 * same / (len(found) + len(true))


def squad_scores(
    predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> tuple[np.ndarray, np.ndarray]:
    """(exact match, F1) of each question, float64 [N] from 0 to 1: against its best answer.

    Args:
      predictions: N texts, "" where a question is said to have no answer.
      answers: the texts that are right for each question; none where it has no answer.

    Raises:
      ValueError: different numbers of predictions and questions, none, or a text in a list's place.
    """
    if wrong := one_text("predictions", predictions) + one_text("answers", answers, rows=True):
        raise ValueError("; ".join(wrong))
    if len(predictions) != len(answers) or not len(answers):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} questions")
    exact, f1 = np.zeros(len(answers)), np.zeros(len(answers))
    for n, (text, several) in enumerate(zip(predictions, answers, strict=True)):
        true = _right(several) or [""]
        exact[n] = max(exact_match(text, answer) for answer in true)
        f1[n] = max(token_f1(text, answer) for answer in true)
    return exact, f1


def squad_metrics(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 over a set of questions.

    Args:
      predictions, answers: see `squad_scores`.

    Returns:
      "exact_match" and "f1" from 0 to 100, "total"; where some questions have no answer also
      "has_answer_exact_match", "has_answer_f1", "has_answer_total" and the same of "no_answer".
    """
    exact, f1 = squad_scores(predictions, answers)
    having = np.array([len(several) > 0 for several in answers])
    parts = {"": np.ones(len(having), bool)}
    if not having.all():
        parts |= {"has_answer_": having, "no_answer_": ~having}
    scores: dict[str, float] = {}
    for name, part in parts.items():
        if part.any():
            scores[f"{name}exact_match"] = 100.0 * float(exact[part].mean())
            scores[f"{name}f1"] = 100.0 * float(f1[part].mean())
        scores[f"{name}total"] = int(part.sum())
    return scores


def best_threshold(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], no_answer: ArrayLike
) -> dict[str, float]:
    """The threshold above which "no answer" is best said, as if the true answers were known.

    Args:
      predictions: N texts, what would be answered if something must be.
      answers: see `squad_scores`.
      no_answer: [N] how likely each question has no answer, in any unit.

    Returns:
      "best_exact_match" and "best_f1", and for each the largest `no_answer` that still answers,
      "best_exact_match_threshold" and "best_f1_threshold"; where it is best to answer nothing, a
      number below all of them (the script has 0, which is one for its probabilities).
    """
    scores = zip(("exact_match", "f1"), squad_scores(predictions, answers), strict=True)
    having = np.array([len(several) > 0 for several in answers])
    empty = np.array([not text for text in predictions])
    values = np.asarray(no_answer, np.float64)
    if values.shape != having.shape:
        raise ValueError(f"no_answer has shape {values.shape} for {len(having)} questions")
    order = np.argsort(values, kind="stable")
    found: dict[str, float] = {}
    for name, score in scores:
        # What answering a question gains over not answering it.
        gain = np.where(having, score, np.where(empty, 0.0, -1.0))[order]
        total = np.cumsum(gain)
        best = int(np.argmax(total))
        answered = total[best] > 0
        found[f"best_{name}"] = 100.0 * float((~having).sum() + max(total[best], 0.0)) / len(having)
        found[f"best_{name}_threshold"] = float(
            values[order[best]] if answered else values.min() - 1
        )
    return found


def _right(several: Sequence[str]) -> list[str]:
    return [answer for answer in several if normalize_answer(answer)]
