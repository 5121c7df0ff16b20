"""Any picture encoder with any text encoder, compared as in CLIP (Zhai et al. 2022,
arXiv:2111.07991): ViT and BERT, EfficientNet and MiniLM, ... HF "vision-text-dual-encoder".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import PART, bert, clip_text_model, family_for, vit
from fmjax.nn.dual_encoder import DualEncoder
from fmjax.nn.linear import Dense
from fmjax.nn.parameter import parameter
from fmjax.types import Output
from fmjax.weights import Rule, dense_rules, nested_rules

POOLINGS = (None, "mean")


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5).

    Args:
        text_config: the Config of any family whose head "model" reads ``input_ids``.
        vision_config: of any whose head "model" reads ``pixel_values`` and pools them.
        projection_dim: E, the width of the common space.
        logit_scale_init_value: the logarithm of what cosines are multiplied by, at first.
        text_pooling: None is the text encoder's own pooled output; "mean" is over its tokens, as
            encoders of sentences are read, which Hugging Face's class cannot.
    """

    text_config: Any = dataclasses.field(default=bert.Config(), metadata=PART)
    vision_config: Any = dataclasses.field(default=vit.Config(), metadata=PART)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    text_pooling: str | None = dataclasses.field(default=None, metadata={"saved": "set"})

    def __post_init__(self) -> None:
        problems = []
        for name, key in (("text_config", "input_ids"), ("vision_config", "pixel_values")):
            part = getattr(self, name)
            family = family_for(part)
            if not isinstance(part, family.Config):
                problems.append(f"{name}={part!r} is no family's Config")
            elif (reads := set(family.inputs(part, "model"))) != {key}:
                problems.append(
                    f"{name} is of {family.MODEL_TYPE}, which reads {sorted(reads)}; it must be of "
                    f"a family that reads {key} alone"
                )
        if self.text_pooling not in POOLINGS:
            problems.append(f"text_pooling={self.text_pooling!r} must be one of {POOLINGS}")
        if self.projection_dim < 1:
            problems.append(f"projection_dim={self.projection_dim} must be at least 1")
        if problems:
            raise ValueError("vision_text_dual_encoder config: " + "; ".join(problems))

    @property
    def vocab_size(self) -> int:
        """V of the texts."""
        return self.text_config.vocab_size

    @property
    def image_size(self) -> int | tuple[int, ...]:
        """X and Y of the pictures."""
        return self.vision_config.image_size


MODEL_TYPE = "vision-text-dual-encoder"
HEADS = {"model": "VisionTextDualEncoderModel"}
VARIANTS = {
    "tiny": Config(
        bert.Config(
            vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=32,
        ),
        vit.VARIANTS["tiny"],
        projection_dim=14,
    ),
    # The defaults of the examples of Hugging Face.
    "vit-bert-base": Config(),
}  # fmt: skip


class Model(DualEncoder):
    """Two encoders with one head; see `fmjax.nn.dual_encoder.DualEncoder`."""

    heads = HEADS

    def tower(self, config: Any, **fields: Any) -> nn.Module:
        """The encoder of a config."""
        return family_for(config).Model(config, scan=self.scan, remat=self.remat, **fields)

    def text_tower(self, **fields: Any) -> nn.Module:
        return self.tower(self.config.text_config, **fields)

    def vision_tower(self) -> nn.Module:
        return self.tower(self.config.vision_config)

    def prepare(self) -> None:
        config = self.config
        self.text_projection = Dense(config.projection_dim, use_bias=False)
        self.vision_projection = Dense(config.projection_dim, use_bias=False)
        init = nn.initializers.constant(config.logit_scale_init_value)
        self.logit_scale = parameter(self, "logit_scale", init, ())

    def pooled_text(self, out: Output, attention_mask: Array | None) -> Array:
        if self.config.text_pooling is None:
            return super().pooled_text(out, attention_mask)
        hidden = out.last_hidden_state
        assert hidden is not None
        keep = jnp.ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        keep = keep.astype(jnp.float32)[..., None]  # [B, T, 1]
        total = (hidden.astype(jnp.float32) * keep).sum(axis=1)
        return (total / jnp.maximum(keep.sum(axis=1), 1.0)).astype(hidden.dtype)

    def text_space(self, pooled: Array) -> Array:
        return self.text_projection(pooled)

    def vision_space(self, pooled: Array) -> Array:
        return self.vision_projection(pooled)

    def scoring(self) -> tuple[Array, Array | None]:
        return jnp.exp(self.logit_scale.astype(jnp.float32)), None


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    parts = (config.text_config, config.vision_config)
    texts, pictures = (family_for(part).inputs(part, "model") for part in parts)
    return texts | pictures


PREFIX = ""
FIXED: dict[str, Any] = {"tie_word_embeddings": ...}
# Of the parts, as their own files have them.
IGNORED = (*bert.IGNORED, *clip_text_model.IGNORED)


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell of its parts."""

    def told(part: Any, place: str) -> Any:
        own = [name.removeprefix(place) for name in names if name.startswith(place)]
        return family_for(part).from_tensors(part, "model", own)

    return dataclasses.replace(
        config,
        text_config=told(config.text_config, "text_model."),
        vision_config=told(config.vision_config, "vision_model."),
    )


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    return [
        *_part_rules(config.text_config, "text"),
        *_part_rules(config.vision_config, "vision"),
        *dense_rules("text_projection", "text_projection", bias=False),
        *dense_rules("vision_projection", "visual_projection", bias=False),
        Rule("params/logit_scale", "logit_scale"),
    ]


def _part_rules(part: Any, side: str) -> list[Rule]:
    family = family_for(part)
    place = f"{side}_model"
    table = nested_rules(family.rules(part, "model"), side, place)
    if f"{place}." != family.PREFIX:
        return table
    # Version 4 wrote CLIP's towers with their own prefix besides: "text_model.text_model....".
    return [
        dataclasses.replace(rule, aliases=tuple(f"{place}.{name}" for name in rule.tensor_names()))
        for rule in table
    ]
