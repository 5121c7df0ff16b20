"""Ranks against a sort, metrics against scikit-learn and by hand."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from fmjax.metrics.retrieval import ranks_of, retrieval_metrics


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 40), st.integers(1, 50))
def test_ranks_equal_a_stable_sort(seed, num_queries, num_documents, chunk_size):
    draw = np.random.default_rng(seed)
    # Small integers: many documents score alike, and products are exact.
    queries = draw.integers(-2, 3, (num_queries, 3))
    corpus = draw.integers(-2, 3, (num_documents, 3))
    relevant = [
        draw.choice(num_documents, draw.integers(1, num_documents + 1), replace=False).tolist()
        for _ in range(num_queries)
    ]
    ranks = ranks_of(queries, corpus, relevant, chunk_size=chunk_size)
    for row, query, documents in zip(ranks, queries, relevant, strict=True):
        order = np.argsort(-(corpus @ query), kind="stable")
        place = np.argsort(order) + 1
        np.testing.assert_array_equal(row, place[documents])


def test_many_queries_are_ranked_in_blocks():
    vectors = np.random.default_rng(0).normal(size=(1500, 8))
    ranks = ranks_of(vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
                     vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
                     [[n] for n in range(1500)], chunk_size=700)  # fmt: skip
    assert all(row.tolist() == [1] for row in ranks)


def test_metrics_by_hand():
    corpus = np.eye(4)
    queries = np.array([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    # Ranks: query 0 has document 1 second; query 1 has document 3 first and document 0 last.
    scores = retrieval_metrics(queries, corpus, [[1], [3, 0]], cutoffs=(1, 2))
    assert scores["mrr"] == pytest.approx((1 / 2 + 1) / 2)
    assert scores["median_rank"] == pytest.approx(1.5)
    assert scores["recall@1"] == pytest.approx((0 + 1 / 2) / 2)
    assert scores["recall@2"] == pytest.approx((1 + 1 / 2) / 2)
    second = 1 / np.log2(3)
    assert scores["ndcg@1"] == pytest.approx((0 + 1) / 2)
    assert scores["ndcg@2"] == pytest.approx((second + 1 / (1 + second)) / 2)
    assert json.loads(json.dumps(scores)) == scores


def test_graded_gain_equals_scikit_learn():
    draw = np.random.default_rng(0)
    queries, corpus = draw.normal(size=(6, 5)), draw.normal(size=(30, 5))
    grades = draw.integers(0, 4, (6, 30)) * (draw.random((6, 30)) < 0.3)
    grades[:, 0] = 1
    relevant = [{int(d): float(row[d]) for d in np.flatnonzero(row)} for row in grades]
    scores = retrieval_metrics(queries, corpus, relevant, cutoffs=(10,))
    assert scores["ndcg@10"] == pytest.approx(ndcg_score(grades, queries @ corpus.T, k=10))


@pytest.mark.parametrize(
    ("queries", "corpus", "relevant", "message"),
    [
        (np.zeros((1, 2)), np.zeros((3, 3)), [[0]], r"shape \(1, 2\) and the corpus \(3, 3\)"),
        (np.zeros((1, 2)), np.zeros((0, 2)), [[0]], "corpus is empty"),
        (np.zeros((2, 2)), np.zeros((3, 2)), [[0]], "2 queries and 1 lists"),
        (np.zeros((1, 2)), np.zeros((3, 2)), [[]], "query 0 has no right document"),
        (np.zeros((1, 2)), np.zeros((3, 2)), [[3]], r"no document \[3\]"),
        (np.zeros((1, 2)), np.zeros((3, 2)), [[1, 1]], "repeat"),
        (np.full((1, 2), np.nan), np.zeros((3, 2)), [[1]], "not finite"),
        (np.zeros((1, 2)), np.zeros((3, 2)), [{1: 0.0}], r"grade of 0\.0"),
    ],
)
def test_bad_input_is_named(queries, corpus, relevant, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(queries, corpus, relevant)
    with pytest.raises(ValueError, match="cutoff 0 is below 1"):
        retrieval_metrics(queries, corpus, relevant, cutoffs=(0,))
