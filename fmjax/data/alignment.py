"""Labels of words on the tokens that a tokenizer makes of them, and predictions back on words."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from fmjax.data.columns import IGNORED_LABEL, NO_WORD, Columns, Ragged
from fmjax.data.files import raise_problems
from fmjax.data.tokens import check_vocabulary, fast_encodings, padding_id, parts
from fmjax.types import one_text

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Pieces = Literal["first", "all", "inside"]
PIECES = ("first", "all", "inside")


@dataclasses.dataclass(frozen=True, eq=False)
class AlignedWords:
    """N sentences as tokens that know their words.

    Attributes:
      columns: ``input_ids``, ``word_ids`` (-1 where a token is of no word), ``token_type_ids`` if
        the tokenizer makes them, and ``labels`` (-100 where a token has none), if there are any.
      label_names: the C classes in the order of their indices; () without labels.
      num_words: int64 [N].
      lost: int64 [N], words of each sentence that are behind max_length.
      dropped: int64 [N], words of which the tokenizer makes no token at all.
    """

    columns: Columns
    label_names: tuple[str, ...]
    num_words: np.ndarray
    lost: np.ndarray
    dropped: np.ndarray

    def __len__(self) -> int:
        return len(self.columns)

    @functools.cached_property
    def word_ids(self) -> list[np.ndarray]:
        """int32 [T] for each sentence."""
        return self.columns.ragged[0].rows("word_ids")

    def by_word(
        self, predictions: Sequence[np.ndarray], *, missing: int = NO_WORD
    ) -> list[np.ndarray]:
        """What was predicted for each word: at its first token.

        Args:
          predictions: N arrays [T] or longer (padding is ignored), of any dtype.
          missing: what a word without a token gets, whether it was cut off or dropped.

        Returns:
          N arrays [words].
        """
        found = []
        for words, rows, count in zip(self.word_ids, predictions, self.num_words, strict=True):
            starts = word_starts(words, int(count))
            found.append(np.where(starts >= 0, np.asarray(rows)[starts], missing))
        return found


def word_starts(word_ids: np.ndarray, count: int) -> np.ndarray:
    """int64 [count]: where each word's first token is; -1 for words without one.

    Args:
      word_ids: int [T], -1 for tokens of no word.
      count: words of the sentence.
    """
    starts = np.full(count, -1, np.int64)
    words, first = np.unique(word_ids, return_index=True)
    starts[words[words >= 0]] = first[words >= 0]
    return starts


def align_labels(
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[Sequence[str]],
    word_labels: Sequence[Sequence[str]] | Sequence[np.ndarray] | None = None,
    *,
    max_length: int,
    label_names: Sequence[str] | None = None,
    pieces: Pieces = "first",
    vocab_size: int | None = None,
) -> AlignedWords:
    """Tokenizes sentences that are split into words, and puts each word's label on its tokens.

    The words get the tokens that they would get in running text, with a space between them.

    Args:
      tokenizer: a fast one of `transformers`.
      words: N sentences.
      word_labels: as many for each, names or indices into `label_names`; None when there is only
        something to predict.
      max_length: of a sentence in tokens, special tokens included; what is behind is counted.
      label_names: the C classes in the order of their indices; by default those that appear, in
        alphabetical order. Give those of the training set when encoding any other.
      pieces: which tokens of a word carry its label: the "first", the others having -100; "all";
        or all, where those after the first of a word that begins a span ("B-PER") are "inside" it
        ("I-PER").
      vocab_size: of the model that is to read them.

    Raises:
      ValueError: everything wrong with the sentences, by number: none or no words, another number
        of labels than words, labels that are no class; and all that `encode` refuses.
    """
    special = tokenizer.num_special_tokens_to_add(pair=False)
    problems = one_text("words", words, rows=True)
    if word_labels is not None:
        problems += one_text("word_labels", word_labels, rows=True)
    if pieces not in PIECES:
        problems.append(f"pieces={pieces!r} is not one of {PIECES}")
    if max_length <= special:
        problems.append(f"max_length={max_length} leaves no room beside {special} special tokens")
    if word_labels is not None and len(word_labels) != len(words):
        problems.append(f"{len(words)} sentences and {len(word_labels)} rows of labels")
    problems += [f"sentence {n} has no words" for n, row in enumerate(words) if len(row) == 0]
    names, labels = _checked(words, word_labels, label_names, problems)
    raise_problems("align_labels", problems)

    after = _after_first(names, pieces)
    lead = _word_lead(tokenizer)
    rows: dict[str, list[np.ndarray]] = {"input_ids": [], "word_ids": []}
    lost, dropped = [], []
    for part in parts(len(words)):
        spaced = [[lead * (i > 0) + word for i, word in enumerate(row)] for row in words[part]]
        encoding = tokenizer(
            spaced,
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
        )
        for n, one in enumerate(fast_encodings(encoding), start=part.start):
            kept = _words(one)
            rows["input_ids"].append(np.array(one.ids, np.int32))
            rows["word_ids"].append(kept)
            if "token_type_ids" in encoding:
                rows.setdefault("token_type_ids", []).append(np.array(one.type_ids, np.int32))
            if word_labels is not None:
                rows.setdefault("labels", []).append(_on_tokens(kept, labels[n], after))
            behind = {word for rest in one.overflowing for word in _words(rest)} - {*kept, NO_WORD}
            lost.append(len(behind))
            dropped.append(len(words[n]) - len({*kept} - {NO_WORD}) - len(behind))
    empty = [n for n, row in enumerate(rows["input_ids"]) if len(row) == 0]
    raise_problems("align_labels", [f"sentence {n} has no tokens: {words[n]!r}" for n in empty])
    fill = {
        "input_ids": padding_id(tokenizer),
        "word_ids": NO_WORD,
        **({} if word_labels is None else {"labels": IGNORED_LABEL}),
    }
    tokens = Ragged.of(rows, max_length=max_length, fill=fill)
    check_vocabulary(tokens.values["input_ids"], tokens.offsets, vocab_size, words)
    return AlignedWords(
        columns=Columns((tokens,)),
        label_names=names,
        num_words=np.array([len(row) for row in words], np.int64),
        lost=np.array(lost, np.int64),
        dropped=np.array(dropped, np.int64),
    )


def _words(encoding: Encoding) -> np.ndarray:
    """int32 [T]: the number of each token's word, -1 for special tokens."""
    return np.array([NO_WORD if word is None else word for word in encoding.word_ids], np.int32)


