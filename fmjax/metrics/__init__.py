"""Metrics: thin, checked functions from numpy arrays to JSON-ready dictionaries of floats."""

from fmjax.metrics.classification import (
    classification_metrics,
    expected_calibration_error,
    multi_label_metrics,
    probabilities_from_logits,
    reliability_bins,
)
from fmjax.metrics.regression import regression_metrics

__all__ = [
    "classification_metrics",
    "expected_calibration_error",
    "multi_label_metrics",
    "probabilities_from_logits",
    "regression_metrics",
    "reliability_bins",
]
