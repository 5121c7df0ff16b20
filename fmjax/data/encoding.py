"""Texts in, token ids out: for one text, a pair, a choice, a query, a source and its target."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np

from fmjax.data.columns import IGNORED_LABEL, NO_WORD, Columns, Ragged, join
from fmjax.data.examples import TextExamples
from fmjax.data.files import raise_problems
from fmjax.data.tokens import (
    check_vocabulary,
    fast_encodings,
    no_texts,
    padding_id,
    parts,
    quoted,
    special_id,
    word_ids_of,
)
from fmjax.types import one_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedText:
    """N tokenized examples of different lengths, stored without padding.

    Attributes:
      tokens: int32 [total], the token ids of all examples one after the other.
      offsets: int64 [N + 1]; example n is ``tokens[offsets[n]:offsets[n + 1]]``.
      max_length: tokens that an example may have, also the longest shape of a batch.
      token_type_ids: int32 [total], if the tokenizer makes them.
      labels: as in TextExamples.
      word_ids: int32 [total], the word of each token and -1 for special ones, if asked for.
      special_tokens_mask: int32 [total], 1 for special tokens, if asked for.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    max_length: int
    token_type_ids: np.ndarray | None = None
    labels: np.ndarray | None = None
    word_ids: np.ndarray | None = None
    special_tokens_mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N], in tokens."""
        return np.diff(self.offsets)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything a batch can depend on."""
        digest = hashlib.sha256()
        extra = [v for v in (self.word_ids, self.special_tokens_mask) if v is not None]
        for values in (self.tokens, self.offsets, self.token_type_ids, self.labels, *extra):
            if values is None:
                digest.update(b"none")
            else:
                digest.update(f"{values.dtype} {values.shape}".encode())
                digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()[:16]

    def columns(self, pad_id: int) -> Columns:
        """The same examples as columns.

        Args:
          pad_id: the token id of padding.
        """
        named = {
            "input_ids": self.tokens,
            "token_type_ids": self.token_type_ids,
            "word_ids": self.word_ids,
            "special_tokens_mask": self.special_tokens_mask,
        }
        part = Ragged(
            values={name: values for name, values in named.items() if values is not None},
            offsets=self.offsets,
            max_length=self.max_length,
            fill={"input_ids": pad_id} | _fills(named),
        )
        return Columns((part,), {} if self.labels is None else {"labels": self.labels})


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: TextExamples,
    *,
    max_length: int,
    vocab_size: int | None = None,
    word_ids: bool = False,
    special_tokens_mask: bool = False,
) -> EncodedText:
    """Tokenizes examples, with the tokenizer's special tokens, cut to `max_length` tokens.

    Args:
      tokenizer: of `transformers`. Pairs are cut at the end of the longer text first.
      examples: N texts or pairs of texts.
      max_length: in tokens, special tokens included.
      vocab_size: of the model that is to read them.
      word_ids: whether to number the words, for masking whole ones.
      special_tokens_mask: whether to mark special tokens, which are never masked.

    Raises:
      ValueError: a max_length that leaves no room for text, a text without any token, or a token
        id that the model's vocabulary does not have.
    """
    rows = tokenize(
        tokenizer,
        examples.texts,
        examples.text_pairs,
        max_length=max_length,
        word_ids=word_ids,
        special_tokens_mask=special_tokens_mask,
    )
    joined = {name: join(values) for name, values in rows.items()}
    encoded = EncodedText(
        tokens=joined["input_ids"],
        offsets=np.cumsum([0, *map(len, rows["input_ids"])], dtype=np.int64),
        max_length=max_length,
        token_type_ids=joined.get("token_type_ids"),
        labels=examples.labels,
        word_ids=joined.get("word_ids"),
        special_tokens_mask=joined.get("special_tokens_mask"),
    )
    check_vocabulary(encoded.tokens, encoded.offsets, vocab_size, examples.texts)
    return encoded


