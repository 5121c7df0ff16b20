"""The residual players of WGAN-GP against PyTorch's layers."""

import numpy as np
import pytest
import torch
from generator_twins import check_outputs, parameters
from torch import nn

import fmjax
from fmjax.models import wgan_gp


class Block(nn.Module):
    def __init__(self, width, features, way, norm, first=False):
        super().__init__()
        self.way, self.first = way, first
        if norm is not None and not first:
            self.norm_1 = norm(width)
        if norm is not None:
            self.norm_2 = norm(features)
        self.conv_1 = nn.Conv2d(width, features, 3, padding=1)
        self.conv_2 = nn.Conv2d(features, features, 3, padding=1)
        if way != "same":
            self.shortcut = nn.Conv2d(width, features, 1)

    def normed(self, name, x):
        return getattr(self, name)(x) if hasattr(self, name) else x

    def forward(self, x):
        y = x if self.first else torch.relu(self.normed("norm_1", x))
        y = torch.relu(self.normed("norm_2", self.conv_1(y)))
        if self.way == "up":
            y, x = (nn.functional.interpolate(one, scale_factor=2) for one in (y, x))
        y = self.conv_2(y)
        if self.way == "down":
            pool = nn.functional.avg_pool2d
            return pool(y, 2) + pool(self.shortcut(x), 2)
        return y + (self.shortcut(x) if self.way == "up" else x)


class Critic(nn.Module):
    def __init__(self, config):
        super().__init__()
        norm = (lambda width: nn.GroupNorm(1, width)) if config.critic_norm != "none" else None
        width, size = config.num_channels, config.critic_size
        for number, way in enumerate(("down", "down", "same", "same")):
            self.add_module(f"block_{number}", Block(width, size, way, norm, number == 0))
            width = size
        self.head = nn.Linear(size, 1)

    def forward(self, x):
        for number in range(4):
            x = getattr(self, f"block_{number}")(x)
        return self.head(torch.relu(x).mean((2, 3)))


class Generator(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, self.count = config.generator_size, config.doublings
        self.project = nn.Linear(config.latent_size, 16 * size)
        for number in range(self.count):
            self.add_module(f"block_{number}", Block(size, size, "up", nn.BatchNorm2d))
        self.norm = nn.BatchNorm2d(size)
        self.conv = nn.Conv2d(size, config.num_channels, 3, padding=1)

    def forward(self, latents):
        x = self.project(latents).unflatten(1, (-1, 4, 4))
        for number in range(self.count):
            x = getattr(self, f"block_{number}")(x)
        return torch.tanh(self.conv(torch.relu(self.norm(x))))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["layer_norm", "none"])
def test_critic_equals_pytorch(norm, tmp_path):
    config = wgan_gp.Config(image_size=16, num_channels=2, critic_size=4, critic_norm=norm)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 2)).astype(np.float32)
    check_outputs(
        wgan_gp, config, "image_discrimination", Critic(config), {"pixel_values": pixels},
        ["logits"], tmp_path,
    )  # fmt: skip


@pytest.mark.slow
def test_generator_equals_pytorch(tmp_path):
    config = wgan_gp.Config(image_size=16, num_channels=2, latent_size=5, generator_size=6)
    latents = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    check_outputs(
        wgan_gp, config, "image_generation", Generator(config), {"latents": latents}, ["images"],
        tmp_path, train=True, tolerance=3e-5, gradient_tolerance=1e-4,
    )  # fmt: skip


def test_published_layers():
    """The table of appendix F: 3 blocks of 128 features up, and 2 down and 2 more."""

    def conv(width, features, size):
        return size**2 * width * features + features

    block = 2 * conv(128, 128, 3) + conv(128, 128, 1) + 4 * 128
    generator = 128 * 2048 + 2048 + 3 * block + 2 * 128 + conv(128, 3, 3)
    assert parameters(wgan_gp, "cifar-10", "image_generation") == generator
    first = conv(3, 128, 3) + conv(128, 128, 3) + conv(3, 128, 1)
    critic = first + 6 * conv(128, 128, 3) + conv(128, 128, 1) + 128 + 1
    assert parameters(wgan_gp, "cifar-10", "image_discrimination") == critic


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must be 8, 16, 32") as error:
        wgan_gp.Config(image_size=24, critic_size=0, critic_norm="batch_norm")
    for words in ("critic_size=0", "'batch_norm' is not one of"):
        assert words in str(error.value)
    model = wgan_gp.Model(wgan_gp.VARIANTS["tiny"])
    with pytest.raises(ValueError, match="sides must divide by 4"):
        model.apply(fmjax.hub.abstract_variables(model), np.zeros((1, 6, 8, 2)))
