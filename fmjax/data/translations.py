"""Translations that are on the machine already: the message catalogs of its installed programs.

On Linux, programs that speak several languages read them from ``*.mo`` files of GNU gettext under
``/usr/share/locale/LANGUAGE/LC_MESSAGES``. Tens of thousands of messages make a small parallel
corpus of English and any other language. They belong to their programs (mostly under the GPL), so
they are read where they are and not copied.
"""

from __future__ import annotations

import os
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fmjax.data.files import raise_problems
from fmjax.data.records import TextPairs
from fmjax.data.splits import SPLITS, hash_split

FOLDERS = ("/usr/share/locale", "/usr/share/locale-langpack")
MAGIC = 0x950412DE
# What stands for a value: "%s", "%-10.3ld", "%(name)s", "%1$s", "{0}", "{name!r}".
DIRECTIVE = re.compile(
    r"%(?:\(\w+\)|\d+\$)?[-+ #0']*[\d.*]*(?:hh|ll|[hlLjzt])?[A-Za-z%]|\{[^{}\s]*\}"
)
MNEMONIC = re.compile(r"(?<!\w)_(?=[^\W_])")  # "_Open", reached by Alt+O
WORD = re.compile(r"[^\W\d_]{2,}")
# Lists of names of languages, countries and currencies: much the same in all languages.
NAME_LISTS = re.compile(r"iso_\d+")


class Message(NamedTuple):
    """One entry of a catalog.

    Attributes:
      source: what the program says, in English.
      target: its translation.
    """

    source: str
    target: str


def load_translations(
    languages: str,
    split: str,
    *,
    folders: Sequence[str | os.PathLike[str]] = FOLDERS,
    min_words: int = 2,
    max_words: int = 60,
    at_least: int = 1000,
) -> TextPairs:
    """Pairs of an English message and its translation, from this machine's message catalogs.

    White space is made single spaces and the marks of keyboard shortcuts are removed. Left out are
    messages without words of their own ("%s: %s"), untranslated ones, those whose English was met
    before, and lists of names (iso-codes).

    Args:
      languages: what to translate from and to, one of them "en": "en-de", "fr-en", "en-pt_BR".
      split: "train", "val" or "test": 80, 10 and 10 % by `hash_split` of the English words in
        lower case (see `split_key`), so that messages that differ in signs are in one split, the
        same in both directions.
      folders: where the catalogs are: ``FOLDER/LANGUAGE/LC_MESSAGES/*.mo``.
      min_words, max_words: words that both messages must have, directives like "%s" aside.
      at_least: pairs that all splits together must have, so that a machine with few catalogs does
        not give a tiny corpus in silence.

    Raises:
      ValueError: languages without "en", or an unknown split.
      FileNotFoundError: fewer than `at_least` pairs, with what to install.
    """
    source, _, target = languages.partition("-")
    if not source or not target or (source == "en") == (target == "en"):
        raise ValueError(
            f"languages {languages!r}: two languages were expected, one of them 'en', for instance "
            f"'en-de' or 'fr-en'"
        )
    if not re.fullmatch(r"[A-Za-z_@.]+", source + target):
        raise ValueError(f"languages {languages!r}: a language is letters such as 'de' or 'pt_BR'")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {SPLITS}")
    other = target if source == "en" else source
    pairs: dict[str, str] = {}
    for message in _messages(other, folders):
        english, translation = _clean(message)
        counts = [len(WORD.findall(DIRECTIVE.sub(" ", text))) for text in (english, translation)]
        fits = min_words <= counts[0] <= max_words and 1 <= counts[1] <= max_words
        if fits and english.casefold() != translation.casefold():
            pairs.setdefault(english, translation)
    if len(pairs) < at_least:
        places = ", ".join(str(folder) for folder in folders)
        raise FileNotFoundError(
            f"{len(pairs)} messages in 'en' and {other!r} under {places}, at least {at_least} "
            f"were expected: install programs with their translations (on Debian: apt-get install "
            f"git gettext gnupg binutils-common; on Ubuntu also language-pack-{other}), give other "
            f"folders=, or lower at_least. Container images often leave translations out"
        )
    chosen = [english for english in pairs if hash_split(split_key(english)) == split]
    result = TextPairs(sources=chosen, targets=[pairs[english] for english in chosen])
    return result if source == "en" else result.reverse()


def split_key(english: str) -> str:
    """The words of a message in lower case, after "translations/"."""
    return f"translations/{' '.join(WORD.findall(english.lower()))}"


def read_catalog(path: str | os.PathLike[str]) -> list[Message]:
    """All messages of one ``*.mo`` file but its header, singular and plural forms as two.

    The format: GNU gettext manual, section "The Format of GNU MO Files".

    Raises:
      ValueError: the file is not a catalog or points outside of itself; or every message that
        is not in the catalog's encoding.
      OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()
    messages = list(_entries(os.fspath(path), content))
    headers = [target for source, target in messages if not source]
    found = re.search(rb"charset=([\w.:-]+)", headers[0]) if headers else None
    charset = found[1].decode("ascii") if found else "ascii"
    if charset == "CHARSET":  # as the template has it: nobody filled it in
        charset = "ascii"
    problems = []
    result = []
    for number, (source, target) in enumerate(messages):
        if not source:
            continue
        try:
            texts, translations = source.decode(charset), target.decode(charset)
        except (UnicodeDecodeError, LookupError) as error:
            problems.append(f"message {number}: {error}")
            continue
        # A context may stand before a message, and its plural after it.
        originals = texts.rpartition("\x04")[2].split("\0")
        forms = translations.split("\0")
        if len(originals) == len(forms):  # which form belongs to which is plain with two or one
            result += [Message(*pair) for pair in zip(originals, forms, strict=True)]
    raise_problems(os.fspath(path), problems)
    return result


def _entries(where: str, content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The strings of a catalog and of its translation, as bytes."""
    order = next((o for o in "<>" if content[:4] == struct.pack(f"{o}I", MAGIC)), None)
    if order is None or len(content) < 20:
        raise ValueError(f"{where}: not a message catalog, its first bytes are {content[:4]!r}")
    _, count, *tables = struct.unpack_from(f"{order}4I", content, 4)
    if any(table + 8 * count > len(content) for table in tables):
        raise ValueError(f"{where}: {count} messages do not fit into {len(content)} bytes")
    for number in range(count):
        strings = []
        for table in tables:
            length, start = struct.unpack_from(f"{order}2I", content, table + 8 * number)
            if start + length > len(content):
                raise ValueError(f"{where}: message {number} lies outside of the file")
            strings.append(content[start : start + length])
        yield strings[0], strings[1]


def _messages(language: str, folders: Sequence[str | os.PathLike[str]]) -> Iterator[Message]:
    problems = []
    for folder in folders:
        for path in sorted(Path(folder, language, "LC_MESSAGES").glob("*.mo")):
            if NAME_LISTS.match(path.name.replace("-", "_")):
                continue
            try:
                yield from read_catalog(path)
            except ValueError as error:  # of the system, not of the user: the others will do
                problems.append(str(error))
    if problems:
        warnings.warn("left out: " + "; ".join(problems), stacklevel=3)


def _clean(message: Message) -> Message:
    source, target = (" ".join(text.split()) for text in message)
    # One shortcut in each; identifiers have more underscores or none at the start of a word.
    if source.count("_") == target.count("_") == 1 and MNEMONIC.search(source):
        source, target = source.replace("_", ""), target.replace("_", "")
    return Message(source, target)
