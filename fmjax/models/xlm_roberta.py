"""XLM-RoBERTa (Conneau et al. 2020, arXiv:1911.02116): RoBERTa on a hundred languages.
HF "xlm-roberta".
"""

from __future__ import annotations

import dataclasses

from fmjax.models import roberta
from fmjax.models.roberta import FIXED, IGNORED, PREFIX, from_tensors, inputs, rules

__all__ = ["FIXED", "IGNORED", "PREFIX", "from_tensors", "inputs", "rules"]


@dataclasses.dataclass(frozen=True)
class Config(roberta.Config):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 30522


MODEL_TYPE = "xlm-roberta"
HEADS = {head: f"XLM{name}" for head, name in roberta.HEADS.items()}

# Conneau et al. 2020, section 3 and table 5: RoBERTa's sizes, 250,000 sentence pieces.
VARIANTS = {
    name: Config(**{**dataclasses.asdict(config), "vocab_size": 99 if name == "tiny" else 250002})
    for name, config in roberta.VARIANTS.items()
}


class Model(roberta.Model):
    """XLM-RoBERTa with one head; see `fmjax.models.roberta.Model`."""

    heads = HEADS
