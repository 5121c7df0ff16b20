"""Sentences of tagged words in columns: the formats of the CoNLL shared tasks, and CoNLL-U.

A word a line with its columns, an empty line after each sentence. E. F. Tjong Kim Sang and
F. De Meulder, "Introduction to the CoNLL-2003 Shared Task", 2003; for CoNLL-U see
https://universaldependencies.org/format.html.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fmjax.data.files import decode_utf8, raise_problems
from fmjax.data.records import TaggedSentences

DOCUMENT_START = "-DOCSTART-"
CONLLU_COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


@dataclasses.dataclass(frozen=True)
class _Line:
    """A word's line: its number in the file, its cells, and the document it is in."""

    number: int
    cells: list[str]
    document: str | None


def read_conll(
    path: str | os.PathLike[str],
    *,
    word: int = 0,
    tag: int | None = -1,
    tag_names: Sequence[str] | None = None,
    delimiter: str | None = None,
) -> TaggedSentences:
    """Reads a file in columns, with an empty line between sentences.

    Args:
      path: the file, in UTF-8.
      word, tag: columns counted from 0, or from the end with -1; `tag=None` reads words alone.
      tag_names: the tags in the order of their indices; by default those of the file, "O" first and
        the others in alphabetical order. Give those of the training file when reading any other.
      delimiter: what separates columns; by default any white space. With "\\t" a word may hold
        spaces.

    Returns:
      The sentences, with `documents` numbered from 1 if the file has lines "-DOCSTART-".

    Raises:
      ValueError: every line with another number of columns than the first, without a word or with
        a tag outside `tag_names`; columns that the file does not have; no sentence at all.
      OSError: the file cannot be read.
    """
    where = os.fspath(path)
    problems: list[str] = []
    sentences = list(_sentences(decode_utf8(Path(path)), delimiter, problems))
    if not sentences:
        raise_problems(where, problems)
        raise ValueError(f"{where}: no sentences; a word a line was expected")
    width = len(sentences[0][0].cells)
    for name, column in [("word", word), ("tag", tag)]:
        if column is not None and not -width <= column < width:
            raise ValueError(f"{where}: no column {name}={column}, the first line has {width}")
    if tag is not None and tag % width == word % width:
        raise ValueError(f"{where}: word={word} and tag={tag} are the same of {width} columns")
    for line in (line for sentence in sentences for line in sentence):
        if len(line.cells) != width:
            problems.append(
                f"line {line.number}: {len(line.cells)} columns, the first word has {width}"
            )
        elif not line.cells[word].strip():
            problems.append(f"line {line.number}: no word in column {word}")
    sentences = [[line for line in lines if len(line.cells) == width] for lines in sentences]
    return _tagged(where, sentences, word, tag, tag_names, problems)


def read_conllu(
    path: str | os.PathLike[str],
    *,
    tag: str | None = "upos",
    tag_names: Sequence[str] | None = None,
) -> TaggedSentences:
    """Reads a CoNLL-U file of Universal Dependencies: its syntactic words and one column of tags.

    Comments, the lines of contracted words ("1-2") and those of left out words ("1.1") are skipped.

    Args:
      path: the file, in UTF-8.
      tag: one of `CONLLU_COLUMNS`, mostly "upos", "xpos" or "deprel"; None reads words alone.
      tag_names: as in `read_conll`.

    Returns:
      The sentences, with the `documents` of lines "# newdoc id = ...", if there are any.

    Raises:
      ValueError: every line that does not have ten columns, without a word or with a tag outside
        `tag_names`; another `tag`; no sentence at all.
      OSError: the file cannot be read.
    """
    where = os.fspath(path)
    if tag is not None and tag not in CONLLU_COLUMNS[2:]:
        raise ValueError(f"tag {tag!r} is not one of the columns {CONLLU_COLUMNS[2:]}")
    problems: list[str] = []
    sentences = []
    for lines in _sentences(decode_utf8(Path(path)), "\t", problems, comments=True):
        kept = []
        for line in lines:
            if len(line.cells) != len(CONLLU_COLUMNS):
                problems.append(
                    f"line {line.number}: {len(line.cells)} columns separated by tabs, CoNLL-U has "
                    f"{len(CONLLU_COLUMNS)}"
                )
            elif not line.cells[1].strip():
                problems.append(f"line {line.number}: no word in column 1")
            elif line.cells[0].isdecimal():
                kept.append(line)
        if kept:
            sentences.append(kept)
    if not sentences:
        raise_problems(where, problems)
        raise ValueError(f"{where}: no sentences; a word a line was expected")
    column = None if tag is None else CONLLU_COLUMNS.index(tag)
    return _tagged(where, sentences, 1, column, tag_names, problems)


def _sentences(
    text: str, delimiter: str | None, problems: list[str], comments: bool = False
) -> Iterator[list[_Line]]:
    """Groups of lines with empty lines around them, without -DOCSTART- and comments."""
    document: str | None = None
    documents = 0
    lines: list[_Line] = []
    # Not splitlines(): a word may hold U+0085 and other characters it would break at.
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        line = line.removesuffix("\r")
        if comments and line.startswith("#"):
            key, _, value = line[1:].partition("=")
            if key.split() in (["newdoc"], ["newdoc", "id"]):
                documents += 1
                document = value.strip() or str(documents)
        elif line.split()[:1] == [DOCUMENT_START]:
            documents += 1
            if lines:
                problems.append(f"line {number}: {DOCUMENT_START} inside of a sentence")
            document = str(documents)
        elif line.strip():
            lines.append(_Line(number, line.split(delimiter), document))
        elif lines:
            yield lines
            lines = []


def _tagged(
    where: str,
    sentences: list[list[_Line]],
    word: int,
    tag: int | None,
    tag_names: Sequence[str] | None,
    problems: list[str],
) -> TaggedSentences:
    names: tuple[str, ...] = ()
    tags: list[np.ndarray] | None = None
    if tag is not None:
        found = {line.cells[tag] for sentence in sentences for line in sentence}
        names = tuple(tag_names or sorted(found, key=lambda name: (name != "O", name)))
        if len(set(names)) != len(names):
            raise ValueError(f"tag_names {list(names)} name a tag twice")
        index = {name: i for i, name in enumerate(names)}
        problems += [
            f"line {line.number}: tag {line.cells[tag]!r} is not one of {names}"
            for sentence in sentences
            for line in sentence
            if line.cells[tag] not in index
        ]
        raise_problems(where, problems)
        tags = [np.array([index[line.cells[tag]] for line in s], np.int32) for s in sentences]
    raise_problems(where, problems)
    documents = [sentence[0].document for sentence in sentences]
    return TaggedSentences(
        words=[[line.cells[word] for line in sentence] for sentence in sentences],
        tags=tags,
        tag_names=names,
        documents=None if set(documents) == {None} else [name or "0" for name in documents],
    )
