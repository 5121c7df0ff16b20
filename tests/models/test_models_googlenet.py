"""GoogLeNet against PyTorch's layers under torchvision's names."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from torch import nn
from torchvision_twins import HEAD, LABELS, check_counts, check_twin, conv_norm

import fmjax
from fmjax.models import googlenet
from fmjax.nn.conv import last_window, max_pool

SMALL = dataclasses.replace(
    googlenet.VARIANTS["tiny"],
    num_channels=2,
    stages=(((2, 3, 4, 2, 3, 2),), ((3, 2, 4, 2, 2, 2), (2, 2, 3, 2, 2, 3)), ((3, 2, 3, 2, 2, 2),)),
    auxiliary_blocks=(0, 1),
    id2label=LABELS,
)


class Block(nn.Module):
    def __init__(self, width, sizes):
        super().__init__()
        a, b0, b, c0, c, d = sizes
        self.branch1 = conv_norm(width, a, 1)
        self.branch2 = nn.Sequential(conv_norm(width, b0, 1), conv_norm(b0, b, 3, padding=1))
        self.branch3 = nn.Sequential(conv_norm(width, c0, 1), conv_norm(c0, c, 3, padding=1))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_norm(width, d, 1))
        self.width = a + b + c + d

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class Auxiliary(nn.Module):
    def __init__(self, width, config):
        super().__init__()
        features, hidden = config.auxiliary_sizes
        self.conv = conv_norm(width, features, 1)
        self.fc1 = nn.Linear(16 * features, hidden)
        self.fc2 = nn.Linear(hidden, len(config.id2label))

    def forward(self, x):
        x = self.conv(nn.functional.adaptive_avg_pool2d(x, (4, 4))).flatten(1)
        return self.fc2(self.fc1(x).relu())


class Twin(nn.Module):
    def __init__(self, config):
        super().__init__()
        a, b, width = config.stem_sizes
        self.conv1 = conv_norm(config.num_channels, a, 7, 2, 3)
        self.conv2 = conv_norm(a, b, 1)
        self.conv3 = conv_norm(b, width, 3, padding=1)
        self.names = []
        for stage, blocks in enumerate(config.stages):
            for number, sizes in enumerate(blocks):
                block = Block(width, sizes)
                width = block.width
                name = f"{stage + 3}{'abcdefg'[number]}"
                setattr(self, f"inception{name}", block)
                for i, place in enumerate(config.auxiliary_blocks):
                    if config.aux_logits and (stage, number) == (1, place):
                        setattr(self, f"aux{i + 1}", Auxiliary(width, config))
                self.names.append((name, stage, number))
        self.fc = nn.Linear(width, len(config.id2label))
        self.config = config

    def forward(self, x):
        pool, earlier = nn.functional.max_pool2d, []
        x = pool(self.conv1(x), 3, 2, ceil_mode=True)
        x = pool(self.conv3(self.conv2(x)), 3, 2, ceil_mode=True)
        for name, stage, number in self.names:
            if name in ("4a", "5a"):
                x = pool(x, 3 if name == "4a" else 2, 2, ceil_mode=True)
            x = getattr(self, f"inception{name}")(x)
            for i, place in enumerate(self.config.auxiliary_blocks):
                if self.training and self.config.aux_logits and (stage, number) == (1, place):
                    earlier.append(getattr(self, f"aux{i + 1}")(x))
        logits = self.fc(x.mean((2, 3)))
        return (logits, earlier) if earlier else logits


def test_equals_pytorch(tmp_path):
    pixels = np.random.default_rng(0).normal(size=(3, 66, 57, 2)).astype(np.float32)
    check_twin(googlenet, SMALL, Twin(SMALL), pixels, tmp_path)


def test_classifiers_have_the_published_number_of_parameters(monkeypatch):
    check_counts(googlenet, {"bn": 13_004_888})
    alone = dataclasses.replace(googlenet.VARIANTS["bn"], aux_logits=False)
    monkeypatch.setitem(googlenet.VARIANTS, "alone", alone)
    check_counts(googlenet, {"alone": 6_624_904})


def test_the_last_window_may_reach_over_the_end():
    """PyTorch's ceil_mode, where it begins inside the image."""
    for rows in (5, 6):
        for size in (2, 3):
            x = np.random.default_rng(rows).normal(size=(1, rows, 4, 2)).astype(np.float32)
            theirs = nn.functional.max_pool2d(
                torch.tensor(x).movedim(-1, 1), size, 2, ceil_mode=True
            )
            ours = max_pool(x, size, 2, last_window(x.shape[1:3], size, 2))
            np.testing.assert_array_equal(ours, theirs.movedim(1, -1))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="three, of at least one block") as error:
        googlenet.Config(
            stem_sizes=(1,), stages=(((1, 2, 3),),), auxiliary_sizes=(0, 1), auxiliary_weight=-1.0
        )
    for words in ("stem_sizes=(1,)", "six numbers", "(0, 1)", "auxiliary_weight=-1.0"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="not in the second stage"):
        googlenet.Config(auxiliary_blocks=(0, 5))


@pytest.mark.parametrize(
    ("rate", "auxiliary", "draws"), [(0.2, 0.7, 3), (0.0, 0.7, 2), (0.2, 0, 1)]
)
def test_every_classifier_has_its_dropout(rate, auxiliary, draws):
    config = dataclasses.replace(SMALL, dropout=rate, auxiliary_dropout=auxiliary)
    model = googlenet.Model(config, head=HEAD)

    def run(variables, key):
        pixels = np.zeros((2, 32, 32, 2), np.float32)
        options = {"rngs": {"dropout": key}, "mutable": ["batch_stats"]}
        return model.apply(variables, pixels, train=True, **options)

    variables = fmjax.hub.abstract_variables(model)
    assert str(jax.make_jaxpr(run)(variables, jax.random.key(0))).count("random_bits") == draws
