"""Nearest neighbours: what features are worth without any training on them.

After Wu et al. 2018 (arXiv:1805.01978, section 3.4), with the settings of Caron et al. 2021 (DINO,
arXiv:2104.14294).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fmjax.data import TextExamples
from fmjax.data.images import ImageExamples
from fmjax.metrics.classification import classification_metrics
from fmjax.recipes.texts import labels_of

BLOCK = 1024  # examples whose similarities to all others are held at once


def neighbour_votes(
    known: np.ndarray,
    labels: np.ndarray,
    asked: np.ndarray,
    classes: int,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Shares [N, C] of the votes of each example's neighbours, by cosine similarity.

    Args:
        known: features [M, D] of examples with labels.
        labels: int [M].
        asked: features [N, D].
        classes: C.
        neighbours: how many vote, all if there are fewer.
        temperature: a vote weighs exp(similarity / temperature).

    Raises:
        ValueError: a number that is not positive, no examples, or features of another size.
    """
    problems = []
    if neighbours < 1:
        problems.append(f"neighbours={neighbours} must be at least 1")
    if temperature <= 0:
        problems.append(f"temperature={temperature} must be positive")
    if not len(known) or len(known) != len(labels):
        problems.append(f"{len(known)} features have {len(labels)} labels; each must have one")
    if known.shape[1:] != asked.shape[1:] or known.ndim != 2:
        problems.append(
            f"features are {known.shape} and {asked.shape}; they must be [M, D], [N, D]"
        )
    if problems:
        raise ValueError("; ".join(problems))
    known, asked = _unit(known), _unit(asked)
    count = min(neighbours, len(known))
    votes = np.zeros((len(asked), classes), np.float64)
    for start in range(0, len(asked), BLOCK):
        similar = asked[start : start + BLOCK] @ known.T  # [B, M]
        nearest = np.argpartition(-similar, count - 1, axis=1)[:, :count]
        # Less the largest, which changes no share and overflows for no temperature.
        similar = np.take_along_axis(similar, nearest, axis=1).astype(np.float64)
        weights = np.exp((similar - similar.max(axis=1, keepdims=True)) / temperature)
        rows = np.arange(start, start + len(similar))
        np.add.at(votes, (rows[:, None], labels[nearest]), weights)
    return (votes / votes.sum(axis=1, keepdims=True)).astype(np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Of length 1; zeros stay."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def measure_neighbours(
    vectors: Mapping[str, np.ndarray],
    examples: Mapping[str, TextExamples | ImageExamples],
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> dict[str, dict[str, Any]]:
    """Metrics on "val" and, if there is one, "test", by their neighbours in "train".

    Args:
        vectors: features [N, D] of each split.
        examples: whose they are.
        neighbours, temperature: see `neighbour_votes`.
    """
    names = examples["train"].label_names
    labels = {split: labels_of(part) for split, part in examples.items()}
    return {
        split: classification_metrics(
            neighbour_votes(
                vectors["train"],
                labels["train"],
                vectors[split],
                len(names),
                neighbours=neighbours,
                temperature=temperature,
            ),
            labels[split],
            label_names=names,
        )
        for split in examples
        if split != "train"
    }
