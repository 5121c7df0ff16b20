"""AlexNet against PyTorch's layers, in the Sequentials that torchvision has."""

import numpy as np
import pytest
from torch import nn
from torchvision_twins import LABELS, check_counts, check_twin

import fmjax
from fmjax.models import alexnet


class Twin(nn.Module):
    def __init__(self, config):
        super().__init__()
        a, b, c, d, e = config.hidden_sizes
        self.features = nn.Sequential(
            nn.Conv2d(config.num_channels, a, 11, stride=4, padding=2), nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(b, c, 3, padding=1), nn.ReLU(),
            nn.Conv2d(c, d, 3, padding=1), nn.ReLU(),
            nn.Conv2d(d, e, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d(config.pooled_size)
        layers, width = [], e * config.pooled_size**2
        for size in config.dense_sizes:
            layers += [nn.Dropout(config.dropout), nn.Linear(width, size), nn.ReLU()]
            width = size
        self.classifier = nn.Sequential(*layers, nn.Linear(width, len(config.id2label)))

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def test_equals_pytorch(tmp_path):
    config = alexnet.Config(
        num_channels=2, hidden_sizes=(4, 6, 5, 4, 3), pooled_size=2, dense_sizes=(7, 6),
        dropout=0.0, id2label=LABELS,
    )  # fmt: skip
    pixels = np.random.default_rng(0).normal(size=(2, 130, 97, 2)).astype(np.float32)
    check_twin(alexnet, config, Twin(config), pixels, tmp_path)


def test_classifiers_have_the_published_number_of_parameters():
    check_counts(alexnet, {"one-column": 61_100_840})


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must be 5 numbers") as error:
        alexnet.Config(hidden_sizes=(1, 0), dense_sizes=(0,), hidden_act="bump", pooled_size=(1,))
    for words in ("hidden_sizes=(1, 0) must be positive", "dense_sizes=(0,)", "'bump'", "(1,)"):
        assert words in str(error.value)
    model = alexnet.Model(alexnet.VARIANTS["tiny"])
    with pytest.raises(ValueError, match="need 63 rows"):
        model.apply(fmjax.hub.abstract_variables(model), np.zeros((1, 62, 80, 3)))
