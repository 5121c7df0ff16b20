"""Classification metrics against hand-made counts, a plain-Python reference, and bad input."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax.metrics import (
    brier_score,
    classification_metrics,
    expected_calibration_error,
    multi_label_metrics,
    negative_log_likelihood,
    probabilities_from_logits,
    reliability_bins,
)

# True 0 0 0 0 1 1, predicted 0 0 0 1 1 0.
BINARY = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6], [0.2, 0.8], [0.6, 0.4]])
BINARY_LABELS = np.array([0, 0, 0, 0, 1, 1])


def draw(seed: int, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(classes), size=rows).astype(np.float32)
    return probabilities, rng.integers(0, classes, rows)


def test_binary_scores_match_counts_by_hand():
    scores = classification_metrics(BINARY, BINARY_LABELS, label_names=["neg", "pos"])
    assert scores["confusion_matrix"] == [[3, 1], [1, 1]]
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["precision"] == pytest.approx(1 / 2)
    assert scores["recall"] == pytest.approx(1 / 2)
    assert scores["f1"] == pytest.approx(1 / 2)
    assert scores["macro_precision"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert scores["macro_recall"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert scores["report"]["neg"]["support"] == 4.0
    assert scores["report"]["pos"]["f1-score"] == pytest.approx(1 / 2)
    assert re.search(r"pos +0\.5000 +0\.5000 +0\.5000 +2\n", scores["report_text"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 6))
def test_scores_match_a_plain_reference(seed, rows, classes):
    probabilities, labels = draw(seed, rows, classes)
    scores = classification_metrics(
        probabilities, labels, label_names=[f"class {c}" for c in range(classes)]
    )
    predicted = [max(range(classes), key=lambda c, row=row: row[c]) for row in probabilities]
    matrix = [[0] * classes for _ in range(classes)]
    for true, guess in zip(labels, predicted, strict=True):
        matrix[true][guess] += 1
    recalls = [matrix[c][c] / (sum(matrix[c]) or 1) for c in range(classes)]
    precisions = [
        matrix[c][c] / (sum(matrix[r][c] for r in range(classes)) or 1) for c in range(classes)
    ]
    f1 = [2 * p * r / ((p + r) or 1) for p, r in zip(precisions, recalls, strict=True)]
    assert scores["confusion_matrix"] == matrix
    assert scores["accuracy"] == pytest.approx(sum(matrix[c][c] for c in range(classes)) / rows)
    assert scores["macro_recall"] == pytest.approx(np.mean(recalls))
    assert scores["macro_precision"] == pytest.approx(np.mean(precisions))
    assert scores["macro_f1"] == pytest.approx(np.mean(f1))
    assert ("f1" in scores) == (classes == 2)
    # Strict JSON: no NaN, no numpy scalars, and the round trip changes nothing.
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_absent_classes_score_zero_without_warnings(recwarn):
    scores = classification_metrics(
        [[0.9, 0.1, 0.0], [0.8, 0.2, 0.0]], [0, 0], label_names=["a", "b", "c"]
    )
    assert scores["confusion_matrix"] == [[2, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert scores["macro_f1"] == pytest.approx(1 / 3)
    assert not recwarn.list


def test_calibration_error_of_a_known_gap():
    # Confidence 0.9 four times with three right, 0.6 twice with one right.
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2)
    labels = np.array([0, 0, 0, 1, 0, 1])
    expected = 4 / 6 * abs(0.75 - 0.9) + 2 / 6 * abs(0.5 - 0.6)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected)
    bins = reliability_bins(probabilities, labels)
    assert sum(bins["count"]) == 6
    assert [c for c in bins["count"] if c] == [2, 4]
    assert bins["accuracy"][8] == pytest.approx(0.5)  # 0.6 in (8/15, 9/15]
    assert bins["accuracy"][0] is None
    assert bins["confidence"][13] == pytest.approx(0.9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 5), st.integers(1, 20))
def test_bins_are_left_open_and_complete(seed, rows, classes, num_bins):
    probabilities, labels = draw(seed, rows, classes)
    bins = reliability_bins(probabilities, labels, num_bins=num_bins)
    confidence = np.minimum(probabilities.max(axis=1).astype(np.float64), 1.0)
    for low, high, count in zip(bins["edges"][:-1], bins["edges"][1:], bins["count"], strict=True):
        assert count == int(((confidence > low) & (confidence <= high)).sum())
    assert sum(bins["count"]) == rows
    # One bin is the plain gap between mean confidence and accuracy.
    gap = abs(confidence.mean() - np.mean(probabilities.argmax(axis=1) == labels))
    assert expected_calibration_error(probabilities, labels, num_bins=1) == pytest.approx(gap)


def test_a_certain_and_right_model_is_calibrated():
    assert expected_calibration_error(np.eye(3, dtype=np.float32), np.arange(3)) == 0.0


def test_multi_label_scores_match_counts_by_hand():
    probabilities = np.array([[0.9, 0.2, 0.5], [0.4, 0.7, 0.1], [0.6, 0.6, 0.3]])
    labels = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 0]])  # hits 4, false alarms 1, misses 1
    scores = multi_label_metrics(probabilities, labels, label_names=["a", "b", "c"])
    assert scores["subset_accuracy"] == pytest.approx(1 / 3)
    assert scores["micro_precision"] == pytest.approx(4 / 5)
    assert scores["micro_recall"] == pytest.approx(4 / 5)
    assert scores["micro_f1"] == pytest.approx(4 / 5)
    assert scores["macro_f1"] == pytest.approx((0.5 + 1.0 + 1.0) / 3)
    assert scores["report"]["a"]["precision"] == pytest.approx(0.5)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    strict = multi_label_metrics(probabilities, labels, label_names=["a", "b", "c"], threshold=0.65)
    assert strict["micro_recall"] == pytest.approx(2 / 5)


def test_multi_label_with_one_label_is_not_read_as_binary():
    scores = multi_label_metrics([[0.9], [0.2], [0.8]], [[1], [1], [0]], label_names=["a"])
    assert scores["micro_f1"] == pytest.approx(0.5)
    assert scores["subset_accuracy"] == pytest.approx(1 / 3)
    assert scores["report"]["a"]["support"] == 2.0


def test_probabilities_from_logits():
    logits = np.array([[1000.0, 0.0], [0.0, np.log(3.0)]])
    softmax = probabilities_from_logits(logits, problem_type="single_label_classification")
    np.testing.assert_allclose(softmax, [[1.0, 0.0], [0.25, 0.75]], rtol=1e-6)
    sigmoid = probabilities_from_logits(logits, problem_type="multi_label_classification")
    np.testing.assert_allclose(sigmoid, [[1.0, 0.5], [0.5, 0.75]], rtol=1e-6)
    assert softmax.dtype == sigmoid.dtype == np.float32
    with pytest.raises(ValueError, match="'regression' has no probabilities"):
        probabilities_from_logits(logits, problem_type="regression")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN or infinity"):
        probabilities_from_logits([[np.nan]], problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        probabilities_from_logits(np.zeros(3), problem_type="multi_label_classification")


@pytest.mark.parametrize(
    ("probabilities", "labels", "names", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), ["a", "b"], "empty"),
        (np.zeros(4), np.zeros(4, int), ["a", "b"], r"shape \(4,\), expected \[N, C\]"),
        ([[1.0]], [0], ["a"], "C >= 2"),
        ([[0.5, np.nan]], [0], ["a", "b"], "NaN or infinity, first at row 0"),
        ([[2.0, -1.0]], [0], ["a", "b"], "are they logits"),
        ([[0.5, 0.4]], [0], ["a", "b"], r"do not sum to 1, the first is row 0 with 0\.9"),
        ([[0.5, 0.5]], [2], ["a", "b"], r"outside 0\.\.1, the first is 2 at row 0"),
        ([[0.5, 0.5]], [-100], ["a", "b"], "the first is -100 at row 0"),
        ([[0.5, 0.5]], [0, 1], ["a", "b"], "2 labels for 1 rows"),
        ([[0.5, 0.5]], [0.0], ["a", "b"], "float64, expected"),
        ([[0.5, 0.5]], [0], ["a"], "1 label names for 2 columns"),
        ([[0.5, 0.5]], [0], ["a", "a"], r"these repeat: \['a'\]"),
        ([[0.5, 0.5]], [0], ["a", "accuracy"], "rename these classes"),
        ([[0.5, 0.5]], [0], {"0": "a", "1": "b"}, "strings in class order"),
        ([[0.5, 0.5]], [0], [0, 1], "strings in class order"),
        ([[0.5, 0.5]], [0], "ab", "strings in class order"),
        ([["x", "y"]], [0], ["a", "b"], "expected float16"),
    ],
)
def test_bad_single_label_input_is_named(probabilities, labels, names, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(probabilities, labels, label_names=names)


def test_all_problems_are_raised_together():
    with pytest.raises(ValueError, match="cannot score") as caught:
        classification_metrics([[0.5, 0.5]], [7, 0], label_names=["a"])
    text = str(caught.value)
    assert "2 labels for 1 rows" in text
    assert "outside 0..1" in text
    assert "1 label names" in text


@pytest.mark.parametrize(
    ("labels", "threshold", "message"),
    [
        ([[1, 2]], 0.5, "zeros and ones"),
        ([1], 0.5, r"shape \(1,\)"),
        ([[1, 0]], 1.0, "threshold is 1.0"),
    ],
)
def test_bad_multi_label_input_is_named(labels, threshold, message):
    with pytest.raises(ValueError, match=message):
        multi_label_metrics([[0.5, 0.5]], labels, label_names=["a", "b"], threshold=threshold)


def test_bins_must_be_positive():
    with pytest.raises(ValueError, match="num_bins is 0"):
        reliability_bins(BINARY, BINARY_LABELS, num_bins=0)


def test_likelihood_and_brier_score_match_scikit_learn():
    from sklearn.metrics import log_loss

    probabilities, labels = draw(0, 30, 4)
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True, dtype=np.float64)
    expected = log_loss(labels, probabilities, labels=range(4))
    assert negative_log_likelihood(np.log(probabilities) + 3, labels) == pytest.approx(expected)
    squares = [
        sum((row[c] - (c == label)) ** 2 for c in range(4))
        for row, label in zip(probabilities, labels, strict=True)
    ]
    assert brier_score(probabilities, labels) == pytest.approx(np.mean(squares), rel=1e-6)
    assert brier_score([[0.0, 1.0], [1.0, 0.0]], [0, 0]) == 1.0
    assert negative_log_likelihood([[0.0, -np.inf]], [1]) == np.inf
    with pytest.raises(ValueError, match=r"(?s)exclude every class.*2 labels lie outside"):
        negative_log_likelihood([[-np.inf, -np.inf], [0.0, 1.0]], [2, -1])
    with pytest.raises(ValueError, match="are they logits"):
        brier_score([[3.0, -2.0]], [0])
