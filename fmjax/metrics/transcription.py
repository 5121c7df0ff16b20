"""Error rates of transcripts, as jiwer counts them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fmjax.metrics.optional import optional_library
from fmjax.types import one_text


def word_error_rate(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Words inserted, deleted and replaced, as a share of all references' words.

    Args:
        references: the true texts; empty ones, of silence, count where others are not.
        predictions: what was heard.

    Raises:
        ValueError: no texts, texts that do not match in number, or references that are all empty.
        ImportError: jiwer is not installed.
    """
    return _rate("wer", references, predictions)


def character_error_rate(references: Sequence[str], predictions: Sequence[str]) -> float:
    """As `word_error_rate`, of characters."""
    return _rate("cer", references, predictions)


def _rate(name: str, references: Sequence[str], predictions: Sequence[str]) -> float:
    problems = one_text("references", references) + one_text("predictions", predictions)
    if len(references) != len(predictions) or not len(references):
        problems.append(f"{len(predictions)} texts for {len(references)} references")
    elif not any(text.strip() for text in references):
        problems.append("all references are empty: there is nothing that errors are a share of")
    if problems:
        raise ValueError("cannot score these transcripts: " + "; ".join(problems))
    jiwer = optional_library("jiwer", "jiwer", "audio")
    measure = jiwer.wer if name == "wer" else jiwer.cer
    return float(measure(list(references), list(predictions)))


def spoken(text: str) -> str:
    """Words as they sound, for error rates of texts that differ in how they are written: small
    letters, no punctuation but apostrophes inside words.

    >>> spoken("Agent login -- please enter the agent's number, then press pound.")
    "agent login please enter the agent's number then press pound"
    """
    plain = re.sub(r"[^\w' ]+|_", " ", text.lower().replace("\u2019", "'"))
    return " ".join(word for part in plain.split() if (word := part.strip("'")))
