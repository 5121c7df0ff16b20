"""Inception v3 against PyTorch's layers under torchvision's names."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from torch import nn
from torchvision_twins import HEAD, LABELS, check_counts, check_twin, conv_norm

import fmjax
from fmjax.models import inception_v3
from fmjax.nn.conv import average_pool

SMALL = dataclasses.replace(inception_v3.VARIANTS["tiny"], num_channels=2, id2label=LABELS)


class Block(nn.Module):
    """Named convolutions, and what is done with them."""

    def __init__(self, width, layers, forward):
        super().__init__()
        for name, (source, features, *rest) in layers.items():
            before = width if source is None else layers[source][1]
            setattr(self, name, conv_norm(before, features, *rest))
        self.flow = forward

    def forward(self, x):
        return torch.cat(self.flow(self, x), 1)


def average(x):
    return nn.functional.avg_pool2d(x, 3, 1, 1)


def first(width, d, pool):
    layers = {
        "branch1x1": (None, d(64), 1),
        "branch5x5_1": (None, d(48), 1),
        "branch5x5_2": ("branch5x5_1", d(64), 5, 1, 2),
        "branch3x3dbl_1": (None, d(64), 1),
        "branch3x3dbl_2": ("branch3x3dbl_1", d(96), 3, 1, 1),
        "branch3x3dbl_3": ("branch3x3dbl_2", d(96), 3, 1, 1),
        "branch_pool": (None, d(pool), 1),
    }
    block = Block(width, layers, lambda m, x: [
        m.branch1x1(x), m.branch5x5_2(m.branch5x5_1(x)),
        m.branch3x3dbl_3(m.branch3x3dbl_2(m.branch3x3dbl_1(x))), m.branch_pool(average(x)),
    ])  # fmt: skip
    return block, d(64) * 2 + d(96) + d(pool)


def shrinking(width, d):
    layers = {
        "branch3x3": (None, d(384), 3, 2),
        "branch3x3dbl_1": (None, d(64), 1),
        "branch3x3dbl_2": ("branch3x3dbl_1", d(96), 3, 1, 1),
        "branch3x3dbl_3": ("branch3x3dbl_2", d(96), 3, 2),
    }
    block = Block(width, layers, lambda m, x: [
        m.branch3x3(x), m.branch3x3dbl_3(m.branch3x3dbl_2(m.branch3x3dbl_1(x))),
        nn.functional.max_pool2d(x, 3, 2),
    ])  # fmt: skip
    return block, d(384) + d(96) + width


def second(width, d, inner):
    row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    layers = {
        "branch1x1": (None, d(192), 1),
        "branch7x7_1": (None, d(inner), 1),
        "branch7x7_2": ("branch7x7_1", d(inner), *row),
        "branch7x7_3": ("branch7x7_2", d(192), *column),
        "branch7x7dbl_1": (None, d(inner), 1),
        "branch7x7dbl_2": ("branch7x7dbl_1", d(inner), *column),
        "branch7x7dbl_3": ("branch7x7dbl_2", d(inner), *row),
        "branch7x7dbl_4": ("branch7x7dbl_3", d(inner), *column),
        "branch7x7dbl_5": ("branch7x7dbl_4", d(192), *row),
        "branch_pool": (None, d(192), 1),
    }

    def flow(m, x):
        y = m.branch7x7dbl_3(m.branch7x7dbl_2(m.branch7x7dbl_1(x)))
        return [
            m.branch1x1(x), m.branch7x7_3(m.branch7x7_2(m.branch7x7_1(x))),
            m.branch7x7dbl_5(m.branch7x7dbl_4(y)), m.branch_pool(average(x)),
        ]  # fmt: skip

    return Block(width, layers, flow), 4 * d(192)


def shrinking_again(width, d):
    layers = {
        "branch3x3_1": (None, d(192), 1),
        "branch3x3_2": ("branch3x3_1", d(320), 3, 2),
        "branch7x7x3_1": (None, d(192), 1),
        "branch7x7x3_2": ("branch7x7x3_1", d(192), (1, 7), 1, (0, 3)),
        "branch7x7x3_3": ("branch7x7x3_2", d(192), (7, 1), 1, (3, 0)),
        "branch7x7x3_4": ("branch7x7x3_3", d(192), 3, 2),
    }
    block = Block(width, layers, lambda m, x: [
        m.branch3x3_2(m.branch3x3_1(x)),
        m.branch7x7x3_4(m.branch7x7x3_3(m.branch7x7x3_2(m.branch7x7x3_1(x)))),
        nn.functional.max_pool2d(x, 3, 2),
    ])  # fmt: skip
    return block, d(320) + d(192) + width


def last(width, d):
    row, column = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    layers = {
        "branch1x1": (None, d(320), 1),
        "branch3x3_1": (None, d(384), 1),
        "branch3x3_2a": ("branch3x3_1", d(384), *row),
        "branch3x3_2b": ("branch3x3_1", d(384), *column),
        "branch3x3dbl_1": (None, d(448), 1),
        "branch3x3dbl_2": ("branch3x3dbl_1", d(384), 3, 1, 1),
        "branch3x3dbl_3a": ("branch3x3dbl_2", d(384), *row),
        "branch3x3dbl_3b": ("branch3x3dbl_2", d(384), *column),
        "branch_pool": (None, d(192), 1),
    }

    def flow(m, x):
        y, z = m.branch3x3_1(x), m.branch3x3dbl_2(m.branch3x3dbl_1(x))
        return [
            m.branch1x1(x), m.branch3x3_2a(y), m.branch3x3_2b(y), m.branch3x3dbl_3a(z),
            m.branch3x3dbl_3b(z), m.branch_pool(average(x)),
        ]  # fmt: skip

    return Block(width, layers, flow), d(320) + 4 * d(384) + d(192)


class Twin(nn.Module):
    def __init__(self, config):
        super().__init__()

        def d(width):
            return max(int(width * config.depth_multiplier), config.min_depth)

        self.Conv2d_1a_3x3 = conv_norm(config.num_channels, d(32), 3, 2)
        self.Conv2d_2a_3x3 = conv_norm(d(32), d(32), 3)
        self.Conv2d_2b_3x3 = conv_norm(d(32), d(64), 3, 1, 1)
        self.Conv2d_3b_1x1 = conv_norm(d(64), d(80), 1)
        self.Conv2d_4a_3x3 = conv_norm(d(80), d(192), 3)
        plan = [(f"5{'bcd'[i]}", first, (n,)) for i, n in enumerate(config.pool_features)]
        plan.append(("6a", shrinking, ()))
        plan += [(f"6{'bcde'[i]}", second, (n,)) for i, n in enumerate(config.channels_7x7)]
        plan.append(("7a", shrinking_again, ()))
        plan += [(f"7{'bc'[i]}", last, ()) for i in range(config.num_last_blocks)]
        width, classes = d(192), len(config.id2label)
        self.names = []
        for name, make, options in plan:
            if name == "7a":
                self.AuxLogits = nn.Module()
                self.AuxLogits.conv0 = conv_norm(width, d(128), 1)
                self.AuxLogits.conv1 = conv_norm(d(128), d(768), 5)
                self.AuxLogits.fc = nn.Linear(d(768), classes)
            block, width = make(width, d, *options)
            setattr(self, f"Mixed_{name}", block)
            self.names.append(name)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        pool, earlier = nn.functional.max_pool2d, []
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(pool(x, 3, 2)))
        x = pool(x, 3, 2)
        for name in self.names:
            if name == "7a" and self.training:
                y = nn.functional.avg_pool2d(x, 5, 3)
                y = self.AuxLogits.conv1(self.AuxLogits.conv0(y)).mean((2, 3))
                earlier.append(self.AuxLogits.fc(y))
            x = getattr(self, f"Mixed_{name}")(x)
        logits = self.fc(x.mean((2, 3)))
        return (logits, earlier) if earlier else logits


def test_equals_pytorch(tmp_path):
    # Of four draws the worst gradient is 1.0e-4 away with three, of a norm, whose sums over many
    # pixels cancel; with the first a unit at the edge of its ReLU is on on one side alone.
    pixels = np.random.default_rng(3).normal(size=(2, 299, 301, 2)).astype(np.float32)
    check_twin(inception_v3, SMALL, Twin(SMALL), pixels, tmp_path, gradient_tolerance=2e-4)


def test_averages_equal_pytorch():
    x = np.random.default_rng(0).normal(size=(2, 7, 9, 3)).astype(np.float32)
    for options in ((3, 1, 1), (5, 3, 0), (2, 2, 0)):
        for counted in (True, False):
            theirs = nn.functional.avg_pool2d(
                torch.tensor(x).movedim(-1, 1), *options, count_include_pad=counted
            )
            ours = average_pool(x, *options, count_padding=counted)
            np.testing.assert_allclose(ours, theirs.movedim(1, -1), atol=1e-6)


def test_classifiers_have_the_published_number_of_parameters():
    check_counts(inception_v3, {"v3": 27_161_264})


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="depth_multiplier=0") as error:
        inception_v3.Config(
            depth_multiplier=0, pool_features=(0,), num_last_blocks=-1, auxiliary_weight=-0.1
        )
    for words in ("pool_features=(0,)", "num_last_blocks=-1", "auxiliary_weight=-0.1"):
        assert words in str(error.value)
    model = inception_v3.Model(SMALL, head=HEAD)
    variables = fmjax.hub.abstract_variables(model)

    def run(rows, train):
        pixels = np.zeros((2, rows, 120, 2), np.float32)
        return jax.eval_shape(
            lambda v: model.apply(v, pixels, train=train, mutable=True), variables
        )

    with pytest.raises(ValueError, match="need 75 rows"):
        run(74, False)
    assert run(75, False)[0].logits.shape == (2, 3)
    with pytest.raises(ValueError, match="train on 299"):
        run(120, True)
