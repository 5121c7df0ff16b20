"""Pairs of segments for pretraining: is the second the next one, or are they in order?

A document is a list of sentences; a segment is some sentences in a row. All is drawn by (seed,
epoch): each epoch cuts and pairs the documents anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fmjax.data.columns import NO_WORD, Columns, Ragged, join
from fmjax.data.tokens import check_vocabulary, fast_encodings, parts, special_id, word_ids_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = 3  # [CLS] first [SEP] second [SEP]


@dataclasses.dataclass(frozen=True, eq=False)
class SentenceDocuments:
    """N documents of S sentences as token ids.

    Attributes:
      tokens: int32 [total], of all sentences one after the other, without special tokens.
      word_ids: int32 [total], the words of all sentences numbered through.
      sentences: int64 [S + 1]; sentence s is ``tokens[sentences[s]:sentences[s + 1]]``.
      documents: int64 [N + 1]; document n has the sentences ``documents[n]`` to
        ``documents[n + 1] - 1``, at least one.
      cls_id, sep_id, pad_id: of the tokenizer.
    """

    tokens: np.ndarray
    word_ids: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    cls_id: int
    sep_id: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.documents) - 1


def encode_sentences(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Sequence[str]],
    *,
    vocab_size: int | None = None,
) -> SentenceDocuments:
    """Tokenizes documents sentence by sentence.

    Args:
      tokenizer: a fast one of `transformers`, with a class and a separator token.
      documents: the sentences of each; sentences without a token, and documents without any
        sentence, are left out.
      vocab_size: of the model that is to read them.

    Raises:
      ValueError: no sentence has a token, a token id outside the model's vocabulary, or a special
        token that the tokenizer lacks.
    """
    texts = [sentence for document in documents for sentence in document]
    owners = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    rows: list[np.ndarray] = []
    words: list[np.ndarray] = []
    kept: list[int] = []
    count = 0
    for part in parts(len(texts)):
        encoding = tokenizer(
            texts[part], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        for n, one in enumerate(fast_encodings(encoding), start=part.start):
            if not len(one):
                continue
            numbers = word_ids_of(one, [texts[n]]) + count
            count = int(numbers[-1]) + 1
            rows.append(np.array(one.ids, np.int32))
            words.append(numbers)
            kept.append(n)
    if not rows:
        raise ValueError(f"none of {len(texts)} sentences has a token; there is nothing to learn")
    tokens, sentences = join(rows), np.cumsum([0, *map(len, rows)], dtype=np.int64)
    check_vocabulary(tokens, sentences, vocab_size, [texts[n] for n in kept])
    _, firsts = np.unique(owners[kept], return_index=True)
    return SentenceDocuments(
        tokens=tokens,
        word_ids=join(words),
        sentences=sentences,
        documents=np.append(firsts, len(rows)).astype(np.int64),
        cls_id=special_id(tokenizer, "cls"),
        sep_id=special_id(tokenizer, "sep"),
        pad_id=special_id(tokenizer, "pad"),
    )


class _Pair(NamedTuple):
    """Two segments as slices of the tokens, and the pair's label."""

    first: slice
    second: slice
    label: int


def next_sentence_pairs(
    documents: SentenceDocuments,
    *,
    max_length: int,
    seed: int = 0,
    epoch: int = 0,
    copies: int = 1,
    short: float = 0.1,
) -> Columns:
    """Pairs of which half are neighbours and half are not: BERT's next-sentence prediction.

    Devlin et al. 2019, arXiv:1810.04805, appendix A.2. Sentences of a document are gathered until
    they fill a row, and are split between two of them; in half of the pairs, and wherever only one
    sentence was left, the second segment is taken from another document instead, and what stood
    there comes first in the next pair. What is too long loses tokens from either end of the longer
    segment.

    A batch has ``input_ids``, ``attention_mask``, ``token_type_ids`` (1 in the second segment),
    ``special_tokens_mask`` and ``word_ids`` int32 [B, T], and ``next_sentence_label`` int32 [B],
    1 where the second segment is not the next.

    Args:
      documents: at least two, from `encode_sentences`.
      max_length: T, of a pair with its three special tokens.
      seed, epoch: what is drawn depends on them alone.
      copies: epochs put together, ``epoch`` and those after it: BERT's ten readings of the data.
      short: share of the pairs that is made shorter, of a length drawn from 2 on.

    Raises:
      ValueError: fewer than two documents, or settings out of their range.
    """
    problems = _settings(max_length, seed, epoch, copies, short)
    if len(documents) < 2:
        problems.append(f"{len(documents)} documents: one is needed beside that of each pair")
    if problems:
        raise ValueError("; ".join(problems))
    pairs: list[_Pair] = []
    for number in range(epoch, epoch + copies):
        rng = np.random.default_rng([seed, number])
        for document in range(len(documents)):
            pairs += _next_or_not(documents, document, rng, max_length - SPECIAL, short)
    return _columns(documents, pairs, max_length, "next_sentence_label")


