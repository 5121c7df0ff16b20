"""Convolutions along time against PyTorch's, and the ways to compute them against each other."""

from functools import partial

import jax
import numpy as np
import pytest
import torch
from chex import assert_trees_all_close

from fmjax.nn import conv1d


@pytest.mark.parametrize(
    ("stride", "around", "groups", "size"),
    [
        pytest.param(1, (2, 2), 3, 5, marks=pytest.mark.slow),
        pytest.param(1, (2, 1), 2, 4, marks=pytest.mark.slow),
        (3, (0, 0), 1, 4),
        pytest.param(2, (1, 1), 2, 3, marks=pytest.mark.slow),
    ],
)
def test_equals_pytorch(stride, around, groups, size):
    """Values and gradients; both ways where there are groups."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 11, 6)).astype(np.float32)
    kernel = rng.normal(size=(size, 6 // groups, 12)).astype(np.float32)
    tensors = [torch.tensor(x, requires_grad=True), torch.tensor(kernel, requires_grad=True)]
    padded = torch.nn.functional.pad(tensors[0].movedim(1, 2), around)
    theirs = torch.nn.functional.conv1d(
        padded, tensors[1].permute(2, 1, 0), stride=stride, groups=groups
    ).movedim(1, 2)
    cotangent = rng.normal(size=tuple(theirs.shape)).astype(np.float32)
    theirs.backward(torch.tensor(cotangent))
    options = {"stride": stride, "around": around, "groups": groups}
    for way in (conv1d.convolve, conv1d._convolution):
        value, back = jax.vjp(partial(way, **options), x, kernel)
        assert_trees_all_close(value, theirs.detach().numpy(), atol=1e-5)
        assert_trees_all_close(back(cotangent), tuple(t.grad.numpy() for t in tensors), atol=2e-5)


def test_windows_are_side_by_side():
    x = np.arange(14).reshape(1, 7, 2)
    found = conv1d.windows(x, 3, dilation=2)
    np.testing.assert_array_equal(found[0, 1], [2, 3, 6, 7, 10, 11])
    assert found.shape == (1, 3, 6)
