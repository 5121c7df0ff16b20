"""Rows of a TSV, CSV or JSON Lines file, with every problem named by its row."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

DELIMITERS = {".tsv": "\t", ".csv": ","}
JSON_LINES = (".jsonl", ".ndjson")
LISTED_PROBLEMS = 10


@dataclasses.dataclass(frozen=True)
class Rows:
    """What was read: cells by column name, each row with its number in the file.

    Attributes:
      where: the name errors begin with.
      numbers: row numbers from 1, counted as a spreadsheet does, so the header of a TSV or CSV
        file is row 1; in JSON Lines they are line numbers.
      cells: one mapping from column name to cell for each number.
      problems: what was wrong so far, one line each; not yet raised, so that the problems of the
        cells can join them.
    """

    where: str
    numbers: list[int]
    cells: list[dict[str, Any]]
    problems: list[str]


def raise_problems(where: str, problems: list[str]) -> None:
    """Raises one ValueError that lists the problems (the first ten and a count), if any."""
    if not problems:
        return
    listed = problems[:LISTED_PROBLEMS]
    if len(problems) > len(listed):
        listed.append(f"and {len(problems) - len(listed)} more")
    lines = "\n".join(f"  {problem}" for problem in listed)
    plural = "s" if len(problems) > 1 else ""
    raise ValueError(f"{where}: {len(problems)} problem{plural}\n{lines}")


def read_rows(path: str | os.PathLike[str], columns: Iterable[str]) -> Rows:
    """Reads a file whose suffix says its format: .tsv, .csv (with a header) or .jsonl.

    Args:
      path: the file, in UTF-8 with or without a byte order mark. Cells follow the usual rules of
        quoting (RFC 4180): a cell that holds a tab, comma, line break or starts with a quotation
        mark stands in quotation marks, and quotation marks inside it are doubled.
      columns: the columns that the header must have.

    Raises:
      ValueError: another suffix, text that is not UTF-8, an empty file, a header without one of
        `columns`. Problems of single rows are returned in `Rows.problems`.
      OSError: the file cannot be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in DELIMITERS and suffix not in JSON_LINES:
        known = ", ".join([*DELIMITERS, *JSON_LINES])
        raise ValueError(f"{path}: suffix {suffix!r} says no known format; rename it to {known}")
    text = decode_utf8(path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; a header or a JSON object was expected")
    if suffix in JSON_LINES:
        rows = _json_lines(str(path), text)
    else:
        with _cells_up_to(len(text)):
            rows = _delimited(str(path), text, DELIMITERS[suffix], list(columns))
    if not rows.numbers and not rows.problems:
        raise ValueError(f"{path}: the file has a header but no rows")
    return rows


def visible(folder: Path) -> list[Path]:
    """What is in a folder, by name, without what systems and editors hide there (".name")."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def parse_json(text: str) -> Any:
    """The value that a text in JSON says.

    Raises:
      ValueError: it says none, is nested too deeply, or holds an integer of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@contextlib.contextmanager
def _cells_up_to(characters: int) -> Iterator[None]:
    """Lets the csv module, which has one limit for all, read cells of so many characters."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, characters))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def decode_utf8(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
      ValueError: bytes that are not UTF-8, with the line of the first.
      OSError: the file cannot be read.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind a byte order mark.
        offset = error.start + (len(content) - len(error.object))
        line = content.count(b"\n", 0, offset) + 1
        raise ValueError(
            f"{path}: byte 0x{content[offset]:02x} at offset {offset} (line {line}) is not UTF-8; "
            f"convert the file, for instance: iconv -f WINDOWS-1252 -t UTF-8"
        ) from error


def _delimited(where: str, text: str, delimiter: str, columns: list[str]) -> Rows:
    # strict: a stray quotation mark is an error here and not a cell that swallows the next rows.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    rows = Rows(where, [], [], [])
    number = 0
    while True:
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return rows
        except csv.Error as error:
            # Where a broken row ends is unknown, so what follows cannot be judged.
            rows.problems.append(
                f"row {number} (line {reader.line_num}): {error}; put a cell that starts with a "
                f'quotation mark in quotation marks and double those inside ("" for ")'
            )
            return rows
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            _check_header(where, header, columns)
        elif len(cells) > len(header):
            rows.problems.append(f"row {number}: {len(cells)} cells, the header has {len(header)}")
        else:
            rows.numbers.append(number)
            rows.cells.append(dict(zip(header, cells, strict=False)))


def _check_header(where: str, header: list[str], columns: list[str]) -> None:
    problems = [
        f"no column {column!r}; the header has {header}"
        for column in columns
        if column not in header
    ]
    repeated = sorted({column for column in header if header.count(column) > 1})
    problems += [f"column {column!r} appears more than once in the header" for column in repeated]
    raise_problems(where, problems)


def _json_lines(where: str, text: str) -> Rows:
    rows = Rows(where, [], [], [])
    # Not splitlines(): a JSON string may hold U+2028 and other characters it would break at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except json.JSONDecodeError as error:
            rows.problems.append(f"row {number}: not JSON ({error.msg} at column {error.colno})")
            continue
        except ValueError as error:
            rows.problems.append(f"row {number}: not JSON that can be read ({error})")
            continue
        if not isinstance(value, dict):
            kind = type(value).__name__
            rows.problems.append(f"row {number}: a JSON object was expected, found {kind}")
            continue
        rows.numbers.append(number)
        rows.cells.append(value)
    return rows
