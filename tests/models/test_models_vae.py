"""The variational autoencoder against PyTorch's layers."""

import itertools

import numpy as np
import pytest
import torch
from generator_twins import check_outputs, parameters
from torch import nn

from fmjax.models import vae


class Half(nn.Module):
    """Modules by name."""


class Twin(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Half(), Half()
        width = config.num_channels
        for number, features in enumerate(config.conv_sizes):
            self.encoder.add_module(f"conv_{number}", nn.Conv2d(width, features, 4, 2, 1))
            width = features
        width *= config.grid[0] * config.grid[1]
        for number, features in enumerate(config.dense_sizes):
            self.encoder.add_module(f"dense_{number}", nn.Linear(width, features))
            width = features
        self.encoder.mean = nn.Linear(width, config.latent_size)
        self.encoder.log_variance = nn.Linear(width, config.latent_size)
        width = config.latent_size
        for number, features in enumerate(config.dense_sizes[::-1]):
            self.decoder.add_module(f"dense_{number}", nn.Linear(width, features))
            width = features
        sizes = (*config.conv_sizes[::-1], config.last_features)
        self.decoder.project = nn.Linear(width, sizes[0] * config.grid[0] * config.grid[1])
        for number, (width, features) in enumerate(itertools.pairwise(sizes)):
            self.decoder.add_module(f"conv_{number}", nn.ConvTranspose2d(width, features, 4, 2, 1))

    def forward(self, pixels, noise):
        config = self.config
        act = torch.tanh if config.hidden_act == "tanh" else torch.relu
        x = pixels
        for number in range(len(config.conv_sizes)):
            x = act(getattr(self.encoder, f"conv_{number}")(x))
        x = x.flatten(1)
        for number in range(len(config.dense_sizes)):
            x = act(getattr(self.encoder, f"dense_{number}")(x))
        mean, log_variance = self.encoder.mean(x), self.encoder.log_variance(x)
        x = mean + torch.exp(log_variance / 2) * noise
        for number in range(len(config.dense_sizes)):
            x = act(getattr(self.decoder, f"dense_{number}")(x))
        x = self.decoder.project(x).unflatten(1, (-1, *config.grid))
        for number in range(len(config.conv_sizes)):
            x = getattr(self.decoder, f"conv_{number}")(act(x))
        if config.likelihood == "bernoulli":
            return mean, log_variance, x, torch.sigmoid(x)
        means, log_scale = x.chunk(2, dim=1)
        means = torch.sigmoid(means)
        return mean, log_variance, means, means, log_scale


@pytest.mark.parametrize(
    "changed",
    [
        {"conv_sizes": (4, 5), "hidden_act": "relu"},
        pytest.param(
            {"likelihood": "gaussian", "dense_sizes": (6, 5)}, marks=pytest.mark.slow
        ),
    ],
    ids=["convolutions", "gaussian"],
)  # fmt: skip
def test_equals_pytorch(changed, tmp_path):
    config = vae.Config(
        image_size=(8, 12), num_channels=2, latent_size=3, **{"dense_sizes": (6,), **changed}
    )
    rng = np.random.default_rng(0)
    inputs = {
        "pixel_values": rng.uniform(size=(2, 8, 12, 2)).astype(np.float32),
        "noise": rng.normal(size=(2, 3)).astype(np.float32),
    }
    fields = ["latent_mean", "latent_log_variance", "image_location", "images"]
    if config.likelihood == "gaussian":
        fields.append("image_log_scale")
    check_outputs(vae, config, "model", Twin(config), inputs, fields, tmp_path)


def test_sizes_are_those_of_the_equations():
    # Appendix C.1 with 784 pixels, 500 hidden units and 20 latents: W3, W4, W5 and W1, W2.
    encoder = 784 * 500 + 500 + 2 * (500 * 20 + 20)
    assert parameters(vae, "mnist") == encoder + 20 * 500 + 500 + 500 * 784 + 784


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must divide by 4") as error:
        vae.Config(image_size=10, conv_sizes=(4, 0), likelihood="poisson", latent_size=0)
    for words in ("conv_sizes=0", "'poisson'", "latent_size=0"):
        assert words in str(error.value)
