"""ViT against transformers: heads, other image sizes, the recorded fixture, published sizes."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from parity import check_defaults, check_fixture, check_head, check_sizes
from pictures import SMALL, images, without_labels

import fmjax
from fmjax.models import vit
from fmjax.nn.vision import cubic_resampling, patchify, unpatchify
from fmjax.tree import count_parameters

FIXTURES = Path(__file__).parents[1] / "fixtures"
UNUSUAL = dataclasses.replace(
    SMALL, qkv_bias=False, hidden_act="relu", pooler_act="gelu", pooler_output_size=7
)


@pytest.mark.parametrize("config", [SMALL, UNUSUAL], ids=["small", "unusual"])
@pytest.mark.parametrize("head", vit.HEADS)
def test_equals_pytorch(head, config, tmp_path):
    masked = head == "masked_image_modeling"
    check_head(vit, without_labels(config, head), head, tmp_path, images(config, masked=masked))


@pytest.mark.parametrize(("rows", "columns"), [(26, 31), (10, 16)])
def test_positions_of_other_sizes_equal_pytorch(rows, columns, tmp_path):
    """Larger, smaller, not square, and with pixels to spare at the edge."""

    def prepare(twin):
        twin.forward = partial(twin.forward, interpolate_pos_encoding=True)

    inputs = images(SMALL, rows=rows, columns=columns)
    check_head(vit, SMALL, "image_classification", tmp_path, inputs, prepare=prepare)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("old", "new"), [(3, 8), (8, 3), (7, 6), (1, 4), (16, 5)])
def test_resampling_equals_pytorch(old, new, antialias):
    rows = torch.eye(old, dtype=torch.float64)[None, :, :, None].repeat(1, 1, 1, 3)
    theirs = torch.nn.functional.interpolate(
        rows, size=(new, 3), mode="bicubic", align_corners=False, antialias=antialias
    )  # each position alone, by channel
    ours = cubic_resampling(old, new, antialias=antialias)
    np.testing.assert_allclose(ours, theirs[0, :, :, 0].numpy().T, atol=1e-6)


def test_patches_are_put_together_again():
    pixels = np.random.default_rng(0).normal(size=(2, 6, 8, 3)).astype(np.float32)
    patches = patchify(pixels, (2, 4))
    np.testing.assert_array_equal(patches[1, 3].reshape(2, 4, 3), pixels[1, 2:4, 4:8])
    np.testing.assert_array_equal(unpatchify(patches, (3, 2), (2, 4)), pixels)


def test_the_flax_fixture_equals_pytorch():
    check_fixture(FIXTURES / "vit-cls")


def test_published_sizes():
    check_sizes(vit, dict.fromkeys(vit.VARIANTS, "ViTModel"))
    # Steiner et al. 2021, table 2, in millions, with 1,000 classes.
    names = tuple(map(str, range(1000)))
    for variant, millions in (("ti16", 5.7), ("s16", 22.1), ("b16", 86.6), ("l16", 304.3)):
        config = dataclasses.replace(vit.VARIANTS[variant], id2label=names)
        model = vit.Model(config, head="image_classification")
        count = count_parameters(fmjax.hub.abstract_variables(model))
        assert round(count / 1e6, 1) == millions


def test_config_defaults_are_transformers_defaults():
    check_defaults(vit)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="hidden_size=10") as error:
        vit.Config(hidden_size=10, patch_size=(3, 3, 3), hidden_act="bump", pooler_act="bang")
    for words in ("patch_size=(3, 3, 3)", "hidden_act='bump'", "pooler_act='bang'"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="patch_size=16 does not fit into image_size=8"):
        vit.Config(image_size=8)
    model, variables = fmjax.create("vit", "tiny", rng=jax.random.key(0))
    run = partial(model.apply, variables)
    with pytest.raises(ValueError, match=r"must be \[B, X, Y, 3\], channels last"):
        run(np.zeros((2, 3, 8, 8)))
    with pytest.raises(ValueError, match="smaller than a patch of 4"):
        run(np.zeros((2, 8, 3, 3)))
    with pytest.raises(ValueError, match=r"must be \(2, 4\)"):
        run(np.zeros((2, 8, 8, 3)), np.zeros((2, 5)))
    with pytest.raises(ValueError, match="needs a model with a vector for masked patches"):
        run(np.zeros((2, 8, 8, 3)), np.zeros((2, 4)))
