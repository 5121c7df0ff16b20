"""Classification metrics on numpy arrays: scikit-learn's scores and the calibration error.

scikit-learn is imported inside the functions, so importing this file costs nothing. Every function
checks its whole input first and raises one ValueError that lists all problems.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

# Softmax in float32 over 100,000 classes is off by about 1e-5; probabilities that went through
# bfloat16 are off by up to 4e-3 a value and should be renormalised by whoever rounded them.
SUM_TOLERANCE = 1e-3

# scikit-learn stores its averages beside the classes, in one dictionary: a class of that name
# would be overwritten in silence.
_RESERVED = frozenset({"accuracy", "micro avg", "macro avg", "weighted avg", "samples avg"})


def classification_metrics(
    probabilities: ArrayLike, labels: ArrayLike, label_names: Sequence[str]
) -> dict[str, Any]:
    """Score single-label predictions; the predicted class is the most probable (first of ties).

    Args:
      probabilities: [N, C] floats, each row sums to 1.
      labels: [N] integers in 0..C-1.
      label_names: C different names, in class order.

    Returns:
      A JSON-serialisable dictionary: "accuracy", "macro_precision", "macro_recall", "macro_f1" and
      "expected_calibration_error" as floats; for C == 2 also "precision", "recall" and "f1" of
      class 1; "report" (scikit-learn's classification_report as a dictionary), "report_text" (the
      same as text) and "confusion_matrix" (C lists of C counts, row = true, column = predicted).
      A score whose denominator is 0, such as the recall of an absent class, is 0.

    Raises:
      ValueError: lists every shape, range, sum or name that is wrong.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    _raise(_problems(probabilities, labels) + _name_problems(probabilities, label_names))
    from sklearn import metrics

    num_classes = probabilities.shape[1]
    classes = list(range(num_classes))
    predicted = probabilities.argmax(axis=1)  # [N]
    per_class = metrics.precision_recall_fscore_support(
        labels,
        predicted,
        labels=classes,
        zero_division=0.0,  # pyright: ignore[reportArgumentType]
    )
    precision, recall, f1 = (np.asarray(values) for values in per_class[:3])  # each [C]
    scores = {
        "accuracy": float(np.mean(predicted == labels)),
        "macro_precision": float(np.mean(precision)),
        "macro_recall": float(np.mean(recall)),
        "macro_f1": float(np.mean(f1)),
    }
    if num_classes == 2:
        scores |= {
            "precision": float(precision[1]),
            "recall": float(recall[1]),
            "f1": float(f1[1]),
        }
    return scores | {
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
        **_reports(labels, predicted, classes, label_names),
        "confusion_matrix": metrics.confusion_matrix(labels, predicted, labels=classes).tolist(),
    }


def multi_label_metrics(
    probabilities: ArrayLike,
    labels: ArrayLike,
    label_names: Sequence[str],
    *,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Score multi-label predictions; label c is predicted where its probability >= threshold.

    Args:
      probabilities: [N, C] independent probabilities (the sigmoid of the logits).
      labels: [N, C] zeros and ones.
      label_names: C different names, in label order.
      threshold: probability in (0, 1) from which a label counts as predicted.

    Returns:
      A JSON-serialisable dictionary: "subset_accuracy" (share of rows with every label right),
      "micro_*" and "macro_*" precision, recall and f1 as floats; "report" and "report_text" as in
      `classification_metrics`. A score whose denominator is 0 is 0.

    Raises:
      ValueError: lists every shape, range, label or name that is wrong.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    problems = _matrix_problems(probabilities)
    if labels.shape != probabilities.shape:
        problems.append(
            f"labels have shape {labels.shape}, probabilities {probabilities.shape}: multi-label "
            "targets are one row of zeros and ones for each row of probabilities"
        )
    elif labels.dtype.kind not in "biuf" or not np.isin(labels, (0, 1)).all():
        problems.append("multi-label targets must be zeros and ones")
    if not 0.0 < threshold < 1.0:
        problems.append(f"threshold is {threshold}, it must lie between 0 and 1")
    _raise(problems + _name_problems(probabilities, label_names))
    from sklearn import metrics

    labels = labels.astype(np.int64)  # [N, C]
    predicted = (probabilities >= threshold).astype(np.int64)  # [N, C]
    scores = {"subset_accuracy": float(np.mean((predicted == labels).all(axis=1)))}
    columns = list(range(labels.shape[1]))
    if len(columns) == 1:
        # scikit-learn reads one column as a plain binary target, in which our label is class 1.
        labels, predicted, columns = labels[:, 0], predicted[:, 0], [1]  # each [N]
    for average in ("micro", "macro"):
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            labels,
            predicted,
            labels=columns,
            average=average,
            zero_division=0.0,  # pyright: ignore[reportArgumentType]
        )
        scores |= {
            f"{average}_precision": float(precision),
            f"{average}_recall": float(recall),
            f"{average}_f1": float(f1),
        }
    return scores | _reports(labels, predicted, columns, label_names)


