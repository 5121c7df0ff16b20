"""Pairs of texts from files: two aligned files as Moses has them, or two columns of one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmjax.data.files import decode_utf8, raise_problems, read_rows
from fmjax.data.records import TextPairs

MAX_CHARACTERS = 20_000  # of one text


def read_aligned(
    sources: str | os.PathLike[str],
    targets: str | os.PathLike[str],
    *,
    skip_empty: bool = False,
    max_characters: int = MAX_CHARACTERS,
) -> TextPairs:
    """Reads two files of which each line translates the same line of the other.

    Args:
      sources, targets: plain text in UTF-8, for instance "train.en" and "train.de".
      skip_empty: leave out pairs with an empty line; by default they are errors.
      max_characters: that a line may have. A line with more is an error: it is probably not one
        sentence but a file whose line breaks were lost.

    Raises:
      ValueError: different numbers of lines; every line that is empty or too long; no pairs.
      OSError: a file cannot be read.
    """
    where = f"{os.fspath(sources)} and {os.fspath(targets)}"
    columns = [_lines(sources), _lines(targets)]
    if len(columns[0]) != len(columns[1]):
        raise ValueError(
            f"{where}: {len(columns[0])} and {len(columns[1])} lines; aligned files have the same "
            f"number, and an empty line where there is no translation"
        )
    return _pairs(
        where,
        "line",
        list(range(1, len(columns[0]) + 1)),
        (("the source", columns[0]), ("the target", columns[1])),
        [],
        skip_empty,
        max_characters,
    )


def read_pairs(
    path: str | os.PathLike[str],
    *,
    source: str = "source",
    target: str = "target",
    skip_empty: bool = False,
    max_characters: int = MAX_CHARACTERS,
) -> TextPairs:
    """Reads two columns of a TSV or CSV file with a header, or of JSON Lines.

    Args:
      path: the file, in UTF-8; its suffix says the format. A JSON object may hold the texts below
        "translation", as those of WMT do: {"translation": {"en": "...", "de": "..."}}, which is
        read with source="en", target="de".
      source, target: the names of the columns.
      skip_empty, max_characters: see `read_aligned`.

    Raises:
      ValueError: everything that is wrong with the file, by row number.
      OSError: the file cannot be read.
    """
    rows = read_rows(path, [source, target])
    cells = [_unnested(row, source, target) for row in rows.cells]
    return _pairs(
        rows.where,
        "row",
        rows.numbers,
        tuple((repr(name), [row.get(name) for row in cells]) for name in (source, target)),
        rows.problems,
        skip_empty,
        max_characters,
    )


def _unnested(row: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    nested = row.get("translation")
    if isinstance(nested, dict) and source not in row and target not in row:
        return nested
    return row


def _lines(path: str | os.PathLike[str]) -> list[str]:
    # Not splitlines(): it would break at U+2028 and others, and shift one side.
    lines = decode_utf8(Path(path)).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _pairs(
    where: str,
    unit: str,
    numbers: Sequence[int],
    columns: Sequence[tuple[str, Sequence[Any]]],
    problems: list[str],
    skip_empty: bool,
    max_characters: int,
) -> TextPairs:
    problems = list(problems)
    kept: list[tuple[str, str]] = []
    (_, sources), (_, targets) = columns
    for number, *pair in zip(numbers, sources, targets, strict=True):
        empty = False
        for (name, _), text in zip(columns, pair, strict=True):
            if isinstance(text, str) and len(text) > max_characters:
                problems.append(
                    f"{unit} {number}: {name} has {len(text)} characters, more than "
                    f"max_characters={max_characters}: {text[:40]!r}..."
                )
            elif text is not None and not isinstance(text, str):
                problems.append(f"{unit} {number}: {name} is {text!r}, a text was expected")
            elif text is None or not text.strip():
                empty = True
                if not skip_empty:
                    state = "missing" if text is None else "empty"
                    problems.append(f"{unit} {number}: {name} is {state}")
        if not empty:
            kept.append((pair[0], pair[1]))
    raise_problems(where, problems)
    if not kept:
        raise ValueError(f"{where}: no pairs of texts")
    return TextPairs(
        sources=[source.strip() for source, _ in kept],
        targets=[target.strip() for _, target in kept],
    )
