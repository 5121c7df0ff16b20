"""DINOv2, with registers and without, against transformers."""

import dataclasses

import pytest
from parity import check_defaults, check_head, check_sizes
from pictures import images, without_labels

from fmjax.models import dinov2, dinov2_with_registers

SMALL = {
    "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 15,
    "patch_size": 5, "num_channels": 2, "layerscale_value": 0.5, "id2label": ("a", "b", "c"),
}  # fmt: skip
PLAIN = dinov2.Config(**SMALL)
GATED = dataclasses.replace(PLAIN, use_swiglu_ffn=True, qkv_bias=False, use_mask_token=False)
REGISTERS = dinov2_with_registers.Config(**SMALL, num_register_tokens=3)
CASES = {
    "plain": (dinov2, PLAIN),
    "gated": (dinov2, GATED),
    "registers": (dinov2_with_registers, REGISTERS),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("head", dinov2.HEADS)
def test_equals_pytorch(head, name, tmp_path):
    """Images of other sizes too: larger ones, and smaller ones, whose positions are smoothed."""
    family, config = CASES[name]
    size = {"rows": 26, "columns": 31} if head == "model" else {"rows": 11, "columns": 10}
    check_head(family, without_labels(config, head), head, tmp_path, images(config, **size))


@pytest.mark.parametrize("name", ["plain", "registers"])
def test_masked_patches_equal_pytorch(name, tmp_path):
    family, config = CASES[name]
    config = without_labels(config, "model")
    check_head(family, config, "model", tmp_path, images(config, masked=True))


@pytest.mark.parametrize("family", [dinov2, dinov2_with_registers])
def test_published_sizes(family):
    check_sizes(family, dict.fromkeys(family.VARIANTS, family.HEADS["model"]))


@pytest.mark.parametrize("family", [dinov2, dinov2_with_registers])
def test_config_defaults_are_transformers_defaults(family):
    check_defaults(family)
