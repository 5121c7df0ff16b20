"""SegFormer against transformers: heads, odd images, training's statistics, published sizes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from parity import check_defaults, check_head, check_sizes, check_training
from pictures import images, without_labels

import fmjax
from fmjax.models import segformer
from fmjax.nn.dropout import DropPath
from fmjax.nn.vision import resize
from fmjax.tree import count_parameters

# Sizes that no wrong transpose survives.
SMALL = segformer.Config(
    num_channels=2, num_encoder_blocks=2, depths=(1, 1), sr_ratios=(2, 1), hidden_sizes=(6, 8),
    patch_sizes=(7, 3), strides=(4, 2), num_attention_heads=(3, 2), mlp_ratios=(3, 2),
    decoder_hidden_size=5, id2label=("a", "b", "c"),
)  # fmt: skip
# PyTorch takes the sides of a last stage that is not reshaped for the root of its width.
UNUSUAL = dataclasses.replace(
    SMALL, depths=(2, 1), hidden_sizes=(4, 16), num_attention_heads=(2, 1), patch_sizes=(4, 3),
    strides=(2, 2), sr_ratios=(3, 2), hidden_act="relu", reshape_last_stage=False,
)  # fmt: skip


@pytest.mark.parametrize("head", ["image_classification", "semantic_segmentation"])
def test_equals_pytorch(head, tmp_path):
    """Images of no special size, with pixels to spare at the edges of every grid."""
    inputs = images(SMALL, rows=19, columns=26)
    check_head(segformer, SMALL, head, tmp_path, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["model", "semantic_segmentation"])
def test_unusual_configs_equal_pytorch(head, tmp_path):
    config = UNUSUAL if head != "model" else without_labels(UNUSUAL, head)
    check_head(segformer, config, head, tmp_path, images(config, rows=14, columns=14))


def test_training_equals_pytorch(tmp_path):
    config = dataclasses.replace(SMALL, drop_path_rate=0.0, classifier_dropout_prob=0.0)
    inputs = images(config, rows=19, columns=26)
    check_training(segformer, config, "semantic_segmentation", tmp_path, inputs)


@pytest.mark.parametrize("size", [(9, 4), (2, 21), (5, 7), (1, 1)])
def test_images_are_resized_as_in_pytorch(size):
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(x).movedim(-1, 1), size=size, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(resize(x, size), theirs.movedim(1, -1), atol=1e-6)


@pytest.mark.slow
def test_rates_of_stochastic_depth_rise_block_by_block():
    """A rate that is an array drops as one that is a number; the first block drops nothing."""
    x = np.ones((1000, 3), np.float32)
    run = {"rngs": {"dropout": jax.random.key(0)}}
    fixed = DropPath(0.25).apply({}, x, True, **run)
    np.testing.assert_array_equal(DropPath(jax.numpy.array(0.25)).apply({}, x, True, **run), fixed)
    assert 0.2 < float((fixed == 0).mean()) < 0.3
    config = dataclasses.replace(SMALL, drop_path_rate=0.9, num_channels=1, sr_ratios=(1, 1))
    model, variables = fmjax.create("segformer", config, rng=jax.random.key(0))
    pixels = np.random.default_rng(0).normal(size=(1, 8, 8, 1)).astype(np.float32).repeat(64, 0)

    @jax.jit
    def states(variables, rng):
        run = {"train": True, "output_hidden_states": True, "rngs": {"dropout": rng}}
        return model.apply(variables, pixels, **run).hidden_states

    kinds = [
        len(np.unique(np.round(np.asarray(state), 4), axis=0))
        for state in states(variables, jax.random.key(0))
    ]
    assert kinds[0] == 1
    assert 2 <= kinds[1] <= 4  # either branch is there or not


def test_published_sizes():
    check_sizes(segformer, dict.fromkeys(segformer.VARIANTS, "SegformerModel"))
    # Xie et al. 2021, table 1: millions of the encoder and the decoder for ADE20K's 150 classes.
    names = tuple(map(str, range(150)))
    for variant, millions in (("b0", 3.8), ("b2", 27.5)):
        config = dataclasses.replace(segformer.VARIANTS[variant], id2label=names)
        model = segformer.Model(config, head="semantic_segmentation")
        count = count_parameters(fmjax.hub.abstract_variables(model))
        assert count / 1e6 == pytest.approx(millions, abs=0.1), variant


def test_config_defaults_are_transformers_defaults():
    check_defaults(segformer)


def test_keys_of_old_configs_are_read_over(tmp_path):
    """As the published checkpoints have them; the encoder alone is enough for another head."""
    model, variables = fmjax.create(
        "segformer", "tiny", head="image_classification", rng=jax.random.key(0)
    )
    fmjax.save(tmp_path, model, variables)
    data = json.loads((tmp_path / "config.json").read_text())
    old = {"image_size": 224, "downsampling_rates": [1, 4], "layer_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(data | old))
    other, read = fmjax.load(
        tmp_path, head="semantic_segmentation", num_labels=["sky", "sea", "land"], new=("head/",)
    )
    assert other.config.id2label == ("sky", "sea", "land")
    kernel = variables["params"]["stages_1"]["embed"]["kernel"]
    np.testing.assert_array_equal(read["params"]["stages_1"]["embed"]["kernel"], kernel)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="strides=") as error:
        segformer.Config(strides=(4, 2), depths=(0, 1, 1, 1), hidden_act="bump", drop_path_rate=1.0)
    for words in ("num_encoder_blocks=4", "depths=(0, 1, 1, 1)", "hidden_act", "drop_path_rate"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="hidden_sizes=160 is not a multiple of num_attention"):
        segformer.Config(num_attention_heads=(1, 2, 3, 8))
    model, variables = fmjax.create("segformer", "tiny", rng=jax.random.key(0))
    with pytest.raises(ValueError, match=r"must be \[B, X, Y, 3\], channels last"):
        model.apply(variables, np.zeros((2, 3, 8, 8)))
    with pytest.raises(ValueError, match=r"images of \(8, 4\) are too small: the grid \(2, 1\)"):
        model.apply(variables, np.zeros((2, 8, 4, 3)))
    with pytest.raises(ValueError, match="no head 'masked_lm'"):
        model.clone(head="masked_lm").apply(variables, np.zeros((2, 8, 8, 3)))
