"""Translation metrics: BLEU and chrF of a corpus, as sacrebleu computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fmjax.metrics.optional import text_library
from fmjax.types import one_text

References = Sequence[str] | Sequence[Sequence[str]]
"""One reference for each text, or one or more (the same number for each)."""


def translation_metrics(
    hypotheses: Sequence[str], references: References, *, tokenize: str = "13a"
) -> dict[str, Any]:
    """Corpus BLEU (Papineni et al. 2002) and chrF (Popović 2015), by sacrebleu (Post 2018,
    arXiv:1804.08771).

    Args:
      hypotheses: N translations, as plain text (not tokenized).
      references: what they should have been.
      tokenize: BLEU's tokenizer: "13a" (mteval's, for most languages), "zh", "ja-mecab",
        "ko-mecab", "intl", "char", "flores200" or "none".

    Returns:
      "bleu" and "chrf" from 0 to 100; "bleu_signature" and "chrf_signature", which say how they
      were computed; "length_ratio", tokens of the hypotheses over tokens of the references.

    Raises:
      ValueError: texts and references that do not match in number, or an unknown tokenizer.
      ImportError: sacrebleu is not installed.
    """
    streams = reference_streams(hypotheses, references)
    sacrebleu = text_library("sacrebleu", "sacrebleu")
    if tokenize not in sacrebleu.BLEU.TOKENIZERS:
        known = sorted(sacrebleu.BLEU.TOKENIZERS)
        raise ValueError(f"tokenize is {tokenize!r}; it must be one of sacrebleu's {known}")
    bleu = sacrebleu.BLEU(tokenize=tokenize)
    chrf = sacrebleu.CHRF()
    found = bleu.corpus_score(list(hypotheses), streams)
    scores = {
        "bleu": float(found.score),
        "chrf": float(chrf.corpus_score(list(hypotheses), streams).score),
    }
    return scores | {
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
        "length_ratio": float(found.ratio),
    }


def reference_streams(hypotheses: Sequence[str], references: References) -> list[list[str]]:
    """R lists of N references each.

    Raises:
      ValueError: there are no texts, or texts and references do not match in number.
    """
    rows = [[row] if isinstance(row, str) else list(row) for row in references]
    problems = one_text("texts", hypotheses) + one_text("references", references)
    if not len(hypotheses):
        problems.append("there are no texts to score")
    elif len(hypotheses) != len(rows):
        problems.append(f"{len(hypotheses)} texts for {len(rows)} references")
    counts = sorted({len(row) for row in rows})
    if len(counts) > 1 or counts == [0]:
        problems.append(
            f"texts have {counts} references; each must have the same number, at least one"
        )
    if problems:
        raise ValueError("cannot score these texts: " + "; ".join(problems))
    return [list(stream) for stream in zip(*rows, strict=True)]
