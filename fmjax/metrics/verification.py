"""Whether two voices, faces or texts are the same one's: how well a score tells."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_curve


def equal_error_rate(scores: np.ndarray, same: np.ndarray) -> tuple[float, float]:
    """(rate, threshold) at which pairs of the same are refused as often as others are accepted.

    Between two thresholds of the data the rates are interpolated.

    Args:
        scores: [N], higher for pairs that are more alike.
        same: bool [N].

    Raises:
        ValueError: arrays of different length, or pairs of one kind alone.
    """
    scores, same = np.asarray(scores, np.float64), np.asarray(same, bool)
    if scores.shape != same.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and same {same.shape} must be [N] both")
    if same.all() or not same.any():
        raise ValueError("the equal error rate needs pairs of the same and pairs of others")
    accepted, found, thresholds = roc_curve(same, scores, drop_intermediate=False)
    gap = (1 - found) - accepted  # falls from 1 to -1
    after = int(np.argmax(gap <= 0))
    before = after - 1
    share = gap[before] / (gap[before] - gap[after])
    rate = accepted[before] + share * (accepted[after] - accepted[before])
    first = min(thresholds[before], scores.max())  # the curve begins at infinity
    return float(rate), float(first + share * (thresholds[after] - first))
