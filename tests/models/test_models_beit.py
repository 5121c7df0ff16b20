"""BEiT against transformers: relative positions, heads, other image sizes, segmentation."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from parity import (
    check_defaults,
    check_head,
    check_old_file,
    check_sizes,
    check_training,
)
from pictures import images, without_labels

import fmjax
from fmjax.models import beit
from fmjax.tree import count_parameters, stack_layers

OWN = beit.Config(
    vocab_size=11, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=20, image_size=15, patch_size=5, num_channels=2, use_mask_token=True,
    use_relative_position_bias=True, layer_scale_init_value=0.5, id2label=("a", "b", "c"),
)  # fmt: skip
SHARED = dataclasses.replace(
    OWN, use_relative_position_bias=False, use_shared_relative_position_bias=True,
    use_absolute_position_embeddings=True, use_mean_pooling=False, layer_scale_init_value=0.0,
    hidden_act="relu",
)  # fmt: skip
BOTH = dataclasses.replace(
    OWN, use_shared_relative_position_bias=True, use_absolute_position_embeddings=True,
    use_mask_token=False,
)  # fmt: skip
SEGMENTS = dataclasses.replace(
    OWN, num_hidden_layers=3, image_size=20, out_indices=(0, 1, 2, 3), auxiliary_channels=7,
    auxiliary_num_convs=2, auxiliary_concat_input=True, pool_scales=(1, 2),
)  # fmt: skip
CASES = {
    "model": (OWN, {"rows": 21, "columns": 32}),  # larger, not square, pixels to spare
    "masked_image_modeling": (SHARED, {"rows": 10, "columns": 15, "masked": True}),
    "image_classification": (BOTH, {}),
}


@pytest.mark.parametrize("head", CASES)
def test_equals_pytorch(head, tmp_path):
    config, size = CASES[head]
    config = without_labels(config, head)
    check_head(beit, config, head, tmp_path, images(config, **size))


def test_without_pooler_equals_pytorch(tmp_path):
    """A body cut out of a model that had none."""

    def prepare(twin):
        twin.pooler = None

    config = dataclasses.replace(without_labels(SHARED, "model"), use_mean_pooling=True)
    config = dataclasses.replace(config, add_pooling_layer=False)
    check_head(
        beit, config, "model", tmp_path, images(config, masked=True), prepare=prepare,
        unused=("pooler.layernorm.weight", "pooler.layernorm.bias"),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.slow), True])
def test_segmentation_equals_pytorch(train, tmp_path):
    """Both heads, their gradients, and the running statistics they leave."""
    config = dataclasses.replace(SEGMENTS, drop_path_rate=0.0)
    inputs, head = images(config, rows=20, columns=25), "semantic_segmentation"
    if train:
        check_training(
            beit, config, head, tmp_path, inputs, earlier=("auxiliary_head",),
            # Measured: 2.7e-5, of a convolution before a norm over one value an image.
            gradient_tolerance=5e-5,
        )  # fmt: skip
    else:
        check_head(beit, config, head, tmp_path, inputs)


def test_files_of_version_4_load(tmp_path):
    """They have the constant index of each pair's relative position."""
    place = "beit.encoder.layer.{}.attention.attention.relative_position_bias"
    extra = [f"{place.format(i)}.relative_position_index" for i in range(2)]
    check_old_file(beit, OWN, "image_classification", tmp_path, extra=extra)


def test_published_sizes():
    check_sizes(beit, dict.fromkeys(beit.VARIANTS, "BeitModel"))
    # timm's counts of the same models, in millions, with 1,000 classes.
    counts = {"b16": 86.53, "b16-384": 86.74, "l16": 304.43, "l16-384": 305.00, "l16-512": 305.67}
    for variant, millions in counts.items():
        model = beit.Model(beit.VARIANTS[variant])
        count = count_parameters(fmjax.hub.abstract_variables(model))
        count += (model.config.hidden_size + 1) * 1000
        assert round(count / 1e6, 2) == millions, variant


def test_config_defaults_are_transformers_defaults():
    check_defaults(beit)


def test_layers_are_dropped_more_often_the_deeper(tmp_path):
    """Scanned too: the first layer's branches always stay, and of the last a share is left out."""
    config = dataclasses.replace(
        without_labels(OWN, "model"), drop_path_rate=0.5, use_mask_token=False
    )
    model, variables = fmjax.create("beit", config, rng=jax.random.key(0))
    pixels = np.repeat(images(config)["pixel_values"][:1], 64, axis=0)

    @partial(jax.jit, static_argnums=0)
    def run(model, variables):
        rngs = {"dropout": jax.random.key(1)}
        return model.apply(variables, pixels, train=True, output_hidden_states=True, rngs=rngs)

    for scan in (False, True):
        stacked = stack_layers(variables) if scan else variables
        states = run(model.clone(scan=scan), stacked).hidden_states
        first, last = np.asarray(states[1]), np.asarray(states[2])
        assert np.abs(first - first[:1]).max() < 1e-6
        stayed = np.abs(last - first).max(axis=(1, 2)) < 1e-6  # both branches left out: a quarter
        assert 0.05 < stayed.mean() < 0.5


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="out_indices=") as error:
        dataclasses.replace(OWN, out_indices=(1, 7), auxiliary_num_convs=0, hidden_size=10)
    for words in ("auxiliary_num_convs=0", "hidden_size=10"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="reads four layers"):
        fmjax.create("beit", OWN, head="semantic_segmentation", rng=jax.random.key(0))
