"""Masked image modelling against transformers' losses, and the masks."""

import jax
import numpy as np
import pytest
import torch
from parity import assert_near, torch_twin
from pictures import SMALL

import fmjax
from fmjax.models import beit, deit, swin, vit
from fmjax.tasks import masked_image_modelling as task

SIZES = {
    "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20,
    "image_size": 20, "patch_size": 5, "num_channels": 2,
}  # fmt: skip
CASES = {
    "vit": (vit, vit.Config(**SIZES, encoder_stride=5)),
    "deit": (deit, deit.Config(**SIZES, encoder_stride=5)),
    "swin": (
        swin,
        swin.Config(
            image_size=20, patch_size=5, num_channels=2, embed_dim=6, depths=(1, 1),
            num_heads=(2, 2), window_size=2, encoder_stride=10,
        ),
    ),
    "beit": (
        beit,
        beit.Config(**SIZES, vocab_size=7, use_mask_token=True, use_relative_position_bias=True),
    ),
}  # fmt: skip


def batch_of(name):
    rng = np.random.default_rng(0)
    batch = {
        "pixel_values": rng.normal(size=(3, 20, 20, 2)).astype(np.float32),
        "bool_masked_pos": rng.random((3, 16)) < 0.4,
        "weight": np.ones(3, np.float32),
    }
    return batch | ({"labels": rng.integers(0, 7, (3, 16))} if name == "beit" else {})


@pytest.mark.parametrize("name", CASES)
def test_loss_equals_pytorch(name, tmp_path):
    family, config = CASES[name]
    twin = torch_twin(family, config, "masked_image_modeling").double()
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
    batch = batch_of(name)
    masked = torch.tensor(batch["bool_masked_pos"])
    extra = {}
    if name == "beit":
        batch["labels"][1, np.flatnonzero(masked[1])[0]] = -100
        extra = {"labels": torch.tensor(batch["labels"])[masked]}
    pixels = torch.tensor(batch["pixel_values"]).double().movedim(-1, 1)
    theirs = twin(pixels, bool_masked_pos=masked, **extra)
    loss = jax.jit(task.loss(model, train=False))
    value, aux = loss(variables, batch, None)
    np.testing.assert_allclose(value, float(theirs.loss.detach()), rtol=1e-5)
    assert float(aux.weight) == int(masked.sum()) - (name == "beit")
    predicted = task.predict(model)(variables, batch)
    if name == "beit":
        np.testing.assert_array_equal(predicted, theirs.logits.argmax(-1))
        right = (np.asarray(predicted) == batch["labels"])[batch["bool_masked_pos"]]
        accuracy = aux.metrics["masked_accuracy"].value
        np.testing.assert_allclose(accuracy, right.sum() / float(aux.weight), rtol=1e-6)
    else:
        reconstruction = theirs.reconstruction.detach().movedim(1, -1)
        assert_near(predicted, reconstruction, "reconstruction")
    # Another picture of weight 0, of the same shape, so that nothing is compiled again.
    padded = {key: np.concatenate([value[:2], value[:1]]) for key, value in batch.items()}
    padded["weight"][2] = 0
    two, aux = loss(variables, padded, None)
    padded["pixel_values"][2] = np.nan
    assert loss(variables, padded, None)[0] == two
    assert float(aux.weight) < float(masked.sum())


@pytest.fixture(scope="module")
def small():
    return fmjax.create(
        "beit", CASES["beit"][1], head="masked_image_modeling", rng=jax.random.key(0)
    )


def test_the_key_masks(small):
    model, variables = small
    masking = task.blocks(5, smallest=2)
    batch = batch_of("beit")
    given = dict(batch)
    del batch["bool_masked_pos"]
    run = jax.jit(lambda key: task.loss(model, masking=masking)(variables, batch, key)[0])
    assert run(jax.random.key(0)) == run(jax.random.key(0))
    assert run(jax.random.key(0)) != run(jax.random.key(1))
    with pytest.raises(ValueError, match="give masking and a key"):
        task.loss(model)(variables, batch, jax.random.key(0))
    first, second = (
        task.evaluate(model, variables, [batch, batch], masking=masking) for _ in range(2)
    )
    assert first == second
    assert first.keys() == {"loss", "masked_accuracy"}
    del given["labels"]
    with pytest.raises(ValueError, match=r"needs labels \(3, 16\)"):
        task.loss(model)(variables, given, None)


