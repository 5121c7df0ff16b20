"""DeiT (Touvron et al. 2020, arXiv:2012.12877): ViT with a distillation token. HF "deit"."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jax import Array

from fmjax.models import vit
from fmjax.models.vit import FIXED, IGNORED, inputs
from fmjax.types import Output
from fmjax.weights import Rule, dense_rules

__all__ = ["FIXED", "IGNORED", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config(vit.Config):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""


MODEL_TYPE = "deit"
HEADS = {head: name.replace("ViT", "DeiT") for head, name in vit.HEADS.items()} | {
    "image_classification_with_teacher": "DeiTForImageClassificationWithTeacher",
}
VARIANTS = {"tiny": Config(**dataclasses.asdict(vit.VARIANTS["tiny"]))} | {
    # Touvron et al. 2020, table 1.
    name: Config(
        hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, image_size=image
    )
    for name, width, heads, image in (
        ("ti16", 192, 3, 224),
        ("s16", 384, 6, 224),
        ("b16", 768, 12, 224),
        ("b16-384", 768, 12, 384),
    )
}


class Model(vit.Model):
    """DeiT with one head; see `fmjax.nn.vision.VisionEncoder`."""

    heads = HEADS

    @property
    def tokens(self) -> int:
        return 2

    def embed_images(self, pixel_values: Array, masked: Array | None, train: bool) -> Array:
        return self.embeddings(("cls", "distillation"))(pixel_values, masked, train)

    def outputs(self, hidden: Array, grid: tuple[int, int]) -> Output:
        if self.head != "image_classification_with_teacher":
            return super().outputs(hidden, grid)
        first = self.classify("cls_head", hidden[:, 0])
        second = self.classify("distillation_head", hidden[:, 1])
        # Section 4, "Classification with our approach": the two agree on the sum.
        return Output(logits=(first + second) / 2, cls_logits=first, distillation_logits=second)


PREFIX = "deit."


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell: whether "model" has a pooler."""
    return vit.told_pooler(config, head, names, PREFIX)


def rules(config: Any, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    table = vit.body_rules(config, head, body)
    table.append(Rule("params/embed/distillation", f"{body}embeddings.distillation_token"))
    if head != "image_classification_with_teacher":
        return table + vit.head_rules(config, head, body)
    return [
        *table,
        *dense_rules("cls_head", "cls_classifier"),
        *dense_rules("distillation_head", "distillation_classifier"),
    ]