def reliability_bins(
    probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = 15
) -> dict[str, list]:
    """Sort predictions into equal-width bins of confidence (Guo et al. 2017, arXiv:1706.04599).

    The confidence is the probability of the predicted class; bin m of M holds the confidences in
    ((m - 1) / M, m / M].

    Args:
      probabilities: [N, C] floats, each row sums to 1.
      labels: [N] integers in 0..C-1.
      num_bins: M, at least 1.

    Returns:
      "edges" (M + 1 floats), "count" (M integers), and "accuracy" and "confidence" (M means each,
      None for an empty bin).

    Raises:
      ValueError: lists every shape, range or sum that is wrong.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    problems = _problems(probabilities, labels)
    if num_bins < 1:
        problems.append(f"num_bins is {num_bins}, it must be at least 1")
    _raise(problems)
    # A float32 softmax may exceed 1 by a rounding error.
    confidence = np.minimum(probabilities.max(axis=1).astype(np.float64), 1.0)  # [N]
    correct = (probabilities.argmax(axis=1) == labels).astype(np.float64)  # [N]
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    bins = np.digitize(confidence, edges[1:-1], right=True)  # [N], 0..M-1
    count = np.bincount(bins, minlength=num_bins)  # [M]

    def means(values: np.ndarray) -> list[float | None]:
        totals = np.bincount(bins, weights=values, minlength=num_bins)  # [M]
        return [
            float(total / n) if n else None for total, n in zip(totals, count.tolist(), strict=True)
        ]

    return {
        "edges": edges.tolist(),
        "count": count.tolist(),
        "accuracy": means(correct),
        "confidence": means(confidence),
    }


def expected_calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy: sum over bins of n_m / N |acc_m - conf_m|.

    Guo et al. 2017, arXiv:1706.04599, equation 3.

    Args:
      probabilities: [N, C] floats, each row sums to 1.
      labels: [N] integers in 0..C-1.
      num_bins: number of equal-width bins of confidence.

    Returns:
      The error, from 0 (calibrated) to 1.

    Raises:
      ValueError: as `reliability_bins`.
    """
    bins = reliability_bins(probabilities, labels, num_bins=num_bins)
    gaps = [
        count * abs(accuracy - confidence)
        for count, accuracy, confidence in zip(
            bins["count"], bins["accuracy"], bins["confidence"], strict=True
        )
        if count
    ]
    return float(sum(gaps) / sum(bins["count"]))


