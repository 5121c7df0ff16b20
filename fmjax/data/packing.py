"""Documents in rows of one length: packed without sharing attention, or as one text.

Packed rows hold whole documents; those longer than a row are cut. In the other way, GPT-2's, all
documents are one text, which is cut wherever a row is full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Which pieces of a long array of tokens make each row.

    Attributes:
      starts, sizes: int64 [P]: the pieces, in the order of rows and of places in them.
      rows: int64 [R + 1]: row r is made of the pieces ``rows[r]:rows[r + 1]``.
    """

    starts: np.ndarray
    sizes: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows) - 1

    def pieces(self, tokens: np.ndarray, row: int) -> list[np.ndarray]:
        """The pieces of one row, as parts of all tokens."""
        at = slice(self.rows[row], self.rows[row + 1])
        pairs = zip(self.starts[at].tolist(), self.sizes[at].tolist(), strict=True)
        return [tokens[start : start + size] for start, size in pairs]


def cut(offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes) int64 [P] of documents cut into pieces of at most `length` tokens.

    Args:
      offsets: int64 [N + 1], of the documents.
      length: T.
    """
    sizes = np.diff(offsets)
    count = -(-sizes // length)  # [N]
    document = np.repeat(np.arange(len(sizes)), count)  # [P]
    within = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    starts = offsets[document] + within * length
    return starts, np.minimum(length, offsets[document + 1] - starts)


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """int64 [P]: the row of each piece, packed by best-fit decreasing (Johnson 1973).

    The longest piece that has no row yet goes to the row that it fills best, or to a new one. The
    number of rows is within 11/9 of the least possible, and in practice almost the least.

    Args:
      sizes: int [P], decreasing, from 1 to `length`.
      length: T.
    """
    row_of = np.zeros(len(sizes), np.int64)
    room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room they have left
    having = 0  # bit r is set where some row has room for r more tokens
    count = 0
    for piece, size in enumerate(sizes.tolist()):
        if fitting := having >> size:
            left = size + (fitting & -fitting).bit_length() - 1
            row = room[left].pop()
            if not room[left]:
                having ^= 1 << left
            left -= size
        else:
            row, count, left = count, count + 1, length - size
        row_of[piece] = row
        if left:
            room[left].append(row)
            having |= 1 << left
    return row_of


@dataclasses.dataclass(frozen=True, eq=False)
class Packer:
    """The rows of packed documents, drawn anew for each epoch.

    Which sizes share a row is decided once, from the sizes alone; which documents of these sizes
    they are, and the order of everything, is drawn. So every epoch has the same number of rows.

    Attributes:
      starts, sizes: int64 [P]: pieces of documents by decreasing size.
      row_of: int64 [P]: the row of the piece of each size.
    """

    starts: np.ndarray
    sizes: np.ndarray
    row_of: np.ndarray

    @classmethod
    def of(cls, offsets: np.ndarray, length: int) -> Packer:
        """For documents of the given offsets [N + 1] and rows of T tokens."""
        starts, sizes = cut(offsets, length)
        order = np.argsort(-sizes, kind="stable")
        sizes = sizes[order]
        return cls(starts[order], sizes, best_fit(sizes, length))

    def __len__(self) -> int:
        """Rows."""
        return int(self.row_of.max(initial=-1)) + 1

    def layout(self, rng: np.random.Generator | None) -> Layout:
        """The rows of an epoch; None for those of the longest documents first."""
        if rng is None:
            starts, row_of, within = self.starts, self.row_of, np.arange(len(self.starts))
        else:
            # Any piece may take the place of any other of its size.
            starts = self.starts[np.lexsort((rng.random(len(self.sizes)), -self.sizes))]
            row_of = rng.permutation(len(self))[self.row_of]
            within = rng.random(len(self.sizes))
        order = np.lexsort((within, row_of))  # [P]
        bounds = np.searchsorted(row_of[order], np.arange(len(self) + 1))
        return Layout(starts[order], self.sizes[order], bounds)


def concatenated(offsets: np.ndarray, length: int, rng: np.random.Generator | None) -> Layout:
    """The rows of all documents as one text, cut every `length` tokens; the last may be shorter.

    Args:
      offsets: int64 [N + 1], of the documents.
      length: T.
      rng: of the documents' order and the rows'; None for the order of the data.
    """
    sizes = np.diff(offsets)
    order = np.arange(len(sizes)) if rng is None else rng.permutation(len(sizes))
    total = int(offsets[-1])
    ends = np.cumsum(sizes[order])  # where each document ends in the text
    begins = np.unique(np.concatenate([ends - sizes[order], np.arange(0, total, length)]))  # [P]
    document = np.searchsorted(ends, begins, side="right")
    starts = offsets[order[document]] + begins - (ends - sizes[order])[document]
    pieces = np.diff(begins, append=total)
    bounds = np.append(np.searchsorted(begins, np.arange(0, total, length)), len(begins))
    layout = Layout(starts, pieces, bounds)
    return layout if rng is None else reorder(layout, rng.permutation(len(layout)))


def reorder(layout: Layout, order: np.ndarray) -> Layout:
    """The same rows in another order."""
    counts = np.diff(layout.rows)[order]
    bounds = np.cumsum([0, *counts], dtype=np.int64)
    at = np.arange(bounds[-1]) + np.repeat(layout.rows[order] - bounds[:-1], counts)
    return Layout(layout.starts[at], layout.sizes[at], bounds)


def language_batch(
    rows: Sequence[Sequence[np.ndarray]],
    index: np.ndarray,
    *,
    length: int,
    pad_id: int,
    separate: bool,
) -> dict[str, np.ndarray]:
    """One batch, as `fmjax.data.language.language_batches` describes it.

    Args:
      rows: B times the pieces of a row; () for padding rows.
      index: int [B], the numbers of the rows; -1 for padding rows.
      length: T.
      pad_id: the token id of padding.
      separate: whether each piece is a segment of its own. Where all of a row are one text there
        are no ``segment_ids``: attention is then plainly causal, and faster.
    """
    ids = np.full((len(rows), length), pad_id, np.int32)  # [B, T]
    segments = np.zeros_like(ids)
    for place, pieces in enumerate(rows):
        at = 0
        for number, piece in enumerate(pieces, start=1):
            ids[place, at : at + len(piece)] = piece
            segments[place, at : at + len(piece)] = number
            at += len(piece)
    mask = (segments > 0).astype(np.int32)  # [B, T]
    mask[index < 0, 0] = 1  # a softmax over nothing would be NaN
    return {
        "input_ids": ids,
        "attention_mask": mask,
        **({"segment_ids": segments} if separate else {}),
        "weight": (index >= 0).astype(np.float32),
        "index": index.astype(np.int32),
    }
