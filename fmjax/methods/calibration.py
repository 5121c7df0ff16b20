"""Calibration after training: probabilities that mean what they say.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599, section 4.2), of one model's logits or of
the log-probabilities of an ensemble (`fmjax.methods.ensembles`); what it is worth is measured by
`fmjax.metrics.negative_log_likelihood`, `brier_score` and `expected_calibration_error`.
"""

from __future__ import annotations

import numpy as np

from fmjax.metrics import negative_log_likelihood

ATTACHES = ("program",)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T at which ``softmax(logits / T)`` makes held-out labels likeliest.

    Above 1 where the model is too sure of itself. The likelihood is concave in 1 / T: its
    derivative's only root is found by Brent's method.

    Args:
        logits: [N, C], or log-probabilities, on data that the model was not trained on.
        labels: int [N].

    Raises:
        ValueError: shapes or numbers that do not fit; labels that are all the most probable, or on
            the whole no likelier than others, so that there is no such T.
    """
    negative_log_likelihood(logits, labels)  # refuses what does not fit
    from scipy import optimize, special

    rows = np.asarray(logits, np.float64)
    rows = rows - rows.max(axis=1, keepdims=True)
    if not np.isfinite(rows).all():
        raise ValueError("logits of minus infinity have no temperature; clip them")
    of_label = rows[np.arange(len(rows)), labels]

    def slope(inverse: float) -> float:
        """Of the mean loss in 1 / T: the expected logit less the label's."""
        chances = special.softmax(inverse * rows, axis=1)
        return float(np.mean((chances * rows).sum(axis=1) - of_label))

    if (of_label == 0).all():
        raise ValueError(
            f"all {len(rows)} labels are the most probable class, so the likelihood rises for ever "
            "as T falls; give more examples, and none that the model was trained on"
        )
    if slope(0.0) >= 0:
        raise ValueError(
            "the labels' logits are on the whole no higher than the others': no T above 0 makes "
            "them likelier; look whether labels and logits are of the same examples"
        )
    high = 1.0
    while slope(high) < 0:
        high *= 2
    return 1 / float(optimize.brentq(slope, 0.0, high, xtol=1e-12, rtol=1e-12))  # pyright: ignore[reportArgumentType]
