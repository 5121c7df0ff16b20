"""DCGAN's two players against PyTorch's Sequentials."""

import numpy as np
import pytest
from generator_twins import check_outputs, parameters
from torch import nn

import fmjax
from fmjax.models import dcgan


class Discriminator(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, layers, width = config.kernel_size, [], config.num_channels
        for number, features in enumerate(config.hidden_sizes):
            layers.append(nn.Conv2d(width, features, size, 2, (size - 1) // 2, bias=False))
            if number > 0 and config.discriminator_norm == "batch_norm":
                layers.append(nn.BatchNorm2d(features))
            elif number > 0 and config.discriminator_norm == "layer_norm":
                layers.append(nn.GroupNorm(1, features))
            layers.append(nn.LeakyReLU(0.2))
            width = features
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, bias=False))

    def forward(self, x):
        return self.main(x).flatten(1)


class Generator(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, size = config.hidden_sizes[::-1], config.kernel_size
        layers, width = [], widths[0]
        layers.append(nn.ConvTranspose2d(config.latent_size, width, 4, bias=False))
        for features in (*widths[1:], config.num_channels):
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(
                nn.ConvTranspose2d(
                    width, features, size, 2, (size - 1) // 2, size % 2, bias=False
                )
            )  # fmt: skip
            width = features
        self.main = nn.Sequential(*layers, nn.Tanh())

    def forward(self, latents):
        return self.main(latents[:, :, None, None])


def small(**changed):
    return dcgan.Config(num_channels=2, latent_size=6, hidden_sizes=(4, 6), **changed)


@pytest.mark.parametrize(
    ("size", "norm"),
    [
        (4, "batch_norm"),
        pytest.param(5, "layer_norm", marks=pytest.mark.slow),
        pytest.param(3, "none", marks=pytest.mark.slow),
    ],
)
def test_discriminator_equals_pytorch(size, norm, tmp_path):
    config = small(kernel_size=size, discriminator_norm=norm)
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 2)).astype(np.float32)
    check_outputs(
        dcgan, config, "image_discrimination", Discriminator(config), {"pixel_values": pixels},
        ["logits"], tmp_path, train=True,
    )  # fmt: skip


@pytest.mark.parametrize("size", [pytest.param(4, marks=pytest.mark.slow), 5])
def test_generator_equals_pytorch(size, tmp_path):
    config = small(kernel_size=size)
    latents = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    check_outputs(
        dcgan, config, "image_generation", Generator(config), {"latents": latents}, ["images"],
        tmp_path, train=True,
    )  # fmt: skip


def test_published_sizes():
    # Of the authors' Torch program, as PyTorch's tutorial has it.
    assert parameters(dcgan, "64-torch", "image_generation") == 3_576_704
    assert parameters(dcgan, "64-torch", "image_discrimination") == 2_765_568


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="hidden_sizes") as error:
        dcgan.Config(hidden_sizes=(), latent_size=0, kernel_size=7, discriminator_norm="bump")
    for words in ("latent_size=0", "kernel_size=7", "'bump'"):
        assert words in str(error.value)
    model = dcgan.Model(small(), head="image_discrimination")
    abstract = fmjax.hub.abstract_variables(model)
    with pytest.raises(ValueError, match="images of \\(8, 8\\)"):
        model.apply(abstract, np.zeros((1, 8, 8, 2)))
    with pytest.raises(ValueError, match="reads pixel_values"):
        model.apply(abstract, latents=np.zeros((1, 6)))
    with pytest.raises(ValueError, match="makes images of latents"):
        dcgan.Model(small(), head="image_generation").apply(abstract, np.zeros((1, 8, 8, 2)))
