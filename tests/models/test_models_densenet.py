"""DenseNet against PyTorch's layers under torchvision's names."""

import re

import numpy as np
import pytest
import torch
from parity import check_old_file
from torch import nn
from torchvision_twins import HEAD, LABELS, check_counts, check_twin

import fmjax
from fmjax.models import densenet

SMALL = densenet.Config(
    num_channels=2, num_init_features=6, block_config=(2, 1, 1), growth_rate=4, bn_size=2,
    id2label=LABELS,
)  # fmt: skip


class Layer(nn.Module):
    def __init__(self, width, config):
        super().__init__()
        inner = config.bn_size * config.growth_rate
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, config.growth_rate, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(self.norm1(x).relu())
        return torch.cat([x, self.conv2(self.norm2(y).relu())], 1)


class Twin(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.num_init_features
        self.features = nn.Sequential()
        add = self.features.add_module
        add("conv0", nn.Conv2d(config.num_channels, width, 7, 2, 3, bias=False))
        add("norm0", nn.BatchNorm2d(width))
        add("relu0", nn.ReLU())
        add("pool0", nn.MaxPool2d(3, 2, 1))
        for number, depth in enumerate(config.block_config):
            block = nn.Sequential()
            for i in range(depth):
                block.add_module(f"denselayer{i + 1}", Layer(width, config))
                width += config.growth_rate
            add(f"denseblock{number + 1}", block)
            if number < len(config.block_config) - 1:
                transition = nn.Sequential()
                transition.add_module("norm", nn.BatchNorm2d(width))
                transition.add_module("relu", nn.ReLU())
                transition.add_module("conv", nn.Conv2d(width, width // 2, 1, bias=False))
                transition.add_module("pool", nn.AvgPool2d(2, 2))
                add(f"transition{number + 1}", transition)
                width //= 2
        add("norm5", nn.BatchNorm2d(width))
        self.classifier = nn.Linear(width, len(config.id2label))

    def forward(self, x):
        return self.classifier(self.features(x).relu().mean((2, 3)))


def test_equals_pytorch(tmp_path):
    pixels = np.random.default_rng(0).normal(size=(3, 34, 47, 2)).astype(np.float32)
    # Measured over four draws: 5.6e-5 at most, and 4.2e-5 with batch norm as JAX differentiates it.
    check_twin(densenet, SMALL, Twin(SMALL), pixels, tmp_path, gradient_tolerance=1e-4)


def test_older_files_have_one_more_dot(tmp_path):
    check_old_file(
        densenet, SMALL, HEAD, tmp_path,
        rename=lambda name: re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name),
    )  # fmt: skip


def test_classifiers_have_the_published_number_of_parameters():
    check_counts(densenet, {"121": 7_978_856, "161": 28_681_000, "201": 20_013_928})


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="block_config=") as error:
        densenet.Config(block_config=(), growth_rate=0, drop_rate=1.0)
    for words in ("growth_rate=0", "drop_rate=1.0"):
        assert words in str(error.value)
    model = densenet.Model(SMALL)
    with pytest.raises(ValueError, match="need 16 rows"):
        model.apply(fmjax.hub.abstract_variables(model), np.zeros((1, 15, 16, 2)))
