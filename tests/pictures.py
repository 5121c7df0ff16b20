"""What the tests of vision families share: a small config, images, masks."""

import dataclasses

import numpy as np

from fmjax.models import vit
from fmjax.nn.vision import grid_of, pair

# Sizes that no wrong transpose survives.
SMALL = vit.Config(
    hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
    image_size=15, patch_size=5, encoder_stride=5, num_channels=2, id2label=("a", "b", "c"),
)  # fmt: skip


def without_labels(config, head):
    """As a head without labels saves it."""
    if "classification" in head:
        return config
    return dataclasses.replace(config, id2label=("LABEL_0", "LABEL_1"))


def images(config, *, rows=15, columns=15, masked=False):
    """Random images, and which of their patches are masked."""
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, rows, columns, config.num_channels)).astype(np.float32)
    if not masked:
        return {"pixel_values": pixels}
    grid = grid_of((rows, columns), pair(config.patch_size))
    return {"pixel_values": pixels, "bool_masked_pos": rng.random((2, grid[0] * grid[1])) < 0.4}
