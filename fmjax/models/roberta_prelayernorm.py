"""RoBERTa with the norms before the sublayers, as in fairseq and in Wettig et al. 2022,
arXiv:2202.08005. HF "roberta-prelayernorm".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from jax import Array

from fmjax.models import bert, roberta
from fmjax.models.roberta import FIXED, IGNORED, inputs
from fmjax.nn.dropout import Dropout
from fmjax.nn.norm import LayerNorm
from fmjax.weights import Rule, dense_rules, norm_rules, renamed

__all__ = ["FIXED", "IGNORED", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config(roberta.Config):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""


MODEL_TYPE = "roberta-prelayernorm"
HEADS = {
    head: name.replace("Roberta", "RobertaPreLayerNorm") for head, name in roberta.HEADS.items()
}
# Wettig et al. 2022, section 3: RoBERTa-large's size.
VARIANTS = {
    name: Config(**dataclasses.asdict(roberta.VARIANTS[name])) for name in ("tiny", "large")
}


class Block(bert.Block):
    """Norm, attention, residual; norm, feed-forward, residual (pre-norm)."""

    def enter(self, hidden: Array, norm: str) -> Array:
        return LayerNorm(self.config.layer_norm_eps, name=norm)(hidden)

    def leave(self, hidden: Array, update: Array, norm: str) -> Array:
        return hidden + Dropout(self.config.hidden_dropout_prob)(update, self.train)


class Model(roberta.Model):
    """Pre-norm RoBERTa with one head; see `fmjax.models.roberta.Model`."""

    block = Block
    heads = HEADS

    def setup(self) -> None:
        super().setup()
        self.final_norm = LayerNorm(self.config.layer_norm_eps)

    def finish(self, hidden: Array) -> Array:
        return self.final_norm(hidden)


PREFIX = "roberta_prelayernorm."


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell: whether "model" has a pooler."""
    return bert.told_pooler(config, head, names, PREFIX)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = bert.body_rules(config, head, tied="lm_head.decoder.weight")
    body += norm_rules("final_norm", f"{bert.body_of(head)}LayerNorm")
    if bert.has_pooler(config, head, roberta.POOLED):
        body += dense_rules("pooler", f"{bert.body_of(head)}pooler.dense")
    names = {
        "bert": "roberta_prelayernorm",
        "attention.output.LayerNorm": "attention.LayerNorm",
        "crossattention.output.LayerNorm": "crossattention.LayerNorm",
        "output.LayerNorm": "intermediate.LayerNorm",
    }
    return renamed(body, names) + roberta.head_rules(config, head)
