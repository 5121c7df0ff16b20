"""Swin against transformers: windows, shifts, odd sizes, merged patches, published sizes."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from parity import assert_near, check_defaults, check_head, check_old_file, check_sizes
from pictures import images, without_labels

import fmjax
from fmjax.models import swin
from fmjax.tree import count_parameters, flatten, unflatten

SMALL = swin.Config(
    image_size=20, patch_size=2, num_channels=2, embed_dim=6, depths=(2, 1), num_heads=(2, 4),
    window_size=3, mlp_ratio=1.5, encoder_stride=4, use_absolute_embeddings=True,
    id2label=("a", "b", "c"),
)  # fmt: skip
# Of the three stages the second has windows that the grid is no multiple of, in both directions,
# and the last a grid as low as its windows, which do not move.
DEEP = dataclasses.replace(
    SMALL, depths=(1, 2, 2), num_heads=(1, 3, 2), use_absolute_embeddings=False, qkv_bias=False,
    hidden_act="relu",
)  # fmt: skip


def interpolating(twin):
    twin.forward = partial(twin.forward, interpolate_pos_encoding=True)


def test_equals_pytorch(tmp_path):
    """Pixels to spare, odd grids, three stages."""
    config = without_labels(DEEP, "model")
    check_head(swin, config, "model", tmp_path, images(config, rows=19, columns=27))


def test_masked_image_modeling_equals_pytorch(tmp_path):
    head = "masked_image_modeling"
    config = without_labels(SMALL, head)
    check_head(swin, config, head, tmp_path, images(config, rows=20, columns=20, masked=True))


def test_positions_of_other_sizes_equal_pytorch(tmp_path):
    inputs = images(SMALL, rows=14, columns=22)
    check_head(swin, SMALL, "image_classification", tmp_path, inputs, prepare=interpolating)


def test_windows_larger_than_the_grid_have_the_smaller_offsets():
    """As a model whose windows are the grid and whose table is the middle of the larger one."""
    config = dataclasses.replace(SMALL, depths=(2,), num_heads=(2,), window_size=5)
    model, variables = fmjax.create("swin", config, rng=jax.random.key(0))
    flat = flatten(variables)
    rng = np.random.default_rng(0)
    tables = [path for path in flat if "relative_bias" in path]
    assert len(tables) == 2
    smaller = dict(flat)
    for path in tables:
        flat[path] = table = rng.normal(size=flat[path].shape).astype(np.float32)
        smaller[path] = table.reshape(9, 9, 2)[2:7, 2:7].reshape(25, 2)
    pixels = images(config, rows=6, columns=8)["pixel_values"]
    run = jax.jit(lambda m, v: m.apply(v, pixels).last_hidden_state, static_argnums=0)
    ours = run(model, unflatten(flat))
    model = model.clone(config=dataclasses.replace(config, window_size=3))
    assert_near(ours, run(model, unflatten(smaller)), "hidden")


def test_files_of_version_4_load(tmp_path):
    """They have the constant index of each pair's offset."""
    place = "swin.encoder.layers.0.blocks.{}.attention.self.relative_position_index"
    extra = [place.format(i) for i in range(2)]
    check_old_file(swin, SMALL, "image_classification", tmp_path, extra=extra)


def test_published_sizes():
    check_sizes(swin, dict.fromkeys(swin.VARIANTS, "SwinModel"))
    # Liu et al. 2021, table 1 (28, 50, 88 and 197), with timm's digits, in millions, with 1,000
    # classes.
    counts = {"t4-w7": 28.3, "s4-w7": 49.6, "b4-w7": 87.8, "b4-w12": 87.9, "l4-w12": 196.7}
    for variant, millions in counts.items():
        model = swin.Model(swin.VARIANTS[variant])
        count = count_parameters(fmjax.hub.abstract_variables(model))
        count += (model.config.hidden_size + 1) * 1000
        assert round(count / 1e6, 1) == millions, variant


def test_config_defaults_are_transformers_defaults():
    check_defaults(swin)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one number a stage") as error:
        swin.Config(num_heads=(3, 5), patch_size=(3, 3, 3), window_size=0, hidden_act="bump")
    for words in ("5 does not divide the 192", "patch_size=", "window_size=0", "'bump'"):
        assert words in str(error.value)
    model, variables = fmjax.create("swin", "tiny", rng=jax.random.key(0))
    with pytest.raises(ValueError, match=r"must be \[B, X, Y, 3\], channels last"):
        model.apply(variables, np.zeros((2, 3, 8, 8)))
    with pytest.raises(ValueError, match=r"must be \(2, 20\)"):
        model.apply(variables, np.zeros((2, 7, 9, 3)), np.zeros((2, 5)))
    with pytest.raises(ValueError, match="needs the head 'masked_image_modeling'"):
        model.apply(variables, np.zeros((2, 8, 8, 3)), np.zeros((2, 16)))
