"""A linear probe: logistic regression on the pooled features of a frozen encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fmjax.hub as hub
from fmjax.data import EncodedText, TextExamples
from fmjax.data.batches import shared_buckets
from fmjax.data.images import ImageExamples
from fmjax.metrics.classification import classification_metrics
from fmjax.recipes.texts import evaluation_batches, labels_of
from fmjax.tasks.apply import collect, once
from fmjax.tasks.feature_extraction import embed

STRENGTHS = (0.01, 0.1, 1.0, 10.0)


def features(
    model: Any,
    variables: Any,
    encoded: Mapping[str, EncodedText],
    pad_id: int,
    *,
    pooling: str = "mean",
) -> dict[str, np.ndarray]:
    """Pooled features [N, D] float32 of every split, by one compiled function."""
    embed_fn = jax.jit(once(embed, model, pooling=pooling))
    buckets = shared_buckets(*encoded.values())
    return {
        split: collect(
            embed_fn,
            variables,
            evaluation_batches(texts, pad_id, buckets=buckets),
            size=len(texts),
        )
        for split, texts in encoded.items()
    }


def fit_probe(
    vectors: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], seed: int = 0
) -> Any:
    """scikit-learn's LogisticRegression on standardised features, its strength chosen on "val".

    Args:
        vectors: [N, D] for "train" and "val".
        labels: int [N] for both.
        seed: of the solver.

    Returns:
        A fitted scikit-learn pipeline: ``predict``, ``predict_proba``.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = [
        make_pipeline(
            StandardScaler(), LogisticRegression(C=strength, max_iter=2000, random_state=seed)
        ).fit(vectors["train"], labels["train"])
        for strength in STRENGTHS
    ]
    return max(fitted, key=lambda probe: probe.score(vectors["val"], labels["val"]))


def probe(
    source: str | Path,
    examples: Mapping[str, TextExamples],
    encoded: Mapping[str, EncodedText],
    pad_id: int,
    *,
    pooling: str = "mean",
) -> dict[str, dict[str, Any]]:
    """Metrics of a linear probe on "val" and, if there is one, "test".

    Args:
        source: a folder or hub id of the encoder.
        examples, encoded: "train", "val" and perhaps "test".
        pad_id: the token id of padding.
        pooling: how tokens become one vector.
    """
    model, variables = hub.load(source, head="model")
    vectors = features(model, variables, encoded, pad_id, pooling=pooling)
    return measure_probe(vectors, examples)


def measure_probe(
    vectors: Mapping[str, np.ndarray], examples: Mapping[str, TextExamples | ImageExamples]
) -> dict[str, dict[str, Any]]:
    """Metrics of a linear probe on "val" and, if there is one, "test".

    Args:
        vectors: features [N, D] of each split.
        examples: whose they are.
    """
    labels = {split: labels_of(part) for split, part in examples.items()}
    fitted = fit_probe(vectors, labels)
    names: Sequence[str] = examples["train"].label_names
    return {
        split: classification_metrics(
            complete(fitted, vectors[split], len(names)), labels[split], label_names=names
        )
        for split in examples
        if split != "train"
    }


def complete(fitted: Any, vectors: np.ndarray, classes: int) -> np.ndarray:
    """Probabilities [N, C], 0 for classes that the training examples do not have."""
    rows = np.zeros((len(vectors), classes), np.float32)
    rows[:, fitted.classes_] = fitted.predict_proba(vectors)
    return rows
