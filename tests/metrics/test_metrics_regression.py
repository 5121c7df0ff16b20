"""Regression metrics against formulas written out, and bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest

from fmjax.metrics import regression_metrics


def test_scores_match_the_formulas():
    rng = np.random.default_rng(3)
    labels = rng.normal(size=40).astype(np.float32)
    predictions = (0.7 * labels + rng.normal(scale=0.3, size=40)).astype(np.float32)
    scores = regression_metrics(predictions, labels)
    p, y = predictions.astype(np.float64), labels.astype(np.float64)
    ranks = [np.argsort(np.argsort(values)) for values in (p, y)]
    assert scores["mse"] == pytest.approx(np.mean((p - y) ** 2))
    assert scores["mae"] == pytest.approx(np.mean(np.abs(p - y)))
    assert scores["pearson"] == pytest.approx(np.corrcoef(p, y)[0, 1])
    assert scores["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert scores["r2"] == pytest.approx(1 - np.sum((y - p) ** 2) / np.sum((y - y.mean()) ** 2))
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_tied_ranks_share_their_mean():
    # Ranks 1.5 1.5 3 against 1 2 3: covariance 1.5 over sqrt(1.5 * 2).
    spearman = regression_metrics([1.0, 1.0, 5.0], [1.0, 2.0, 3.0])["spearman"]
    assert spearman == pytest.approx(1.5 / np.sqrt(3.0))


def test_undefined_quotients_are_absent(recwarn):
    assert set(regression_metrics([1.0, 1.0], [1.0, 2.0])) == {"mse", "mae", "r2"}
    assert set(regression_metrics([1.0, 2.0], [1.0, 1.0])) == {"mse", "mae"}
    assert regression_metrics([3.0], [1.0]) == {"mse": 4.0, "mae": 2.0}
    assert not recwarn.list


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([], [], r"predictions have shape \(0,\)"),
        ([[1.0]], [1.0], r"predictions have shape \(1, 1\)"),
        ([1.0], [1.0, 2.0], "1 predictions for 2 labels"),
        ([1.0, np.inf], [1.0, 2.0], "predictions hold NaN or infinity, first at row 1"),
        ([1.0], ["x"], "labels have shape"),
    ],
)
def test_bad_input_is_named(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        regression_metrics(predictions, labels)


def test_importing_the_metrics_does_not_import_scikit_learn():
    code = "import sys, fmjax.metrics; print({'sklearn', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
