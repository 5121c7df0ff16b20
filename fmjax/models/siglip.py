"""SigLIP (Zhai et al. 2023, arXiv:2303.15343): pictures and texts in one space, trained by a
sigmoid for each pair. HF "siglip".
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, part_of, siglip_text_model, siglip_vision_model
from fmjax.models.clip import fill_parts
from fmjax.models.clip_text_model import IGNORED
from fmjax.nn.dual_encoder import DualEncoder
from fmjax.nn.linear import Dense
from fmjax.nn.parameter import parameter
from fmjax.weights import Rule, dense_rules, nested_rules

__all__ = ["IGNORED"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5).

    Args:
        text_config, vision_config: of the two encoders; None is the family's defaults.
    """

    text_config: Any = dataclasses.field(default=None, metadata=part_of("siglip_text_model"))
    vision_config: Any = dataclasses.field(default=None, metadata=part_of("siglip_vision_model"))
    initializer_factor: float = 1.0
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        fill_parts(self, siglip_text_model.Config, siglip_vision_model.Config)

    @property
    def vocab_size(self) -> int:
        """V of the texts."""
        return self.text_config.vocab_size

    @property
    def image_size(self) -> int | tuple[int, ...]:
        """X and Y of the pictures."""
        return self.vision_config.image_size


MODEL_TYPE = "siglip"
HEADS = {"model": "SiglipModel", "image_classification": "SiglipForImageClassification"}
# Zhai et al. 2023, section 4, and the names of the released models.
VARIANTS = {
    name: Config(siglip_text_model.VARIANTS[text], siglip_vision_model.VARIANTS[vision])
    for name, text, vision in (
        ("tiny", "tiny", "tiny"),
        ("base-224", "base", "base-224"),
        ("base-256", "base", "base-256"),
        ("base-256-i18n", "base-i18n", "base-256"),
        ("base-384", "base", "base-384"),
        ("base-512", "base", "base-512"),
        ("large-256", "large", "large-256"),
        ("large-384", "large", "large-384"),
        ("so400m-384", "so400m", "so400m-384"),
    )
}


class Model(DualEncoder):
    """SigLIP with one head; see `fmjax.nn.dual_encoder.DualEncoder`."""

    heads = HEADS

    def text_tower(self, **fields: Any) -> nn.Module:
        options = {"scan": self.scan, "remat": self.remat, **fields}
        return siglip_text_model.Model(self.config.text_config, **options)

    def vision_tower(self) -> nn.Module:
        return siglip_vision_model.Model(
            self.config.vision_config, scan=self.scan, remat=self.remat
        )

    def prepare(self) -> None:
        config = self.config
        texts, pictures = config.text_config.projection_size, config.vision_config.hidden_size
        if self.head == "model":
            if texts != pictures:
                raise ValueError(
                    f"text_config.projection_size={texts} must be vision_config.hidden_size="
                    f"{pictures} for texts to be compared with pictures"
                )
            # Section 3.2: at first most pairs are wrong, and are scored so.
            for name, first in (("logit_scale", math.log(10.0)), ("logit_bias", -10.0)):
                setattr(self, name, parameter(self, name, nn.initializers.constant(first), (1,)))
        else:
            std = pictures**-0.5 * config.initializer_factor
            init = nn.initializers.normal(std)
            self.classifier = Dense(len(config.id2label), kernel_init=init, name="head")

    def scoring(self) -> tuple[Array, Array | None]:
        scale, bias = (x[0].astype(jnp.float32) for x in (self.logit_scale, self.logit_bias))
        return jnp.exp(scale), bias

    def classify(self, x: Array) -> Array:
        return self.classifier(x).astype(jnp.float32)


def inputs(config: Any, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    pictures = siglip_vision_model.inputs(config.vision_config, "model")
    if head != "model":
        return pictures
    return siglip_text_model.inputs(config.text_config, "model") | pictures


PREFIX = ""
FIXED: dict[str, Any] = {"tie_word_embeddings": ...}
from_tensors = config_alone


def rules(config: Any, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    vision = siglip_vision_model.rules(config.vision_config, "model")
    table = nested_rules(vision, "vision", "vision_model")
    if head == "image_classification":
        return table + dense_rules("head", "classifier")
    text = siglip_text_model.rules(config.text_config, "model")
    return [
        *table,
        *nested_rules(text, "text", "text_model"),
        Rule("params/logit_scale", "logit_scale"),
        Rule("params/logit_bias", "logit_bias"),
    ]
