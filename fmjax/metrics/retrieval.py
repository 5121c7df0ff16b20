"""Retrieval metrics: where the right documents stand when all are ranked by their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

Relevant = Sequence[Sequence[int]] | Sequence[Mapping[int, float]]
"""For each query the documents that are right, or their grades (larger is better, above 0)."""


def ranks_of(
    queries: ArrayLike, corpus: ArrayLike, relevant: Relevant, *, chunk_size: int = 16384
) -> list[np.ndarray]:
    """The rank of every right document among all, by the dot product of vectors; 1 is the best.

    Exact, without a sort and without the scores of all pairs at one time. Documents that score
    alike are ranked in the corpus's order.

    Args:
      queries: [Q, D].
      corpus: [N, D].
      relevant: for each query at least one document.
      chunk_size: documents compared at one time.

    Returns:
      Q arrays int64, in the order of `relevant`.

    Raises:
      ValueError: shapes that do not match, queries without a right document, documents that the
        corpus does not have, vectors that are not finite.
    """
    queries, corpus = np.asarray(queries, np.float32), np.asarray(corpus, np.float32)
    wanted = [np.array(list(documents), np.int64) for documents in relevant]
    _check(queries, corpus, wanted, chunk_size)
    owner = np.repeat(np.arange(len(wanted)), [len(documents) for documents in wanted])  # [P]
    document = np.concatenate(wanted)  # [P]
    ranks = np.ones(len(document), np.int64)
    scores = np.zeros(len(document), np.float32)
    starts = range(0, len(corpus), chunk_size)
    for count in (False, True):  # the right documents' scores first, then what is above them
        for start in starts:
            part = slice(start, min(start + chunk_size, len(corpus)))
            for first in range(0, len(queries), 1024):
                rows = slice(*np.searchsorted(owner, (first, first + 1024)))  # pairs
                block = queries[first : first + 1024] @ corpus[part].T  # [1024, chunk]
                if not count:
                    here = np.flatnonzero((document[rows] // chunk_size) == start // chunk_size)
                    at = rows.start + here
                    scores[at] = block[owner[at] - first, document[at] - start]
                    continue
                for pair in range(rows.start, rows.stop):
                    row, own = block[owner[pair] - first], scores[pair]
                    at = document[pair] - start
                    if 0 <= at < len(row):
                        row[at] = own  # so that rounding does not put it above itself
                    ranks[pair] += np.count_nonzero(row > own)
                    ranks[pair] += np.count_nonzero(row[: max(at, 0)] == own)  # those before it
    return np.split(ranks, np.cumsum([len(documents) for documents in wanted])[:-1])


def retrieval_metrics(
    queries: ArrayLike,
    corpus: ArrayLike,
    relevant: Relevant,
    *,
    cutoffs: Sequence[int] = (1, 10),
    chunk_size: int = 16384,
) -> dict[str, float]:
    """Recall, reciprocal rank and gain of a search by dot product.

    Args:
      queries, corpus, relevant, chunk_size: see `ranks_of`; vectors of length 1 make it cosine
        similarity.
      cutoffs: the k, in documents.

    Returns:
      Means over the queries, from 0 to 1: "recall@k", the share of the right documents among the
      first k; "mrr", one over the rank of the first right one; "ndcg@k" (Järvelin & Kekäläinen
      2002): grades over log2(1 + rank), summed over the first k, over the most it could be. And
      "median_rank" of the first right one.

    Raises:
      ValueError: what `ranks_of` refuses, cutoffs below 1, grades of 0 or less.
    """
    problems = [f"cutoff {k} is below 1" for k in cutoffs if k < 1]
    grades = [
        np.array(
            list(documents.values()) if isinstance(documents, Mapping) else [1.0] * len(documents)
        )
        for documents in relevant
    ]
    problems += [
        f"query {n} has a grade of {float(row.min())}; grades must be above 0"
        for n, row in enumerate(grades)
        if len(row) and not row.min() > 0
    ]
    if problems:
        raise ValueError("cannot score this search: " + "; ".join(problems[:10]))
    ranks = ranks_of(queries, corpus, relevant, chunk_size=chunk_size)
    first = np.array([row.min() for row in ranks])
    scores = {"mrr": float((1.0 / first).mean()), "median_rank": float(np.median(first))}
    for k in cutoffs:
        recall = [float((row <= k).mean()) for row in ranks]
        gains = [
            _gain(row, grade, k) / _gain(np.arange(1, len(row) + 1), -np.sort(-grade), k)
            for row, grade in zip(ranks, grades, strict=True)
        ]
        scores |= {f"recall@{k}": float(np.mean(recall)), f"ndcg@{k}": float(np.mean(gains))}
    return scores


def _gain(ranks: np.ndarray, grades: np.ndarray, cutoff: int) -> float:
    """Discounted cumulative gain of documents at these ranks."""
    return float((grades / np.log2(1.0 + ranks))[ranks <= cutoff].sum())


def _check(
    queries: np.ndarray, corpus: np.ndarray, wanted: list[np.ndarray], chunk_size: int
) -> None:
    problems = []
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1:] != corpus.shape[1:]:
        problems.append(
            f"queries have shape {queries.shape} and the corpus {corpus.shape}; they must be "
            "[Q, D] and [N, D]"
        )
    for name, vectors in (("queries", queries), ("corpus", corpus)):
        if not len(vectors):
            problems.append(f"{name} is empty")
        elif not np.isfinite(vectors).all():
            problems.append(f"{name} has vectors that are not finite")
    if len(queries) != len(wanted):
        problems.append(f"{len(queries)} queries and {len(wanted)} lists of right documents")
    for n, documents in enumerate(wanted):
        if not len(documents):
            problems.append(f"query {n} has no right document")
        elif documents.min() < 0 or documents.max() >= len(corpus):
            problems.append(f"query {n}: the corpus has no document {documents.tolist()}")
        elif len(set(documents.tolist())) < len(documents):
            problems.append(f"query {n}: documents {documents.tolist()} repeat")
    if chunk_size < 1:
        problems.append(f"chunk_size is {chunk_size}; it must be at least 1")
    if problems:
        raise ValueError("cannot rank these documents: " + "; ".join(problems[:10]))