def encode_seq2seq(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    targets: Sequence[str] | None = None,
    *,
    max_length: int,
    max_target_length: int | None = None,
    vocab_size: int | None = None,
    eos_id: int | None = None,
    prefix: str = "",
) -> Columns:
    """Tokenizes sources for an encoder and targets for a decoder, each cut to its own length.

    A batch has ``input_ids`` and ``attention_mask`` int32 [B, S] and ``labels`` int32 [B, T],
    padded with -100. Labels end with the end token, and are not shifted: a task does that.

    Args:
      tokenizer: of `transformers`; targets are tokenized as its ``text_target``.
      sources: N texts.
      targets: N texts; None when there is only something to generate.
      max_length, max_target_length: in tokens, special tokens included; the same by default.
      vocab_size: of the model that is to read them.
      eos_id: the end token, by default the tokenizer's, or its separator where it has no end.
      prefix: put before each source, such as T5's "translate English to German: ".

    Raises:
      ValueError: different numbers of sources and targets, lengths that leave no room, texts
        without tokens, ids outside the model's vocabulary, or no end token.
    """
    problems = one_text("sources", sources) + one_text("targets", targets)
    if targets is not None and len(sources) != len(targets):
        problems.append(f"{len(sources)} sources and {len(targets)} targets")
    if max_target_length is not None and max_target_length < 2:
        problems.append(f"max_target_length={max_target_length} leaves no room for text")
    raise_problems("encode_seq2seq", problems)
    texts = [prefix + source for source in sources]
    inputs = tokenize(tokenizer, texts, max_length=max_length)
    encoder = Ragged.of(
        {"input_ids": inputs["input_ids"]},
        max_length=max_length,
        fill={"input_ids": padding_id(tokenizer)},
    )
    check_vocabulary(encoder.values["input_ids"], encoder.offsets, vocab_size, texts)
    if targets is None:
        return Columns((encoder,))
    decoder = encode_targets(
        tokenizer,
        targets,
        max_length=max_target_length or max_length,
        vocab_size=vocab_size,
        eos_id=eos_id,
    )
    return Columns((encoder, decoder))


def encode_targets(
    tokenizer: PreTrainedTokenizerBase,
    targets: Sequence[str],
    *,
    max_length: int,
    vocab_size: int | None = None,
    eos_id: int | None = None,
) -> Ragged:
    """What a decoder is to write, such as captions of pictures.

    A batch has ``labels`` int32 [B, T], padded with -100. They end with the end token, and are not
    shifted: a task does that.

    Args:
      tokenizer: of `transformers`; targets are tokenized as its ``text_target``.
      targets: N texts.
      max_length: in tokens, special tokens included.
      vocab_size: of the model that is to write them.
      eos_id: the end token, by default the tokenizer's, or its separator where it has no end.

    Raises:
      ValueError: texts without tokens, ids outside the model's vocabulary, or no end token.
    """
    raise_problems("encode_targets", one_text("targets", targets))
    named = tokenizer.special_tokens_map
    eos = special_id(tokenizer, "sep" if "eos_token" not in named else "eos", eos_id)
    rows = tokenize(tokenizer, targets, max_length=max_length, target=True)["input_ids"]
    special = {eos, *tokenizer.all_special_ids}
    ended = [
        row if _ended(row, eos, special) else np.append(row[: max_length - 1], eos) for row in rows
    ]
    decoder = Ragged.of(
        {"labels": ended}, max_length=max_length, fill={"labels": IGNORED_LABEL}, mask=None
    )
    check_vocabulary(decoder.values["labels"], decoder.offsets, vocab_size, targets)
    return decoder


def _ended(row: np.ndarray, eos: int, special: Set[int]) -> bool:
    """Whether the end is among the last special tokens: mBART has a language behind it."""
    return eos in itertools.takewhile(special.__contains__, row[::-1].tolist())


def encode_choices(
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[str],
    choices: Sequence[Sequence[str]],
    labels: Sequence[int] | np.ndarray | None = None,
    *,
    max_length: int,
    vocab_size: int | None = None,
) -> Columns:
    """Tokenizes each context with each of its N choices, for multiple choice.

    A batch has ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids`` int32 [B, N, T]
    and ``labels`` int32 [B].

    Args:
      tokenizer: of `transformers`.
      contexts: one text for each example.
      choices: N texts for each example.
      labels: which of the choices is right.
      max_length: of a context with a choice, in tokens; the longer of both is cut.
      vocab_size: of the model that is to read them.

    Raises:
      ValueError: every example without exactly N choices or with a label that is none of them,
        and all that `encode` refuses.
    """
    count = len(choices[0]) if len(choices) else 1
    problems = one_text("contexts", contexts) + one_text("choices", choices, rows=True)
    problems += [
        f"example {n}: {len(texts)} choices, the first example has {count}"
        for n, texts in enumerate(choices)
        if len(texts) != count
    ]
    for name, values in (("choices", choices), ("labels", labels)):
        if values is not None and len(values) != len(contexts):
            problems.append(f"{len(values)} {name} for {len(contexts)} contexts")
    problems += [
        f"example {n}: label {label} is none of {count} choices"
        for n, label in enumerate([] if labels is None else labels)
        if not 0 <= label < count
    ]
    raise_problems("encode_choices", problems)
    firsts = [context for context in contexts for _ in range(count)]
    seconds = [choice for texts in choices for choice in texts]
    part = _part(
        tokenizer, firsts, seconds, max_length=max_length, vocab_size=vocab_size, group=count
    )
    return Columns((part,), {} if labels is None else {"labels": np.asarray(labels, np.int32)})


