"""A byte n-gram model: what any neural language model must beat, whatever its tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MAX_ORDER = 8  # bytes that fit into a 64-bit key


class _Table(NamedTuple):
    """Counts of one context length k.

    Args:
        grams: uint64 [U], the k + 1 bytes seen, increasing.
        counts: int64 [U], how often.
        contexts: uint64 [C], their first k bytes, increasing.
        totals: int64 [C], how often anything followed.
        kinds: int64 [C], how many different bytes followed.
    """

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray


@dataclasses.dataclass(frozen=True)
class ByteNgram:
    """Interpolated Witten-Bell smoothing (Witten & Bell 1991, IEEE Trans. Inf. Theory 37, method
    C; Chen & Goodman 1998, section 2.4): the longer context counts by how often it was seen,
    the shorter one by how many different bytes followed it.

    Made by `fit_ngram`.
    """

    tables: tuple[_Table, ...]

    def nats(self, text: bytes) -> np.ndarray:
        """Negative log-probability of each byte given those before it: float64 [N], in nats."""
        data = np.frombuffer(text, np.uint8)
        probability = np.full(len(data), 1 / 256)
        for k, table in enumerate(self.tables):
            if len(data) <= k:
                break
            grams = _windows(data, k + 1)  # of the bytes from number k on
            shorter = probability[k:]
            total, at = _find(table.contexts, grams >> np.uint64(8))
            seen, gram = _find(table.grams, grams)
            kinds = np.where(total, table.kinds[at], 0)
            count = np.where(seen, table.counts[gram], 0)
            known = kinds > 0
            mixed = (count + kinds * shorter) / np.where(known, table.totals[at] + kinds, 1)
            probability[k:] = np.where(known, mixed, shorter)
        return -np.log(probability)

    def scorer(self, *, weight: float = 0.5, bonus: float = 0.0) -> Callable[[str, str], float]:
        """What a search over prefixes (`fmjax.generate.ctc.prefix_beam`) asks for each character.

        Args:
            weight: of its log-probability after those before it.
            bonus: of each character, against too short transcripts.
        """

        @functools.lru_cache(maxsize=2**16)
        def nats(context: bytes, piece: bytes) -> float:
            return float(self.nats(context + piece)[len(context) :].sum())

        def score(text: str, piece: str) -> float:
            if piece == "":
                return 0.0
            context = text.encode()[-len(self.tables) :]  # longer ones have no say
            return bonus - weight * nats(context, piece.encode())

        return score


def fit_ngram(text: bytes, order: int = 6) -> ByteNgram:
    """Counts all n-grams up to `order` bytes.

    Args:
        text: the training text.
        order: n, from 1 to 8.

    Raises:
        ValueError: no text, or an order out of range.
    """
    if not 1 <= order <= MAX_ORDER or len(text) < order:
        raise ValueError(
            f"order={order} must be from 1 to {MAX_ORDER} and the text, of {len(text)} bytes, at "
            "least as long"
        )
    data = np.frombuffer(text, np.uint8)
    tables = []
    for k in range(order):
        grams, counts = np.unique(_windows(data, k + 1), return_counts=True)
        contexts, first, kinds = np.unique(
            grams >> np.uint64(8), return_index=True, return_counts=True
        )
        totals = np.add.reduceat(counts, first)
        tables.append(_Table(grams, counts, contexts, totals, kinds))
    return ByteNgram(tuple(tables))


def _windows(data: np.ndarray, size: int) -> np.ndarray:
    """Every `size` bytes in a row as one number: uint64 [N - size + 1]."""
    count = len(data) - size + 1
    packed = np.zeros(count, np.uint64)
    for i in range(size):
        packed = (packed << np.uint64(8)) | data[i : i + count].astype(np.uint64)
    return packed


def _find(sorted_keys: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(whether each key is there, where)."""
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[at] == keys, at