def test_random_patches_are_squares_of_their_share():
    batch = {"pixel_values": np.zeros((500, 16, 24, 3)), "labels": np.arange(500)}
    out = task.random_patches(4, ratio=0.3, unit=8)(jax.random.key(0), batch)
    assert out["labels"] is batch["labels"]
    masked = np.asarray(out["bool_masked_pos"]).reshape(500, 2, 2, 3, 2).swapaxes(2, 3)
    squares = masked.reshape(500, 6, 4)
    assert np.all(squares.all(axis=-1) == squares.any(axis=-1))
    assert np.all(squares[..., 0].sum(axis=1) == 2)  # 0.3 * 6, rounded up
    shares = squares[..., 0].mean(axis=0)
    np.testing.assert_allclose(shares, 1 / 3, atol=5 * np.sqrt(2 / 9 / 500))


def test_blocks_are_rectangles_until_enough_is_masked():
    masking = task.blocks(16)
    out = jax.jit(masking)(jax.random.key(0), {"pixel_values": np.zeros((400, 224, 224, 3))})
    masked = np.asarray(out["bool_masked_pos"]).reshape(400, 14, 14)
    counts = masked.sum(axis=(1, 2))
    assert counts.min() > 0.4 * 196
    # The last rectangle covers at most what was missing, but for its sides' rounding.
    assert counts.max() < 0.4 * 196 + 24
    # Neighbours are masked together far more often than drawn one by one, rows as columns.
    share = masked.mean()
    for axis in (1, 2):
        both = np.take(masked, range(13), axis) & np.take(masked, range(1, 14), axis)
        assert both.mean() > 1.5 * share**2
    rows = masked.any(axis=2).sum() / masked.any(axis=1).sum()
    assert 0.9 < rows < 1.1
    # One rectangle of all that is to be masked has the sides that are asked for.
    single = task.blocks(1, ratio=0.25, smallest=100, aspect=0.25)
    out = single(jax.random.key(1), {"pixel_values": np.zeros((300, 20, 20, 1))})
    for mask in np.asarray(out["bool_masked_pos"]).reshape(300, 20, 20):
        height, width = mask.any(axis=1).sum(), mask.any(axis=0).sum()
        if mask.sum() == height * width:
            assert 1 / 4.5 < height / width < 4.5
            assert mask.sum() > 100


def test_what_does_not_fit_is_refused(small):
    with pytest.raises(ValueError, match=r"ratio=1\.5") as error:
        task.random_patches(16, ratio=1.5, unit=24)
    assert "unit=24 must be a multiple of patch_size=16" in str(error.value)
    with pytest.raises(ValueError, match="ratio=0") as error:
        task.blocks(16, ratio=0, smallest=0, aspect=2)
    for words in ("smallest=0", "aspect=2"):
        assert words in str(error.value)
    batch = {"pixel_values": np.zeros((2, 40, 32, 3))}
    with pytest.raises(ValueError, match="not of whole squares, unit=32"):
        task.random_patches(8)(jax.random.key(0), batch)
    with pytest.raises(ValueError, match=r"smallest=16 is more than the 8 patches"):
        task.blocks(8)(jax.random.key(0), batch)
    with pytest.raises(ValueError, match="load it as 'masked_image_modeling'"):
        task.loss(small[0].clone(head="model"))
    model, variables = fmjax.create(
        "vit", SMALL, head="masked_image_modeling", rng=jax.random.key(0)
    )
    batch = {"pixel_values": np.zeros((1, 16, 16, 2)), "bool_masked_pos": np.ones((1, 9))}
    with pytest.raises(ValueError, match="must be multiples of the config's encoder_stride"):
        task.loss(model)(variables, batch, None)