def brier_score(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared distance between the probabilities and the label's own, over all classes.

    Brier 1950, "Verification of forecasts expressed in terms of probability", equation 2.

    Args:
      probabilities: [N, C] floats, each row sums to 1.
      labels: [N] integers in 0..C-1.

    Returns:
      The score, from 0 (certain and right) to 2 (certain and wrong).

    Raises:
      ValueError: lists every shape, range or sum that is wrong.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    _raise(_problems(probabilities, labels))
    wide = probabilities.astype(np.float64)
    of_label = wide[np.arange(len(wide)), labels]
    return float(np.mean((wide**2).sum(axis=1) - 2 * of_label + 1))


def negative_log_likelihood(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean of minus the label's log-probability, in nats, computed in float64.

    Args:
      logits: [N, C] floats, or log-probabilities, which are logits of themselves; minus infinity
        excludes a class.
      labels: [N] integers in 0..C-1.

    Returns:
      The mean; infinity where a label is excluded.

    Raises:
      ValueError: lists every shape or range that is wrong.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    problems = []
    if logits.ndim != 2 or 0 in logits.shape:
        problems.append(f"logits have shape {logits.shape}, expected [N, C] with N and C >= 1")
    elif np.isnan(wide := logits.astype(np.float64)).any() or (wide.max(axis=1) == -np.inf).any():
        problems.append("logits hold NaN, or rows that exclude every class")
    elif np.isposinf(wide).any():
        problems.append("logits hold infinity")
    _raise(problems + _label_problems(logits, labels))
    from scipy import special

    rows = special.log_softmax(logits.astype(np.float64), axis=1)
    return float(-np.mean(rows[np.arange(len(rows)), labels]))


def probabilities_from_logits(
    logits: ArrayLike,
    *,
    problem_type: Literal["single_label_classification", "multi_label_classification"],
) -> np.ndarray:
    """Softmax over classes, or the sigmoid of each label, computed in float64.

    Args:
      logits: [N, C] finite numbers.
      problem_type: Hugging Face's name; "regression" has no probabilities.

    Returns:
      [N, C] float32 probabilities.

    Raises:
      ValueError: logits of another shape, empty or not finite; another problem type.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits have shape {logits.shape}, expected [N, C] with N and C >= 1")
    if not np.isfinite(logits.astype(np.float64)).all():
        raise ValueError("logits hold NaN or infinity: look for the step at which the loss broke")
    from scipy import special

    # numpy cannot mix bfloat16 with Python floats, and float64 keeps rows summing to 1.
    wide = logits.astype(np.float64)
    if problem_type == "single_label_classification":
        return special.softmax(wide, axis=1).astype(np.float32)
    if problem_type == "multi_label_classification":
        return special.expit(wide).astype(np.float32)
    raise ValueError(
        f"problem_type {problem_type!r} has no probabilities, expected "
        "'single_label_classification' or 'multi_label_classification'"
    )


def _reports(
    labels: np.ndarray, predicted: np.ndarray, classes: list[int], label_names: Sequence[str]
) -> dict[str, Any]:
    """scikit-learn's classification report, as a dictionary of plain numbers and as text."""
    from sklearn import metrics

    names = list(label_names)
    options: dict[str, Any] = {"labels": classes, "target_names": names, "zero_division": 0.0}
    report = metrics.classification_report(labels, predicted, output_dict=True, **options)
    text = metrics.classification_report(labels, predicted, digits=4, **options)
    return {
        "report": {
            name: {key: float(value) for key, value in row.items()}
            if isinstance(row, dict)
            else float(row)
            for name, row in report.items()  # type: ignore[union-attr]
        },
        "report_text": text,
    }


def _problems(probabilities: np.ndarray, labels: np.ndarray) -> list[str]:
    """What is wrong with [N, C] probabilities and [N] class indices."""
    problems = _matrix_problems(probabilities) + _label_problems(probabilities, labels)
    if probabilities.ndim == 2 and probabilities.size and probabilities.shape[1] < 2:
        problems.append("probabilities have one class: expected C >= 2 columns")
    if not problems:
        sums = probabilities.sum(axis=1, dtype=np.float64)
        wrong = np.flatnonzero(np.abs(sums - 1.0) > SUM_TOLERANCE)
        if wrong.size:
            problems.append(
                f"{wrong.size} rows of probabilities do not sum to 1, the first is row {wrong[0]} "
                f"with {sums[wrong[0]]:.6g}: pass the softmax of the logits"
            )
    return problems


def _label_problems(scores: np.ndarray, labels: np.ndarray) -> list[str]:
    """What is wrong with [N] class indices for [N, C] probabilities or logits."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        return [f"labels have shape {labels.shape} and type {labels.dtype}, expected [N] integers"]
    if scores.ndim != 2 or scores.size == 0:
        return []
    rows, num_classes = scores.shape
    problems = []
    if len(labels) != rows:
        problems.append(f"{len(labels)} labels for {rows} rows of probabilities")
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        problems.append(
            f"{outside.size} labels lie outside 0..{num_classes - 1}, the first is "
            f"{labels[outside[0]]} at row {outside[0]}"
        )
    return problems


def _matrix_problems(probabilities: np.ndarray) -> list[str]:
    """What is wrong with an [N, C] matrix of numbers in [0, 1]."""
    if probabilities.ndim != 2:
        return [f"probabilities have shape {probabilities.shape}, expected [N, C]"]
    if probabilities.size == 0:
        return [f"probabilities are empty, shape {probabilities.shape}"]
    if probabilities.dtype.kind not in "fiu":
        return [f"probabilities are {probabilities.dtype}, expected float16, float32 or float64"]
    if not np.isfinite(probabilities).all():
        row = int(np.flatnonzero(~np.isfinite(probabilities).all(axis=1))[0])
        return [f"probabilities hold NaN or infinity, first at row {row}"]
    low, high = float(probabilities.min()), float(probabilities.max())
    if low < 0.0 or high > 1.0 + SUM_TOLERANCE:
        return [f"probabilities range from {low:.6g} to {high:.6g}, outside 0..1: are they logits?"]
    return []


def _name_problems(probabilities: np.ndarray, label_names: Sequence[str]) -> list[str]:
    """What is wrong with the names of C classes."""
    # A dictionary from class to name would pass for its keys.
    if isinstance(label_names, str | Mapping) or not all(isinstance(n, str) for n in label_names):
        return [f"label_names is {label_names!r}, expected the names as strings in class order"]
    problems = []
    if probabilities.ndim == 2 and len(label_names) != probabilities.shape[1]:
        problems.append(
            f"{len(label_names)} label names for {probabilities.shape[1]} columns of probabilities"
        )
    repeated = sorted({name for name in label_names if list(label_names).count(name) > 1})
    if repeated:
        problems.append(f"label names must differ, these repeat: {repeated}")
    reserved = sorted(_RESERVED.intersection(label_names))
    if reserved:
        problems.append(
            f"label names {reserved} are taken by the averages of the classification report: "
            "rename these classes"
        )
    return problems


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("cannot score these predictions:\n  " + "\n  ".join(problems))
