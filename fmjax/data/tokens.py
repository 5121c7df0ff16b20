"""What every encoding of texts asks of a tokenizer, and checks about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fmjax.data.columns import NO_WORD

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import BatchEncoding, PreTrainedTokenizerBase

TOKENIZED_AT_ONCE = 4096  # texts; bounds the memory that the tokenizer's own objects take


def parts(count: int) -> Iterator[slice]:
    """Slices that cover `count` texts, of as many as are tokenized at once."""
    for start in range(0, count, TOKENIZED_AT_ONCE):
        yield slice(start, min(start + TOKENIZED_AT_ONCE, count))


def no_texts(texts: Iterable[Any], first: int = 0) -> list[str]:
    """What is wrong with texts, a line each: tokenizers would not say of which.

    Args:
        texts: those to be tokenized.
        first: number of the first.
    """
    problems = []
    for number, text in enumerate(texts, first):
        if not isinstance(text, str):
            problems.append(f"example {number} is {quoted(text)}, a text was expected")
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problems.append(
                f"example {number}: {quoted(text)} has half a character at {error.start} (a lone "
                "surrogate); repair it, for instance text.encode(errors='replace').decode()"
            )
    return problems


def fast_encodings(encoding: BatchEncoding) -> list[Encoding]:
    """What the `tokenizers` library made of each text: words, offsets, special tokens.

    Raises:
      ValueError: the tokenizer is one of the slow ones, which know none of these.
    """
    if encoding.encodings is None:
        raise ValueError(
            "this tokenizer is written in Python and does not know which word or character a token "
            "comes from; load its fast variant (AutoTokenizer does) or convert it"
        )
    return encoding.encodings


def special_id(tokenizer: PreTrainedTokenizerBase, name: str, given: int | None = None) -> int:
    """A special token's id: the one given, else the tokenizer's own.

    Args:
      name: "pad", "eos", "cls", ...

    Raises:
      ValueError: the tokenizer has none.
    """
    if given is not None:
        return given
    token: Any = tokenizer.special_tokens_map.get(f"{name}_token")
    if token is None:
        raise ValueError(f"the tokenizer has no {name} token; pass {name}_id=")
    number: Any = tokenizer.convert_tokens_to_ids(str(token))
    return int(number)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad token; where it has none (GPT-2), its end, which a mask hides."""
    named = tokenizer.special_tokens_map
    return special_id(tokenizer, "pad" if named.get("pad_token") is not None else "eos")


def word_ids_of(encoding: Encoding, texts: Sequence[str]) -> np.ndarray:
    """int32 [T]: the number of the word that each token is of; -1 for special tokens.

    A word begins where the tokenizer's own begin and where white space ends: some tokenizers
    (SentencePiece ones without a splitter) take a whole text for one word.

    Args:
      encoding: of one text or pair.
      texts: that text, or both.
    """
    at = [_words_by_character(text) for text in texts]
    words, number, last = np.full(len(encoding), NO_WORD, np.int32), NO_WORD, None
    for place, (word, sequence, (start, end)) in enumerate(
        zip(encoding.word_ids, encoding.sequence_ids, encoding.offsets, strict=True)
    ):
        if sequence is None:
            last = None
            continue
        # The last character: the first may be the space before the word.
        this = (sequence, word, at[sequence][max(start, end - 1)])
        number += this != last
        words[place], last = number, this
    return words


def _words_by_character(text: str) -> list[int]:
    """For each character the word that it is in or, of a space, the word after it."""
    found, number, inside = [], 0, False
    for character in text:
        if character.isspace():
            number += inside
            inside = False
        else:
            inside = True
        found.append(number)
    return [*found, number]


def check_vocabulary(
    tokens: np.ndarray, offsets: np.ndarray, vocab_size: int | None, texts: Sequence[Any]
) -> None:
    """Raises a ValueError that names the first token id a model does not have.

    Args:
      tokens: int [total].
      offsets: int [N + 1], of the examples in them.
      vocab_size: the model's; None checks nothing.
      texts: N, to be quoted.
    """
    if vocab_size is None or not len(tokens) or tokens.max() < vocab_size:
        return
    first = int(np.argmax(tokens >= vocab_size))
    example = int(np.searchsorted(offsets, first, side="right")) - 1
    raise ValueError(
        f"token id {tokens[first]} (example {example}: {quoted(texts[example])}) is outside the "
        f"model's vocabulary of {vocab_size}; use the tokenizer of the model"
    )


def quoted(text: Any) -> str:
    """A text as an error shows it: its beginning."""
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:76] + " ..."
