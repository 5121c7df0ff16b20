"""The small CNN of every introduction: convolutions, pooling, a dense layer.

After LeCun et al. 1998, "Gradient-based learning applied to document recognition", with today's
activation and pooling.

It is a small VGG: the same file layout, so that PyTorch's Sequential loads what it saves.
"""

from __future__ import annotations

import dataclasses

from fmjax.models import vgg
from fmjax.models.vgg import FIXED, IGNORED, PREFIX, from_tensors, inputs, rules

__all__ = ["FIXED", "IGNORED", "PREFIX", "from_tensors", "inputs", "rules"]


@dataclasses.dataclass(frozen=True)
class Config(vgg.Config):
    """The fields of config.json, our own; see `fmjax.models.vgg.Config`."""

    num_channels: int = 1
    image_size: int | tuple[int, ...] = 28
    hidden_sizes: tuple[int, ...] = (32, 64)
    depths: tuple[int, ...] = (1, 1)
    dense_sizes: tuple[int, ...] = (256,)
    id2label: tuple[str, ...] = tuple("0123456789")


MODEL_TYPE = "cnn"
HEADS = {"model": "CNNModel", "image_classification": "CNNForImageClassification"}
VARIANTS = {
    "tiny": Config(
        image_size=8, hidden_sizes=(4, 6), pooled_size=2, dense_sizes=(10,), dropout=0.1
    ),
    "mnist": Config(),  # 28 x 28 gray pixels; the sizes of most introductions
}


class Model(vgg.Model):
    """The CNN with one head; see `fmjax.models.vgg.Model`."""

    config: Config
