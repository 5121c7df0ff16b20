"""Metrics: thin, checked functions from numpy arrays to JSON-ready dictionaries of floats."""

from fmjax.metrics.classification import (
    brier_score,
    classification_metrics,
    expected_calibration_error,
    multi_label_metrics,
    negative_log_likelihood,
    probabilities_from_logits,
    reliability_bins,
)
from fmjax.metrics.detection import detection_metrics
from fmjax.metrics.generation_quality import frechet_distance, kernel_distance
from fmjax.metrics.language_modelling import bits_per_byte, perplexity
from fmjax.metrics.regression import regression_metrics
from fmjax.metrics.retrieval import retrieval_metrics
from fmjax.metrics.segmentation import segmentation_confusion, segmentation_metrics
from fmjax.metrics.spans import squad_metrics
from fmjax.metrics.summarisation import summarisation_metrics
from fmjax.metrics.tagging import entity_metrics, tag_accuracy
from fmjax.metrics.translation import translation_metrics
from fmjax.metrics.visual_question_answering import visual_question_answering_metrics

__all__ = [
    "bits_per_byte",
    "brier_score",
    "classification_metrics",
    "detection_metrics",
    "entity_metrics",
    "expected_calibration_error",
    "frechet_distance",
    "kernel_distance",
    "multi_label_metrics",
    "negative_log_likelihood",
    "perplexity",
    "probabilities_from_logits",
    "regression_metrics",
    "reliability_bins",
    "retrieval_metrics",
    "segmentation_confusion",
    "segmentation_metrics",
    "squad_metrics",
    "summarisation_metrics",
    "tag_accuracy",
    "translation_metrics",
    "visual_question_answering_metrics",
]
