"""CLIP (Radford et al. 2021, arXiv:2103.00020): pictures and texts in one space. HF "clip"."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import clip_text_model, clip_vision_model, config_alone, part_of
from fmjax.nn.dual_encoder import DualEncoder
from fmjax.nn.linear import Dense
from fmjax.nn.parameter import parameter
from fmjax.weights import Rule, dense_rules, nested_rules

TEXT = part_of("clip_text_model")
VISION = part_of("clip_vision_model")


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under its names and with its defaults (transformers 5).

    Args:
        text_config, vision_config: of the two encoders; None is the family's defaults.
        projection_dim: E, the width of the common space.
        logit_scale_init_value: the logarithm of what cosines are multiplied by, at first.
        text_config_dict, vision_config_dict: what old files say besides, which must be the same;
            None afterwards.
    """

    text_config: Any = dataclasses.field(default=None, metadata=TEXT)
    vision_config: Any = dataclasses.field(default=None, metadata=VISION)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    initializer_factor: float = 1.0
    text_config_dict: Any = dataclasses.field(default=None, metadata=TEXT | {"saved": "set"})
    vision_config_dict: Any = dataclasses.field(default=None, metadata=VISION | {"saved": "set"})
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        fill_parts(self, clip_text_model.Config, clip_vision_model.Config)

    @property
    def vocab_size(self) -> int:
        """V of the texts."""
        return self.text_config.vocab_size

    @property
    def image_size(self) -> int | tuple[int, ...]:
        """X and Y of the pictures."""
        return self.vision_config.image_size


def fill_parts(config: Any, text: type, vision: type) -> None:
    """Gives a config of two the defaults of those it lacks; called in its ``__post_init__``.

    Args:
        config: with ``text_config`` and ``vision_config``.
        text, vision: what these must be.

    Raises:
        ValueError: one is of another family, or contradicts what an old file says besides.
    """
    problems = []
    for name, kind in (("text_config", text), ("vision_config", vision)):
        old = f"{name}_dict"
        again = (
            getattr(config, old) if old in {f.name for f in dataclasses.fields(config)} else None
        )
        part = getattr(config, name)
        if part is None:
            part = kind() if again is None else again
        if not isinstance(part, kind):
            problems.append(f"{name}={part!r} must be a {kind.__module__}.Config")
        elif again not in (None, part):
            problems.append(f"{old}={again!r} contradicts {name}={part!r}; delete the wrong one")
        object.__setattr__(config, name, part)
        if again is not None:
            object.__setattr__(config, old, None)
    if problems:
        raise ValueError(
            f"{type(config).__module__.rpartition('.')[2]} config: " + "; ".join(problems)
        )


MODEL_TYPE = "clip"
HEADS = {
    "model": "CLIPModel",
    "text_with_projection": "CLIPTextModelWithProjection",
    "vision_with_projection": "CLIPVisionModelWithProjection",
    "image_classification": "CLIPForImageClassification",
}


def _published(text: str, vision: str) -> Config:
    config = clip_vision_model.VARIANTS[vision]
    return Config(clip_text_model.VARIANTS[text], config, projection_dim=config.projection_dim)


# Radford et al. 2021, tables 19 and 20.
VARIANTS = {
    "tiny": _published("tiny", "tiny"),
    "b32": _published("b32", "b32"),
    "b16": _published("b32", "b16"),
    "l14": _published("l14", "l14"),
    "l14-336": _published("l14", "l14-336"),
}


class Model(DualEncoder):
    """CLIP with one head; see `fmjax.nn.dual_encoder.DualEncoder`."""

    heads = HEADS

    def text_tower(self, **fields: Any) -> nn.Module:
        options = {"scan": self.scan, "remat": self.remat, **fields}
        return clip_text_model.Model(self.config.text_config, **options)

    def vision_tower(self) -> nn.Module:
        return clip_vision_model.Model(self.config.vision_config, scan=self.scan, remat=self.remat)

    def prepare(self) -> None:
        config = self.config
        width = config.projection_dim
        self.text_projection = clip_text_model.projection(config.text_config, width, None)
        self.vision_projection = clip_text_model.projection(config.vision_config, width, None)
        if self.head == "image_classification":
            std = config.vision_config.hidden_size**-0.5 * config.initializer_factor
            labels = len(config.id2label)
            self.classifier = Dense(labels, kernel_init=nn.initializers.normal(std), name="head")
        if self.head == "model":
            init = nn.initializers.constant(config.logit_scale_init_value)
            self.logit_scale = parameter(self, "logit_scale", init, ())

    def text_space(self, pooled: Array) -> Array:
        return self.text_projection(pooled)

    def vision_space(self, pooled: Array) -> Array:
        return self.vision_projection(pooled)

    def scoring(self) -> tuple[Array, Array | None]:
        return jnp.exp(self.logit_scale.astype(jnp.float32)), None

    def patches(self, hidden: Array) -> Array:
        return hidden[:, self.vision.tokens :]

    def classify(self, x: Array) -> Array:
        return self.classifier(x).astype(jnp.float32)


def inputs(config: Any, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    texts = clip_text_model.inputs(config.text_config, "model")
    pictures = clip_vision_model.inputs(config.vision_config, "model")
    return {"model": texts | pictures, "text_with_projection": texts}.get(head, pictures)


PREFIX = ""
FIXED: dict[str, Any] = {"tie_word_embeddings": ...}
IGNORED = clip_text_model.IGNORED
from_tensors = config_alone


def rules(config: Any, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    table = []
    if head in ("model", "text_with_projection"):
        table += nested_rules(clip_text_model.body_rules(""), "text", "text_model")
        table += dense_rules("text_projection", "text_projection", bias=False)
    if head != "text_with_projection":
        table += nested_rules(clip_vision_model.body_rules(""), "vision", "vision_model")
    if head in ("model", "vision_with_projection"):
        table += dense_rules("vision_projection", "visual_projection", bias=False)
    if head == "model":
        table.append(Rule("params/logit_scale", "logit_scale"))
    return table + (dense_rules("head", "classifier") if head == "image_classification" else [])
