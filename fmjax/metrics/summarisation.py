"""Summarisation metrics: ROUGE, as Google's rouge-score computes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmjax.metrics.optional import text_library
from fmjax.metrics.translation import References, reference_streams

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def summarisation_metrics(
    hypotheses: Sequence[str], references: References, *, use_stemmer: bool = True
) -> dict[str, float]:
    """F-measures of ROUGE-1, -2, -L and -Lsum (Lin 2004), means over the texts.

    Args:
      hypotheses: N summaries. For "rougeLsum" their sentences are separated by line ends.
      references: what they should have been; of several, the best counts.
      use_stemmer: whether words are stemmed (Porter), as published English scores have it.
        rouge-score's words are of a-z and 0-9 alone: it is for English.

    Returns:
      "rouge1", "rouge2", "rougeL" and "rougeLsum", from 0 to 100.

    Raises:
      ValueError: texts and references that do not match in number.
      ImportError: rouge-score is not installed.
    """
    streams = reference_streams(hypotheses, references)
    scorer = text_library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(
        list(KINDS), use_stemmer=use_stemmer
    )
    rows = zip(hypotheses, zip(*streams, strict=True), strict=True)
    scores = [scorer.score_multi(list(several), text) for text, several in rows]
    return {kind: 100.0 * float(np.mean([row[kind].fmeasure for row in scores])) for kind in KINDS}