def sentence_order_pairs(
    documents: SentenceDocuments,
    *,
    max_length: int,
    seed: int = 0,
    epoch: int = 0,
    copies: int = 1,
    short: float = 0.1,
) -> Columns:
    """Pairs of neighbours, half of them swapped: ALBERT's sentence-order prediction.

    Lan et al. 2020, arXiv:1909.11942, section 3.1. As `next_sentence_pairs`, but both segments are
    always from one place of one document; a document of one sentence makes no pair. The label is
    ``sentence_order_label`` int32 [B], 1 where the later segment comes first.

    Args:
      documents: from `encode_sentences`.
      max_length, seed, epoch, copies, short: as in `next_sentence_pairs`.

    Raises:
      ValueError: no document has two sentences, or settings out of their range.
    """
    problems = _settings(max_length, seed, epoch, copies, short)
    if (np.diff(documents.documents) < 2).all():
        problems.append("no document has two sentences; split the texts into sentences")
    if problems:
        raise ValueError("; ".join(problems))
    pairs: list[_Pair] = []
    for number in range(epoch, epoch + copies):
        rng = np.random.default_rng([seed, number])
        for document in range(len(documents)):
            pairs += _in_order_or_not(documents, document, rng, max_length - SPECIAL, short)
    return _columns(documents, pairs, max_length, "sentence_order_label")


def _settings(max_length: int, seed: int, epoch: int, copies: int, short: float) -> list[str]:
    problems = [
        f"{name}={value} must be at least {least}"
        for name, value, least in [
            ("max_length", max_length, SPECIAL + 2),
            ("seed", seed, 0),
            ("epoch", epoch, 0),
            ("copies", copies, 1),
        ]
        if value < least
    ]
    if not 0 <= short <= 1:
        problems.append(f"short={short} must be in [0, 1]")
    return problems


def _target(rng: np.random.Generator, most: int, short: float) -> int:
    """Tokens to gather for a pair: mostly all that fit, as a model is used with long texts too."""
    return int(rng.integers(2, most + 1)) if rng.random() < short else most


def _upto(data: SentenceDocuments, start: int, last: int, target: int) -> int:
    """Sentences `start`, ... are `target` tokens before the one returned, or all up to `last`."""
    enough = np.searchsorted(data.sentences, data.sentences[start] + target)
    return int(np.clip(enough, start + 1, last))


def _tokens(data: SentenceDocuments, start: int, end: int) -> slice:
    return slice(int(data.sentences[start]), int(data.sentences[end]))


def _next_or_not(
    data: SentenceDocuments, document: int, rng: np.random.Generator, most: int, short: float
) -> Iterator[_Pair]:
    start, last = data.documents[document : document + 2].tolist()
    while start < last:
        target = _target(rng, most, short)
        end = _upto(data, start, last, target)
        single = end - start == 1
        split = end if single else start + int(rng.integers(1, end - start))
        first = _tokens(data, start, split)
        if single or rng.random() < 0.5:
            other = int(rng.integers(len(data) - 1))
            other += other >= document
            begin, behind = data.documents[other : other + 2].tolist()
            begin = int(rng.integers(begin, behind))
            wanted = max(1, target - (first.stop - first.start))
            second = _tokens(data, begin, _upto(data, begin, behind, wanted))
            yield _Pair(*_truncate(first, second, most, rng), label=1)
            start = split
        else:
            yield _Pair(*_truncate(first, _tokens(data, split, end), most, rng), label=0)
            start = end


def _in_order_or_not(
    data: SentenceDocuments, document: int, rng: np.random.Generator, most: int, short: float
) -> Iterator[_Pair]:
    start, last = data.documents[document : document + 2].tolist()
    while start + 1 < last:
        end = max(_upto(data, start, last, _target(rng, most, short)), start + 2)
        if end + 1 == last:
            end = last  # no pair could be made of a single one
        split = start + int(rng.integers(1, end - start))
        pair = _truncate(_tokens(data, start, split), _tokens(data, split, end), most, rng)
        swapped = int(rng.random() < 0.5)
        yield _Pair(pair[swapped], pair[1 - swapped], swapped)
        start = end


def _truncate(
    first: slice, second: slice, most: int, rng: np.random.Generator
) -> tuple[slice, slice]:
    """Both cut to `most` tokens together, token by token from the longer, at either end."""
    sizes = [part.stop - part.start for part in (first, second)]
    if sum(sizes) <= most:
        return first, second
    right = min(sizes[1], max(most // 2, most - sizes[0]))
    left = min(sizes[0], most - right)
    cut = []
    for part, size, kept in zip((first, second), sizes, (left, right), strict=True):
        front = int(rng.binomial(size - kept, 0.5))
        cut.append(slice(part.start + front, part.start + front + kept))
    return cut[0], cut[1]


def _columns(
    data: SentenceDocuments, pairs: Sequence[_Pair], max_length: int, label: str
) -> Columns:
    rows: dict[str, list[np.ndarray]] = {
        name: [] for name in ("input_ids", "token_type_ids", "special_tokens_mask", "word_ids")
    }
    for first, second, _ in pairs:
        sizes = first.stop - first.start, second.stop - second.start
        special = np.zeros(sum(sizes) + SPECIAL, np.int32)
        special[[0, sizes[0] + 1, -1]] = 1
        rows["special_tokens_mask"].append(special)
        kinds = np.array([0, 1], np.int32)
        rows["token_type_ids"].append(np.repeat(kinds, [sizes[0] + 2, sizes[1] + 1]))
        ids = [[data.cls_id], data.tokens[first], [data.sep_id], data.tokens[second], [data.sep_id]]
        rows["input_ids"].append(np.concatenate(ids).astype(np.int32))
        before, after = data.word_ids[first], data.word_ids[second]
        before = before - before[0]
        none = [NO_WORD]
        words = [none, before, none, after - after[0] + before[-1] + 1, none]
        rows["word_ids"].append(np.concatenate(words).astype(np.int32))
    fill = {"input_ids": data.pad_id, "special_tokens_mask": 1, "word_ids": NO_WORD}
    part = Ragged.of(rows, max_length=max_length, fill=fill)
    return Columns((part,), {label: np.array([pair.label for pair in pairs], np.int32)})
