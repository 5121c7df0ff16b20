"""ViT-MAE against transformers: masking, decoder, other image sizes, names of files."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from parity import check_defaults, check_head, check_old_file, check_sizes, torch_twin
from pictures import images
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

import fmjax
from fmjax.models import vit_mae

SMALL = vit_mae.Config(
    hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
    image_size=20, patch_size=5, num_channels=2, decoder_hidden_size=8,
    decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=14,
    mask_ratio=0.6,
)  # fmt: skip


def noisy(config, **size):
    """Images and the noise that masks them."""
    inputs = images(config, masked=True, **size)
    shape = inputs.pop("bool_masked_pos").shape
    return inputs | {"noise": np.random.default_rng(1).random(shape).astype(np.float32)}


@pytest.mark.parametrize("head", vit_mae.HEADS)
def test_equals_pytorch(head, tmp_path):
    check_head(vit_mae, SMALL, head, tmp_path, noisy(SMALL, rows=20, columns=20))


def test_positions_of_other_sizes_equal_pytorch(tmp_path):
    """Of the encoder; PyTorch resamples the decoder's as if the grid were one line, row after row,
    which is not what the grid is."""

    def prepare(twin):
        twin.forward = partial(twin.forward, interpolate_pos_encoding=True)

    inputs = noisy(SMALL, rows=26, columns=31)
    check_head(vit_mae, SMALL, "model", tmp_path, inputs, prepare=prepare)


def test_the_mask_is_pytorchs(tmp_path):
    twin = torch_twin(vit_mae, SMALL, "pretraining")
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    inputs = noisy(SMALL, rows=20, columns=20)
    out = model.apply(variables, **inputs)
    theirs = twin(
        torch.tensor(inputs["pixel_values"]).movedim(-1, 1), noise=torch.tensor(inputs["noise"])
    )
    np.testing.assert_array_equal(out.mask, theirs.mask)
    np.testing.assert_array_equal(out.ids_restore, theirs.ids_restore)
    assert out.mask.sum(axis=1).tolist() == [10, 10]  # of 16, of which int(16 * 0.4) are seen


def test_without_noise_all_patches_are_seen(tmp_path):
    """As PyTorch's with mask_ratio=0 and noise in order."""
    twin = torch_twin(vit_mae, dataclasses.replace(SMALL, mask_ratio=0.0), "model")
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    pixels = images(SMALL, rows=20, columns=20)["pixel_values"]
    out = model.apply(variables, pixels)
    theirs = twin(
        torch.tensor(pixels).movedim(-1, 1), noise=torch.arange(16.0).repeat(2, 1)
    ).last_hidden_state
    np.testing.assert_allclose(out.last_hidden_state, theirs.detach(), atol=2e-5)
    assert out.mask.sum() == 0


def test_sinusoids_are_transformers():
    """Of its function: its new models have zeros, as its initialisation skips them (5.24)."""
    config = dataclasses.replace(SMALL, image_size=(15, 20))
    theirs = build_2d_sinusoidal_position_embedding(3, 4, 16, cls_token=True)
    rows, columns = theirs[:, :8], theirs[:, 8:]
    theirs = torch.cat([columns, rows], dim=1)  # as its models put it
    np.testing.assert_allclose(vit_mae.positions(config, 16)[0], theirs, atol=1e-6)


def test_the_hubs_names_of_the_decoder_load(tmp_path):
    def rename(name):
        return name.replace("decoder_encoder.layer", "decoder_layers")

    check_old_file(vit_mae, SMALL, "pretraining", tmp_path, rename=rename)


def test_published_sizes():
    check_sizes(vit_mae, dict.fromkeys(vit_mae.VARIANTS, "ViTMAEModel"))


def test_config_defaults_are_transformers_defaults():
    check_defaults(vit_mae)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"mask_ratio=1.0") as error:
        dataclasses.replace(SMALL, mask_ratio=1.0, decoder_hidden_size=9, hidden_size=6)
    for words in ("decoder_hidden_size=9 is not", "decoder_hidden_size=9 must", "hidden_size=6"):
        assert words in str(error.value)
