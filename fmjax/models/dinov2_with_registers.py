"""DINOv2 with register tokens (Darcet et al. 2023, arXiv:2309.16588). HF "dinov2_with_registers".

Positions of smaller images are smoothed where they get fewer, which plain DINOv2's are not.
"""

from __future__ import annotations

import dataclasses

from jax import Array

from fmjax.models import config_alone, dinov2
from fmjax.models.dinov2 import FIXED, IGNORED, inputs
from fmjax.weights import Rule

__all__ = ["FIXED", "IGNORED", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config(dinov2.Config):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    patch_size: int | tuple[int, ...] = 16
    num_register_tokens: int = 4
    # Every checkpoint has the vector; Hugging Face's files have no such key.
    use_mask_token: bool = dataclasses.field(default=True, metadata={"saved": False})


MODEL_TYPE = "dinov2_with_registers"
HEADS = {head: name.replace("Dinov2", "Dinov2WithRegisters") for head, name in dinov2.HEADS.items()}
# Darcet et al. 2023, section 3: DINOv2's sizes with 4 registers.
VARIANTS = {
    name: Config(**({"image_size": 518, "patch_size": 14} | size))
    for name, size in dinov2.SIZES.items()
}


class Model(dinov2.Model):
    """DINOv2 with registers and one head; see `fmjax.nn.vision.VisionEncoder`."""

    heads = HEADS

    @property
    def tokens(self) -> int:
        return 1 + self.config.num_register_tokens

    def embed_images(self, pixel_values: Array, masked: Array | None, train: bool) -> Array:
        embed = self.embeddings_with(
            mask_shape=(1,), registers=self.config.num_register_tokens, antialias=True
        )
        return embed(pixel_values, masked, train)


PREFIX = "dinov2_with_registers."
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    return [
        *dinov2.body_rules(config, head, body),
        Rule("params/embed/mask", f"{body}embeddings.mask_token"),
        Rule("params/embed/registers", f"{body}embeddings.register_tokens"),
    ]
