"""Documents in, batches for language modelling out: packed rows, or one text cut into rows."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from fmjax.data.batches import BatchStream, Planned, check_options
from fmjax.data.columns import Columns, Ragged, join, update
from fmjax.data.corruption import Corruption, corrupted_batch, corruption_identity
from fmjax.data.files import raise_problems
from fmjax.data.packing import Layout, Packer, concatenated, cut, language_batch
from fmjax.data.tokens import check_vocabulary, parts, special_id
from fmjax.types import one_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Packing = Literal["documents", "concatenated"]
PACKINGS = ("documents", "concatenated")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenDocuments:
    """N documents as token ids, one after the other.

    Attributes:
      tokens: int32 [total]; may be a `numpy.memmap`.
      offsets: int64 [N + 1]; document n is ``tokens[offsets[n]:offsets[n + 1]]``, never empty.
      num_bytes: of all documents in UTF-8, what bits per byte are counted by.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and of where documents begin."""
        digest = hashlib.sha256()
        update(digest, {"tokens": self.tokens, "offsets": self.offsets})
        return digest.hexdigest()[:16]

    def cut(self, length: int, pad_id: int) -> Columns:
        """Pieces of at most `length` tokens as examples of their own, to be batched by length.

        Args:
          length: T.
          pad_id: the token id of padding.
        """
        _, sizes = cut(self.offsets, length)  # in the order of the tokens
        part = Ragged(
            {"input_ids": self.tokens},
            np.cumsum([0, *sizes], dtype=np.int64),
            max_length=length,
            fill={"input_ids": pad_id},
        )
        return Columns((part,))


def encode_documents(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    vocab_size: int | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
    end: bool = True,
) -> TokenDocuments:
    """Tokenizes whole documents, however long, without cutting them.

    Args:
      tokenizer: of `transformers`; its own special tokens are not added.
      texts: documents; those without any token (empty lines) are left out.
      vocab_size: of the model that is to read them.
      bos_id: put before each document; nothing is by default.
      eos_id: put after each document, by default the tokenizer's end token.
      end: whether anything is put there.

    Raises:
      ValueError: one text, no document that has a token, a token id outside the model's
        vocabulary, or no end token.
    """
    raise_problems("encode_documents", one_text("texts", texts))
    before = [] if bos_id is None else [bos_id]
    after = [special_id(tokenizer, "eos", eos_id)] if end else []
    documents = tokenize_documents(tokenizer, texts, before, after, vocab_size=vocab_size)
    if not len(documents):
        raise ValueError(f"none of {len(texts)} documents has a token; there is nothing to learn")
    return documents


def tokenize_documents(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    before: Sequence[int],
    after: Sequence[int],
    *,
    vocab_size: int | None = None,
) -> TokenDocuments:
    """As `encode_documents`, where none may have a token: ids to put before and after each.

    Raises:
      ValueError: a token id outside the model's vocabulary.
    """
    rows, kept = [], []
    for part in parts(len(texts)):
        for n, ids in enumerate(plain_tokens(tokenizer, texts[part]), start=part.start):
            if len(ids):
                rows.append(np.concatenate([before, ids, after]).astype(np.int32))
                kept.append(texts[n])
    documents = TokenDocuments(
        tokens=join(rows),
        offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        num_bytes=sum(len(text.encode("utf-8", "surrogatepass")) for text in kept),
    )
    check_vocabulary(documents.tokens, documents.offsets, vocab_size, kept)
    return documents


def plain_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 [T] for each text: its tokens, without special ones and however many there are."""
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # it would warn of texts longer than the model, which are meant to be
    )
    rows = encoding["input_ids"]
    return [np.asarray(row, np.int32) for row in rows]  # pyright: ignore[reportGeneralTypeIssues]


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """Which rows of which epoch make batch k."""

    documents: TokenDocuments
    packer: Packer | None  # None where documents are one text
    length: int
    batch_size: int
    seed: int
    shuffle: bool
    total: int

    def __len__(self) -> int:
        return self.total

    @functools.cached_property
    def num_rows(self) -> int:
        if self.packer is not None:
            return len(self.packer)
        return -(-int(self.documents.offsets[-1]) // self.length)

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __getitem__(self, index: int) -> Planned:
        first = index % self.batches_per_epoch * self.batch_size
        rows = np.arange(first, first + self.batch_size)
        return Planned(index, (self.length,), np.where(rows < self.num_rows, rows, -1))

    def layout(self, number: int) -> Layout:
        """The rows of the epoch of batch `number`."""
        return self._epoch(number // self.batches_per_epoch if self.shuffle else 0)

    @functools.cached_property
    def _epoch(self) -> functools._lru_cache_wrapper[Layout]:
        return functools.lru_cache(maxsize=2)(self._layout)

    def _layout(self, epoch: int) -> Layout:
        rng = np.random.default_rng([self.seed, epoch]) if self.shuffle else None
        if self.packer is not None:
            return self.packer.layout(rng)
        return concatenated(self.documents.offsets, self.length, rng)


def language_batches(
    documents: TokenDocuments,
    *,
    length: int,
    batch_size: int,
    pad_id: int,
    packing: Packing = "documents",
    corruption: Corruption | None = None,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 4,
) -> BatchStream:
    """A stream of rows of T tokens in which every token of every document appears once an epoch.

    A batch has ``input_ids`` and ``attention_mask`` int32 [B, T], ``weight`` and ``index``, the row
    of the epoch; and of packed documents ``segment_ids`` int32 [B, T], numbered from 1 in each row
    and 0 for padding: tokens are to see only those of their own segment. There are no ``labels``:
    they are the tokens themselves.

    Args:
      documents: from `encode_documents`.
      length: T.
      batch_size: rows of a global batch, over all processes.
      pad_id: the token id of padding.
      packing: whether rows hold whole "documents" (which are cut only where longer than a row) or
        the pieces of all of them "concatenated", which see each other.
      corruption: what makes inputs and targets of a row (`SpanCorruption`); a batch then has
        ``input_ids``, ``attention_mask`` [B, S] and ``labels`` [B, T].
      seed, epochs, process_index, process_count, prefetch: as in `batches`.
      shuffle: False for evaluation: every epoch has the same rows in the same order.

    Raises:
      ValueError: a number out of its range, no documents, or what a corruption refuses.
    """
    problems = check_options(
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        process_index=process_index,
        process_count=process_count,
        prefetch=prefetch,
    )
    if packing not in PACKINGS:
        problems.append(f"packing={packing!r} is not one of {PACKINGS}")
    if length < 2:
        problems.append(f"length={length} must be at least 2, for a token and the next")
    if not len(documents):
        problems.append("there are no documents")
    if problems:
        raise ValueError("; ".join(problems))
    rows = _Rows(
        documents=documents,
        packer=Packer.of(documents.offsets, length) if packing == "documents" else None,
        length=length,
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        total=sys.maxsize,
    )
    if epochs is not None:
        rows = dataclasses.replace(rows, total=epochs * rows.batches_per_epoch)

    def assemble(planned: Planned, mine: slice) -> dict[str, np.ndarray]:
        layout, own = rows.layout(planned.number), planned.rows[mine]
        if corruption is None:
            return language_batch(
                [layout.pieces(documents.tokens, row) if row >= 0 else () for row in own],
                own,
                length=length,
                pad_id=pad_id,
                separate=packing == "documents",
            )
        return corrupted_batch(
            corruption,
            lambda row: np.concatenate(layout.pieces(documents.tokens, row)),
            planned.number,
            planned.rows,
            mine,
            length=length,
            seed=seed,
        )

    lengths = (length,) if corruption is None else corruption.lengths(length)
    return BatchStream(
        rows,
        assemble,
        shapes=[(batch_size // process_count, *lengths)],
        identity={
            "data": documents.fingerprint,
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
            "length": length,
            "packing": packing,
            "pad_id": pad_id,
            **corruption_identity(corruption),
        },
        process_index=process_index,
        process_count=process_count,
        prefetch=prefetch,
    )