def _checked(
    words: Sequence[Sequence[str]],
    word_labels: Sequence[Sequence[str]] | Sequence[np.ndarray] | None,
    label_names: Sequence[str] | None,
    problems: list[str],
) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """The classes and, for each sentence, the index of every word's; problems join the list."""
    if word_labels is None:
        return (), []
    found = {label for row in word_labels for label in row}
    numbers = {label for label in found if not isinstance(label, str)}
    if label_names is None and numbers:
        problems.append(f"labels such as {min(numbers)} are indices: give their label_names")
    names = tuple(sorted(found - numbers) if label_names is None else label_names)
    if len(set(names)) != len(names):
        problems.append(f"label_names {list(names)} name a class twice")
    index: dict[str | int, int] = {name: i for i, name in enumerate(names)}
    index |= {i: i for i in range(len(names))}
    rows = []
    for n, (sentence, labels) in enumerate(zip(words, word_labels, strict=False)):
        if len(sentence) != len(labels):
            problems.append(f"sentence {n}: {len(sentence)} words and {len(labels)} labels")
        if unknown := sorted({str(label) for label in labels if label not in index}):
            problems.append(f"sentence {n}: {unknown} are not among the labels {list(names)}")
        rows.append(np.array([index.get(label, -1) for label in labels], np.int32))
    return names, rows


def _after_first(names: tuple[str, ...], pieces: Pieces) -> np.ndarray:
    """int32 [C]: what the tokens after a word's first get, by the word's class."""
    if pieces == "first":
        return np.full(len(names), IGNORED_LABEL, np.int32)
    inside = {name: "I-" + name[2:] for name in names if name.startswith("B-")}
    carried = [inside.get(name, name) if pieces == "inside" else name for name in names]
    return np.array(
        [names.index(name if name in names else names[i]) for i, name in enumerate(carried)],
        np.int32,
    )


def _on_tokens(words: np.ndarray, labels: np.ndarray, after: np.ndarray) -> np.ndarray:
    """int32 [T]: the label of each token."""
    first = words != np.concatenate([[NO_WORD], words[:-1]])
    own = labels[words]  # the last word's at special tokens
    return np.where(words == NO_WORD, np.int32(IGNORED_LABEL), np.where(first, own, after[own]))


def _word_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """What must stand before a word so that it is tokenized as in running text: "" or a space.

    Byte-level tokenizers keep the space in the token, and see none between separate words.
    """

    def tokens(text: str | list[str]) -> list[int]:
        ids = tokenizer(text, is_split_into_words=isinstance(text, list), add_special_tokens=False)[
            "input_ids"
        ]
        return list(ids)  # pyright: ignore[reportArgumentType]

    text = tokens("a b")
    return " " if tokens(["a", "b"]) != text == tokens(["a", " b"]) else ""
