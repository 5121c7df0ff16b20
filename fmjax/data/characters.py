"""Texts as numbers of characters, for CTC: the files of Hugging Face's Wav2Vec2CTCTokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

from fmjax.config import write_json
from fmjax.data.files import raise_problems
from fmjax.weights.strict_json import parse_object

VOCABULARY, SETTINGS = "vocab.json", "tokenizer_config.json"
TOKENIZER = "Wav2Vec2CTCTokenizer"


@dataclasses.dataclass(frozen=True)
class Characters:
    """Which number each character has.

    Attributes:
        symbols: in order of their numbers; each once.
        blank: the one of CTC, which pads too.
        delimiter: what stands for a space.
        unknown: what stands for a character that is not there; None refuses such texts.
        others: further ones that are no text, such as the start and the end.
        upper: whether texts are written in capitals to be encoded, and in small letters when
            decoded (the file's ``do_lower_case``).

    Raises:
        ValueError: symbols that are missing, empty or there twice.
    """

    symbols: tuple[str, ...]
    blank: str = "<pad>"
    delimiter: str = "|"
    unknown: str | None = "<unk>"
    others: tuple[str, ...] = ("<s>", "</s>")
    upper: bool = False

    def __post_init__(self) -> None:
        problems = []
        if len(set(self.symbols)) != len(self.symbols) or "" in self.symbols:
            problems.append("symbols are empty or there twice")
        for name in ("blank", "delimiter", "unknown"):
            symbol = getattr(self, name)
            if symbol is not None and symbol not in self.symbols:
                problems.append(f"{name}={symbol!r} is not among the symbols")
        raise_problems("characters", problems)

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each symbol."""
        return {symbol: number for number, symbol in enumerate(self.symbols)}

    @property
    def pieces(self) -> tuple[str, ...]:
        """What each number is in a text: a space for the delimiter, nothing for what is no text."""
        silent = {self.blank, self.unknown, *self.others}
        shown = {symbol: "" if symbol in silent else symbol for symbol in self.symbols}
        shown[self.delimiter] = " "
        return tuple(text.lower() if self.upper else text for text in shown.values())

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's characters.

        Raises:
            ValueError: characters that are not there, and no symbol for these.
        """
        text = (text.upper() if self.upper else text).replace(" ", self.delimiter)
        missing = sorted(set(text) - self.numbers.keys())
        if missing and self.unknown is None:
            raise ValueError(f"{text!r} has the characters {missing}, which the vocabulary has not")
        other = -1 if self.unknown is None else self.numbers[self.unknown]
        return [self.numbers.get(character, other) for character in text]

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of symbols, from which repeats and blanks are gone already."""
        pieces = self.pieces
        return "".join(pieces[number] for number in numbers).strip()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the two files, as `fmjax.save` asks for them."""
        settings = {
            "tokenizer_class": TOKENIZER,
            "pad_token": self.blank,
            "word_delimiter_token": self.delimiter,
            "unk_token": self.unknown,
            "do_lower_case": self.upper,
        }
        start, end = self.others if len(self.others) == 2 else (None, None)
        write_json(Path(folder) / VOCABULARY, self.numbers)
        write_json(Path(folder) / SETTINGS, settings | {"bos_token": start, "eos_token": end})


def characters_of(texts: Iterable[str], *, upper: bool = False) -> Characters:
    """A vocabulary of all characters of some texts.

    Args:
        texts: they are read once.
        upper: whether they are written in capitals first.

    Raises:
        ValueError: a text has the delimiter, or there are none.
    """
    found = set().union(*(text.upper() if upper else text for text in texts))
    if "|" in found or not found:
        raise ValueError("characters: texts must not have '|', which stands for a space, and be")
    special = ("<pad>", "<s>", "</s>", "<unk>", "|")
    return Characters((*special, *sorted(found - {" "})), upper=upper)


def load_characters(folder: str | Path, *, language: str | None = None) -> Characters:
    """The vocabulary of a checkpoint's folder.

    Args:
        folder: with vocab.json and, unless all is as usual, tokenizer_config.json.
        language: for models of many languages, whose vocab.json has one vocabulary for each.

    Raises:
        OSError: there is no vocab.json.
        ValueError: files that are something else; everything wrong is listed.
    """
    place = Path(folder).expanduser()
    if not (place / VOCABULARY).is_file():
        raise FileNotFoundError(f"{place} has no {VOCABULARY}, the numbers of characters")
    table = parse_object((place / VOCABULARY).read_bytes(), str(place / VOCABULARY))
    nested = bool(table) and all(isinstance(value, dict) for value in table.values())
    if nested and language not in table:
        raise ValueError(f"{VOCABULARY} has the languages {sorted(table)}; not {language!r}")
    if not nested and language is not None:
        raise ValueError(f"{VOCABULARY} has one vocabulary, and none for language={language!r}")
    own = table[language] if nested and language is not None else table
    assert isinstance(own, dict)
    settings: dict[str, object] = {}
    if (place / SETTINGS).is_file():
        settings = parse_object((place / SETTINGS).read_bytes(), str(place / SETTINGS))
    problems = []
    if settings.get("tokenizer_class", TOKENIZER) != TOKENIZER:
        problems.append(f"tokenizer_class={settings['tokenizer_class']!r} must be {TOKENIZER}")
    if sorted(map(str, own.values())) != sorted(map(str, range(len(own)))):
        problems.append(f"{VOCABULARY} must give the numbers 0 to {len(own) - 1}, each once")
    raise_problems(str(place), problems)

    def symbol(key: str, usual: str) -> str | None:
        value = settings.get(key, usual)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) and value in own else None

    symbols = tuple(sorted(own, key=lambda name: int(str(own[name]))))
    others = (symbol("bos_token", "<s>"), symbol("eos_token", "</s>"))
    return Characters(
        symbols,
        blank=symbol("pad_token", "<pad>") or "<pad>",
        delimiter=symbol("word_delimiter_token", "|") or "|",
        unknown=symbol("unk_token", "<unk>"),
        others=tuple(name for name in others if name is not None),
        upper=settings.get("do_lower_case") is True,
    )
