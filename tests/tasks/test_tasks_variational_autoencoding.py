"""The evidence lower bound: its parts by PyTorch, and the likelihood that it bounds."""

import jax
import numpy as np
import pytest
import torch

import fmjax
from fmjax.models import vae
from fmjax.tasks import variational_autoencoding as task
from fmjax.tree import map_with_path


@pytest.fixture(scope="module")
def model_and_batch():
    config = vae.Config(image_size=2, num_channels=1, latent_size=1, dense_sizes=(3,))
    model, variables = fmjax.create("vae", config, rng=jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = map_with_path(lambda path, x: x + rng.normal(size=x.shape), variables)
    pixels = rng.uniform(size=(3, 2, 2, 1)).astype(np.float32)
    return model, variables, {"pixel_values": pixels, "weight": np.float32([1, 2, 0])}


def test_parts_are_those_of_pytorch(model_and_batch):
    model, variables, batch = model_and_batch
    noise = np.float32([[0.3], [-1.0], [0.0]])
    value, aux = task.loss(model)(variables, {**batch, "noise": noise}, None)
    out = model.apply(variables, batch["pixel_values"], noise)
    normal = torch.distributions.Normal
    mean, log_variance = (torch.tensor(np.asarray(x)) for x in (
        out.latent_mean, out.latent_log_variance))  # fmt: skip
    apart = torch.distributions.kl_divergence(
        normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)
    ).sum(-1)
    seen = -torch.nn.functional.binary_cross_entropy(
        torch.tensor(np.asarray(out.images)), torch.tensor(batch["pixel_values"]), reduction="none"
    ).sum((1, 2, 3))
    weights = torch.tensor(batch["weight"])
    assert float(value) == pytest.approx(float(((apart - seen) * weights).sum() / 3), 1e-4)
    assert float(aux.metrics["divergence"].value) == pytest.approx(
        float((apart * weights).sum() / 3), 1e-4
    )
    assert float(aux.weight) == 3
    with pytest.raises(ValueError, match="give a key, or noise"):
        task.loss(model)(variables, batch, None)


def test_gaussian_pixels_have_their_density():
    config = vae.Config(
        image_size=2, num_channels=1, latent_size=1, dense_sizes=(3,), likelihood="gaussian"
    )
    model, variables = fmjax.create("vae", config, rng=jax.random.key(0))
    pixels = np.random.default_rng(0).uniform(size=(2, 2, 2, 1)).astype(np.float32)
    out = model.apply(variables, pixels)
    found = task.log_likelihood(out, pixels)
    normal = torch.distributions.Normal(
        *(torch.tensor(np.asarray(x)) for x in (out.images, np.exp(out.image_log_scale)))
    )
    expected = normal.log_prob(torch.tensor(pixels)).sum((1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_bounds_hold_and_become_tight(model_and_batch):
    """log p(x) by quadrature over the one latent; the bound is below it, many samples reach it."""
    model, variables, batch = model_and_batch
    grid = np.linspace(-8, 8, 4001, dtype=np.float32)
    out = model.apply(variables, grid[:, None], method="decode")
    logits = np.asarray(out.image_location, np.float64)  # [4001, 2, 2, 1]
    prior = -0.5 * grid.astype(np.float64) ** 2 - 0.5 * np.log(2 * np.pi)
    truth = []
    for pixels in batch["pixel_values"].astype(np.float64):
        seen = (pixels * logits - np.logaddexp(0, logits)).sum(axis=(1, 2, 3))
        truth.append(np.log(np.sum(np.exp(seen + prior)) * (grid[1] - grid[0])))
    values = [
        np.mean([
            np.asarray(estimate(variables, batch, jax.random.key(seed)))
            for seed in range(repeats)
        ], axis=0)
        for samples, repeats in ((1, 400), (5000, 1))
        for estimate in [jax.jit(task.importance_weighted(model, samples))]
    ]  # fmt: skip
    assert (values[0] < np.array(truth) + 0.02).all()
    np.testing.assert_allclose(values[1], truth, atol=0.05)
    with pytest.raises(ValueError, match="samples=0"):
        task.importance_weighted(model, 0)
