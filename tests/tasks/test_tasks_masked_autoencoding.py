"""Masked autoencoding against transformers' loss, and what is reconstructed."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from parity import torch_twin

import fmjax
from fmjax.models import vit_mae
from fmjax.tasks import masked_autoencoding as task

CONFIG = vit_mae.Config(
    hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20,
    image_size=20, patch_size=5, num_channels=2, decoder_hidden_size=8,
    decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=14,
)  # fmt: skip


def batch_of(count=3):
    rng = np.random.default_rng(0)
    return {
        "pixel_values": rng.normal(size=(count, 20, 20, 2)).astype(np.float32),
        "weight": np.ones(count, np.float32),
        "noise": rng.random((count, 16)).astype(np.float32),
    }


@pytest.mark.parametrize("normalised", [False, True])
def test_loss_equals_pytorch(normalised, tmp_path):
    config = dataclasses.replace(CONFIG, norm_pix_loss=normalised)
    twin = torch_twin(vit_mae, config, "pretraining").double()
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
    batch = batch_of()
    theirs = twin(
        torch.tensor(batch["pixel_values"]).double().movedim(-1, 1),
        noise=torch.tensor(batch["noise"]),
    ).loss
    value, aux = task.loss(model)(variables, batch, None)
    np.testing.assert_allclose(value, float(theirs.detach()), rtol=1e-5)
    assert float(aux.weight) == 3 * 12  # of 16 patches 4 are seen
    padded = {key: np.concatenate([value, value[:1]]) for key, value in batch.items()}
    padded["weight"][3] = 0
    np.testing.assert_allclose(task.loss(model)(variables, padded, None)[0], value, rtol=1e-5)


@pytest.fixture(scope="module")
def small():
    return fmjax.create("vit_mae", CONFIG, head="pretraining", rng=jax.random.key(0))


def test_the_key_draws_what_is_masked(small):
    model, variables = small
    batch = batch_of()
    del batch["noise"]
    run = jax.jit(lambda key: task.loss(model)(variables, batch, key)[0])
    assert run(jax.random.key(0)) == run(jax.random.key(0))
    assert run(jax.random.key(0)) != run(jax.random.key(1))
    with pytest.raises(ValueError, match="give a key, or noise"):
        task.loss(model)(variables, batch, None)
    first, second = (task.evaluate(model, variables, [batch, batch]) for _ in range(2))
    assert first == second


def test_seen_patches_stay_as_they_are(small):
    model, variables = small
    model = model.clone(config=dataclasses.replace(CONFIG, norm_pix_loss=True))
    batch = batch_of()
    images, seen = jax.jit(task.reconstruct(model))(variables, batch)
    for row in range(3):
        order = np.argsort(batch["noise"][row])
        for rank, patch in enumerate(order):
            x, y = 5 * (patch // 4), 5 * (patch % 4)
            part = np.s_[row, x : x + 5, y : y + 5]
            same = np.array_equal(images[part], batch["pixel_values"][part])
            assert same == (rank < 4)
            assert np.any(seen[part]) == (rank < 4)
