"""Regression metrics on numpy arrays: errors, correlations and the coefficient of determination."""

import numpy as np
from numpy.typing import ArrayLike


def regression_metrics(predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Score real-valued predictions.

    Args:
      predictions: [N] finite numbers.
      labels: [N] finite numbers, in the same unit.

    Returns:
      "mse" (unit squared) and "mae" (unit); "pearson" and "spearman" where both arrays vary, and
      "r2" where the labels vary: elsewhere the quotients are undefined and the key is absent.

    Raises:
      ValueError: lists every shape or value that is wrong.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    problems = []
    for name, values in (("predictions", predictions), ("labels", labels)):
        if values.ndim != 1 or values.size == 0 or values.dtype.kind not in "fiu":
            problems.append(
                f"{name} have shape {values.shape} and type {values.dtype}, expected [N] numbers "
                "with N >= 1"
            )
        elif not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            problems.append(f"{name} hold NaN or infinity, first at row {row}")
    if not problems and len(predictions) != len(labels):
        problems.append(f"{len(predictions)} predictions for {len(labels)} labels")
    if problems:
        raise ValueError("cannot score these predictions:\n  " + "\n  ".join(problems))
    from scipy import stats
    from sklearn import metrics

    predictions, labels = predictions.astype(np.float64), labels.astype(np.float64)
    scores = {
        "mse": float(metrics.mean_squared_error(labels, predictions)),
        "mae": float(metrics.mean_absolute_error(labels, predictions)),
    }
    labels_vary = bool(np.ptp(labels) > 0.0)
    if labels_vary and np.ptp(predictions) > 0.0:
        scores["pearson"] = float(np.corrcoef(predictions, labels)[0, 1])
        # Spearman's correlation is Pearson's on ranks, where ties share their mean rank.
        ranks = stats.rankdata(predictions), stats.rankdata(labels)
        scores["spearman"] = float(np.corrcoef(*ranks)[0, 1])
    if labels_vary:
        scores["r2"] = float(metrics.r2_score(labels, predictions))
    return scores
