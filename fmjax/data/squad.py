"""Questions with answers that are spans of a context: the format of SQuAD.

P. Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016 (version
1.1), and "Know What You Don't Know: Unanswerable Questions for SQuAD", 2018 (version 2.0).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fmjax.data.files import decode_utf8, parse_json, raise_problems, read_rows
from fmjax.data.records import Answer, Questions

SHOWN = 60  # characters of a text in an error


def read_squad(path: str | os.PathLike[str], *, answers: bool = True) -> Questions:
    """Reads a .json file of SQuAD 1.1 or 2.0, or the same questions as JSON Lines.

    Args:
      path: the file. As .jsonl or .ndjson it has an object with "id", "question", "context" and
        "answers": {"text": [...], "answer_start": [...]} on each line, as Hugging Face's `datasets`
        writes it; no texts there say that the context does not answer the question.
      answers: False reads questions alone, whatever the file has of answers.

    Returns:
      The questions in the order of the file. In a .json file those with "is_impossible" have no
      answers; their "plausible_answers" are not read.

    Raises:
      ValueError: everything that is wrong, by its place in the file: missing or empty texts,
        repeated ids, answers that do not stand where they are said to, no answers without
        "is_impossible" or the other way round.
      OSError: the file cannot be read.
    """
    where = os.fspath(path)
    problems: list[str] = []
    if Path(path).suffix.lower() == ".json":
        items = list(_json(where, decode_utf8(Path(path)), answers, problems))
    else:
        items = list(_json_lines(path, answers, problems))
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            problems.append(f"{item.place}: id {item.id!r} appears again")
        seen.add(item.id)
        problems += [
            f"{item.place}: {problem}"
            for answer in item.answers
            for problem in _misplaced(answer, item.context)
        ]
    raise_problems(where, problems)
    if not items:
        raise ValueError(f"{where}: no questions")
    return Questions(
        ids=[item.id for item in items],
        questions=[item.question for item in items],
        contexts=[item.context for item in items],
        answers=[item.answers for item in items] if answers else None,
        titles=[item.title for item in items] if all(item.title for item in items) else None,
    )


class _Item(NamedTuple):
    """A question, and where in the file it is."""

    place: str
    id: str
    question: str
    context: str
    answers: list[Answer]
    title: str


def _json(where: str, text: str, answers: bool, problems: list[str]) -> Iterator[_Item]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); JSON Lines are read as .jsonl") from error
    articles = _list(content, "data", "the file", problems)
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"data[{a}]", problems)):
            place = f"data[{a}].paragraphs[{p}]"
            context = _text(paragraph, "context", place, problems)
            title = str(article.get("title") or "")
            for q, qa in enumerate(_list(paragraph, "qas", place, problems)):
                here = f"{place}.qas[{q}]"
                name = _text(qa, "id", here, problems)
                question = _text(qa, "question", here, problems)
                given = _json_answers(qa, here, problems) if answers else []
                yield _Item(here, name, question, context, given, title)


def _json_answers(qa: Any, place: str, problems: list[str]) -> list[Answer]:
    if not isinstance(qa, dict):
        return []
    impossible = qa.get("is_impossible", False)
    if not isinstance(impossible, bool):
        problems.append(f"{place}: 'is_impossible' is {impossible!r}, true or false was expected")
    if "answers" not in qa and not impossible:
        problems.append(f"{place}: 'answers' are missing; answers=False reads questions alone")
        return []
    given = []
    for i, answer in enumerate(_list(qa, "answers", place, problems) if "answers" in qa else []):
        here = f"{place}.answers[{i}]"
        text = _text(answer, "text", here, problems)
        start = answer.get("answer_start") if isinstance(answer, dict) else None
        given += _answer(text, start, here, problems)
        if impossible:
            problems.append(f"{here}: an answer of a question with 'is_impossible'")
    if "answers" in qa and not qa["answers"] and not impossible:
        problems.append(f"{place}: no answers, and 'is_impossible' does not say why")
    return given


def _json_lines(
    path: str | os.PathLike[str], answers: bool, problems: list[str]
) -> Iterator[_Item]:
    rows = read_rows(path, [])
    problems += rows.problems
    for number, cells in zip(rows.numbers, rows.cells, strict=True):
        place = f"row {number}"
        name = _text(cells, "id", place, problems)
        question = _text(cells, "question", place, problems)
        context = _text(cells, "context", place, problems)
        given: list[Answer] = []
        if answers:
            cell = cells.get("answers")
            texts = _list(cell, "text", f"{place}: 'answers'", problems)
            starts = _list(cell, "answer_start", f"{place}: 'answers'", problems)
            if len(texts) != len(starts):
                problems.append(f"{place}: {len(texts)} answers with {len(starts)} answer_start")
            for text, start in zip(texts, starts, strict=False):
                if not isinstance(text, str) or not text.strip():
                    problems.append(f"{place}: answer {text!r}, a text was expected")
                else:
                    given += _answer(text, start, place, problems)
        yield _Item(place, name, question, context, given, str(cells.get("title") or ""))


def _answer(text: str, start: Any, place: str, problems: list[str]) -> list[Answer]:
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        problems.append(f"{place}: 'answer_start' is {start!r}, a character's number was expected")
        return []
    return [Answer(text, start)] if text else []


def _misplaced(answer: Answer, context: str) -> list[str]:
    """What is wrong with the place of an answer, if anything."""
    end = answer.start + len(answer.text)
    found = context[answer.start : end]
    if found == answer.text or not context:
        return []
    places = (context.rfind(answer.text, 0, end), context.find(answer.text, answer.start))
    nearest = min(
        (place for place in places if place >= 0),
        key=lambda place: abs(place - answer.start),
        default=None,
    )
    hint = "the context does not have it" if nearest is None else f"the context has it at {nearest}"
    return [
        f"answer {_short(answer.text)} at {answer.start}: there stands {_short(found)}, and {hint}"
    ]


def _list(content: Any, key: str, place: str, problems: list[str]) -> list[Any]:
    if not isinstance(content, dict):
        problems.append(f"{place} is {_short(content)}, an object with {key!r} was expected")
        return []
    if not isinstance(content.get(key), list):
        problems.append(f"{place}: {key!r} is {_short(content.get(key))}, a list was expected")
        return []
    return content[key]


def _text(content: Any, key: str, place: str, problems: list[str]) -> str:
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, str) or not value.strip():
        problems.append(f"{place}: {key!r} is {_short(value)}, a text was expected")
        return ""
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]}...{text[-1]}"