def encode_retrieval(
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[str],
    passages: Sequence[str] | Sequence[Sequence[str]],
    *,
    max_query_length: int,
    max_passage_length: int,
    vocab_size: int | None = None,
) -> Columns:
    """Tokenizes queries and the passages that answer them, for contrastive training.

    A batch has ``query_input_ids`` and ``query_attention_mask`` int32 [B, S] and
    ``passage_input_ids`` and ``passage_attention_mask`` int32 [B, T], or [B, 1 + n, T] with n hard
    negatives behind the right passage; ``*_token_type_ids`` too, if the tokenizer makes them.

    Args:
      tokenizer: of `transformers`.
      queries: N texts.
      passages: N texts, or N lists of the right passage and n wrong ones.
      max_query_length, max_passage_length: in tokens, special tokens included.
      vocab_size: of the model that is to read them.

    Raises:
      ValueError: numbers that differ, and all that `encode` refuses.
    """
    lists = [[texts] if isinstance(texts, str) else list(texts) for texts in passages]
    several = any(not isinstance(texts, str) for texts in passages)
    count = len(lists[0]) if lists else 1
    problems = one_text("queries", queries) + one_text("passages", passages)
    problems += [
        f"example {n}: {len(texts)} passages, the first example has {count}"
        for n, texts in enumerate(lists)
        if len(texts) != count
    ]
    if len(lists) != len(queries):
        problems.append(f"{len(lists)} passages for {len(queries)} queries")
    raise_problems("encode_retrieval", problems)
    query = _part(
        tokenizer, queries, max_length=max_query_length, vocab_size=vocab_size, prefix="query_"
    )
    passage = _part(
        tokenizer,
        [text for texts in lists for text in texts],
        max_length=max_passage_length,
        vocab_size=vocab_size,
        prefix="passage_",
        group=count if several else None,
    )
    return Columns((query, passage))


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int,
    word_ids: bool = False,
    special_tokens_mask: bool = False,
    target: bool = False,
) -> dict[str, list[np.ndarray]]:
    """N rows int32 for each of input_ids, token_type_ids (if made) and what else is asked for.

    Raises:
      ValueError: a max_length that leaves no room for text, a text without any token, or what is
        no text.
    """
    special = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
    if max_length <= special:
        raise ValueError(
            f"max_length={max_length} leaves no room for text beside {special} special tokens"
        )
    rows: dict[str, list[np.ndarray]] = {"input_ids": []}
    for part in parts(len(texts)):
        first, second = list(texts[part]), None if pairs is None else list(pairs[part])
        raise_problems("texts", [*no_texts(first, part.start), *no_texts(second or (), part.start)])
        encoding = tokenizer(
            **({"text_target": first} if target else {"text": first, "text_pair": second}),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_special_tokens_mask=special_tokens_mask,
        )
        for name in ("input_ids", "token_type_ids", "special_tokens_mask"):
            if name in encoding:
                found: Any = encoding[name]
                rows.setdefault(name, []).extend(np.asarray(row, np.int32) for row in found)
        if word_ids:
            both = [[text] for text in first] if second is None else zip(first, second, strict=True)
            rows.setdefault("word_ids", []).extend(
                word_ids_of(one, own)
                for one, own in zip(fast_encodings(encoding), both, strict=True)
            )
    empty = [n for n, row in enumerate(rows["input_ids"]) if len(row) == 0]
    if empty:
        raise ValueError(
            f"{len(empty)} texts have no tokens, the first is example {empty[0]}: "
            f"{quoted(texts[empty[0]])}; remove them"
        )
    return rows


def _part(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int,
    vocab_size: int | None,
    prefix: str = "",
    group: int | None = None,
) -> Ragged:
    rows = tokenize(tokenizer, texts, pairs, max_length=max_length)
    part = Ragged.of(
        {prefix + name: values for name, values in rows.items()},
        max_length=max_length,
        fill={prefix + "input_ids": padding_id(tokenizer)},
        mask=prefix + "attention_mask",
        group=group,
    )
    check_vocabulary(part.values[prefix + "input_ids"], part.offsets, vocab_size, texts)
    return part


def _fills(named: dict[str, Any]) -> dict[str, int]:
    fills = {"word_ids": NO_WORD, "special_tokens_mask": 1}
    return {name: fill for name, fill in fills.items() if named.get(name) is not None}
