"""Running text from plain files, for language modelling and for training tokenizers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Literal

from fmjax.data.files import raise_problems
from fmjax.data.records import Documents

Separator = Literal["line", "blank", "file"]
SEPARATORS = ("line", "blank", "file")
MAX_CHARACTERS = 1_000_000  # of one line
BYTES_A_CHARACTER = 4  # at most, in UTF-8

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def read_documents(
    paths: Paths, *, separator: Separator = "line", max_characters: int = MAX_CHARACTERS
) -> Documents:
    """Reads plain text into documents named "FILE:LINE" after the line they begin at.

    Args:
      paths: one file or several, in UTF-8.
      separator: what ends a document: "line", each line is one (an empty one is an error); "blank",
        empty lines stand between documents of several lines; "file", each file is one.
      max_characters: that a line may have. A longer one is an error: its line breaks were
        probably lost, and it would be tokenized at once.

    Raises:
      ValueError: every empty line (with "line"), the first line that is too long or not UTF-8, a
        file without text.
      OSError: a file cannot be read.
    """
    pairs = list(iterate_documents(paths, separator=separator, max_characters=max_characters))
    return Documents(texts=[text for _, text in pairs], names=[name for name, _ in pairs])


def iterate_documents(
    paths: Paths, *, separator: Separator = "line", max_characters: int = MAX_CHARACTERS
) -> Iterator[tuple[str, str]]:
    """Yields (name, text) as `read_documents` has them, a document at a time.

    The errors are those of `read_documents`; that of empty lines comes at the end of their file.
    """
    if separator not in SEPARATORS:
        raise ValueError(f"separator {separator!r} is not one of {SEPARATORS}")
    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not files:
        raise ValueError("no files were given")
    for path in map(Path, files):
        problems: list[str] = []
        count = 0
        with path.open("rb") as file:
            for name, text in _documents(path, file, separator, max_characters, problems):
                count += 1
                yield name, text
        raise_problems(str(path), problems)
        if not count:
            raise ValueError(f"{path}: no text in this file")


def _documents(
    path: Path, file: IO[bytes], separator: Separator, max_characters: int, problems: list[str]
) -> Iterator[tuple[str, str]]:
    begin, lines = 0, list[str]()
    last_line_was_empty = 0
    for number, line in enumerate(_lines(path, file, max_characters), start=1):
        if line.strip():
            if separator == "line":
                if last_line_was_empty:
                    problems.append(
                        f"line {last_line_was_empty} is empty: take it out, or say "
                        f"separator='blank' if empty lines stand between the documents"
                    )
                    last_line_was_empty = 0
                yield f"{path}:{number}", line
                continue
            begin = begin or number
            lines.append(line)
        elif separator == "line":
            # Told only when text follows: a file may end in empty lines.
            last_line_was_empty = last_line_was_empty or number
        elif separator == "file" and lines:
            lines.append("")
        elif lines:
            yield f"{path}:{begin}", "\n".join(lines)
            begin, lines = 0, []
    if lines:
        yield f"{path}:{begin}", "\n".join(lines).rstrip("\n")


def _lines(path: Path, file: IO[bytes], max_characters: int) -> Iterator[str]:
    number = 0
    while content := file.readline(BYTES_A_CHARACTER * max_characters + 2):
        number += 1
        try:
            line = content.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            if not content.endswith(b"\n") and len(content) > BYTES_A_CHARACTER * max_characters:
                line = " " * (max_characters + 1)  # cut, maybe within a character: too long
            else:
                raise ValueError(
                    f"{path}: line {number}: byte 0x{error.object[error.start]:02x} is not UTF-8; "
                    f"convert the file, for instance: iconv -f WINDOWS-1252 -t UTF-8"
                ) from error
        line = line.removesuffix("\n").removesuffix("\r")
        if len(line) > max_characters:
            raise ValueError(
                f"{path}: line {number} has more than max_characters={max_characters} characters; "
                f"put line breaks between paragraphs, or allow more"
            )
        yield line
