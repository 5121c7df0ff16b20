"""What captions are worth: words in common with what people wrote, and the same altogether."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmjax.metrics.spans import squad_scores
from fmjax.metrics.translation import References, translation_metrics


def captioning_metrics(captions: Sequence[str], references: References) -> dict[str, float]:
    """Corpus BLEU, chrF, and the shares of captions and of words that are right.

    Args:
      captions: N written texts.
      references: what they should have been: one text each, or as many for each.

    Returns:
      "bleu" and "chrf" from 0 to 100, see `translation_metrics`; "exact_match" and "token_f1" from
      0 to 1, against the best reference, see `fmjax.metrics.spans`.

    Raises:
      ValueError: captions and references that do not match in number.
      ImportError: sacrebleu is not installed.
    """
    overlap = translation_metrics(captions, references)
    several = [[one] if isinstance(one, str) else list(one) for one in references]
    exact, f1 = squad_scores(captions, several)
    return {
        "bleu": overlap["bleu"],
        "chrf": overlap["chrf"],
        "exact_match": float(np.mean(exact)),
        "token_f1": float(np.mean(f1)),
    }
