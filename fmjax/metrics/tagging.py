"""Metrics of tagged words: accuracy of tags, and precision, recall and F1 of entities."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from fmjax.metrics.optional import text_library
from fmjax.types import one_text

Tags = Sequence[Sequence[str]]
"""A tag for each word of each sentence."""
SCHEMES = ("IOB1", "IOB2", "IOE1", "IOE2", "IOBES", "BILOU")
AVERAGES = ("macro avg", "weighted avg")
_ENTITY = re.compile(r"O|[BIESLU]-.+")


def tag_accuracy(predictions: Tags, labels: Tags) -> float:
    """Share of words whose tag is right.

    Raises:
      ValueError: sentences that differ in number or length.
    """
    _check(predictions, labels)
    pairs = [
        (guess, true)
        for row, truth in zip(predictions, labels, strict=True)
        for guess, true in zip(row, truth, strict=True)
    ]
    return sum(guess == true for guess, true in pairs) / len(pairs)


def are_entities(names: Sequence[str]) -> bool:
    """Whether tags mark where entities begin and go on ("B-PER", "I-PER", "O")."""
    return any(name != "O" for name in names) and all(_ENTITY.fullmatch(name) for name in names)


def entity_metrics(predictions: Tags, labels: Tags, *, scheme: str | None = None) -> dict[str, Any]:
    """Precision, recall and F1 of whole entities, by seqeval: an entity is right if its type and
    both its ends are.

    Args:
      predictions: tags such as "B-PER", "I-PER", "O".
      labels: the true ones.
      scheme: one of `SCHEMES` reads the tags strictly: a "I-" with nothing before it is no entity.
        None is CoNLL 2003's script (conlleval), where it begins one; the script knows no "L-" and
        "U-", and tags that have some are read as "BILOU".

    Returns:
      "precision", "recall" and "f1" over all entities (micro), and "entities": {type: {"precision",
      "recall", "f1", "support"}}. A score whose denominator is 0 is 0.

    Raises:
      ValueError: sentences that differ in number or length, tags that are none, or an unknown
        scheme.
      ImportError: seqeval is not installed.
    """
    _check(predictions, labels)
    known = {tag for rows in (predictions, labels) for row in rows for tag in row}
    problems = [f"{tag!r} is no entity tag" for tag in sorted(known) if not _ENTITY.fullmatch(tag)]
    if scheme is not None and scheme not in SCHEMES:
        problems.append(f"scheme is {scheme!r}; it must be None or one of {SCHEMES}")
    if problems:
        raise ValueError("cannot find entities: " + "; ".join(problems))
    if scheme is None and any(tag[:2] in ("L-", "U-") for tag in known):
        scheme = "BILOU"
    strict = {}
    if scheme is not None:
        strict = {
            "mode": "strict",
            "scheme": vars(text_library("seqeval.scheme", "seqeval"))[scheme],
        }
    seqeval = text_library("seqeval.metrics", "seqeval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scores whose denominator is 0
        report = seqeval.classification_report(
            [list(row) for row in labels],
            [list(row) for row in predictions],
            output_dict=True,
            zero_division=0,
            **strict,
        )
    scores = {
        name: {key.replace("f1-score", "f1"): float(value) for key, value in row.items()}
        for name, row in report.items()
    }
    micro = scores.pop("micro avg", {"precision": 0.0, "recall": 0.0, "f1": 0.0})
    entities = {name: row for name, row in scores.items() if name not in AVERAGES}
    return {name: micro[name] for name in ("precision", "recall", "f1")} | {"entities": entities}


def _check(predictions: Tags, labels: Tags) -> None:
    problems = one_text("predictions", predictions, rows=True)
    problems += one_text("labels", labels, rows=True)
    if len(predictions) != len(labels):
        problems.append(f"{len(predictions)} predicted sentences for {len(labels)}")
    else:
        problems += [
            f"sentence {n}: {len(row)} predicted tags for {len(truth)} words"
            for n, (row, truth) in enumerate(zip(predictions, labels, strict=True))
            if len(row) != len(truth)
        ]
    if not any(len(row) for row in labels):
        problems.append("there are no words")
    if problems:
        raise ValueError("cannot score these tags: " + "; ".join(problems[:10]))
