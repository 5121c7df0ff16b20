"""SigLIP's text encoder (Zhai et al. 2023, arXiv:2303.15343): CLIP's without the causal mask, read
at its last position. HF "siglip_text_model".
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
from jax import Array

from fmjax.models import clip_text_model, config_alone, token_inputs
from fmjax.models.clip_text_model import IGNORED, Inits
from fmjax.nn.checks import refuse
from fmjax.nn.encoder import Inputs, TextEmbeddings
from fmjax.nn.linear import Dense
from fmjax.types import PyTree
from fmjax.weights import Rule, dense_rules

__all__ = ["IGNORED"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    projection_size: int | None = None  # None is hidden_size

    # What the frame reads; none of these are keys of config.json.
    is_decoder = add_cross_attention = False

    def __post_init__(self) -> None:
        refuse(self, clip_text_model.width_problems(self))
        if self.projection_size is None:
            object.__setattr__(self, "projection_size", self.hidden_size)


MODEL_TYPE = "siglip_text_model"
HEADS = {"model": "SiglipTextModel"}
LARGE: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16}  # fmt: skip
# Alabdulmohsin et al. 2023, arXiv:2305.13035, table 2: the shape optimised for 400 M parameters.
SO400M: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
          "num_attention_heads": 16}  # fmt: skip
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=32, attention_dropout=0.1,
        projection_size=16,
    ),
    "base": Config(),
    "base-i18n": Config(vocab_size=250_000),
    "large": Config(**LARGE),
    "so400m": Config(**SO400M),
}  # fmt: skip


class Block(clip_text_model.Block):
    """CLIP's, with other first weights."""

    @property
    def inits(self) -> Inits:
        return Inits(*[nn.initializers.xavier_uniform()] * 4)


class Model(clip_text_model.Model):
    """The text encoder; see `fmjax.nn.encoder.Encoder`."""

    block = Block
    heads = HEADS

    def embeddings(self) -> TextEmbeddings:
        config = self.config
        return TextEmbeddings(
            config.vocab_size,
            config.hidden_size,
            config.layer_norm_eps,
            0.0,
            nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0),
            positions=config.max_position_embeddings,
            normed=False,
        )

    def shared(self, inputs: Inputs, embedded: Array) -> PyTree:
        return inputs.mask()

    def pool(self, hidden: Array, inputs: Inputs) -> Array | None:
        # Texts are padded to one length, and the last position sums up, padding or not.
        return Dense(self.config.projection_size, name="pooler")(hidden[:, -1])


inputs = token_inputs
from_tensors = config_alone
PREFIX = "text_model."
FIXED: dict[str, Any] = dict.fromkeys(
    ("pad_token_id", "tie_word_embeddings", "problem_type", "initializer_factor"), ...
)


def rules(config: Any, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    return clip_text_model.body_rules("") + dense_rules("pooler", "head")
