"""The perceptron against PyTorch's Sequential."""

import jax
import numpy as np
import pytest
import torch
from parity import assert_near
from safetensors.torch import load_file
from torch import nn

import fmjax
from fmjax.models import mlp
from fmjax.tree import flatten


def test_equals_pytorch(tmp_path):
    """PyTorch's Sequential loads what is saved and gives the same; loading gives it back."""
    config = mlp.Config(num_features=3, hidden_sizes=(5, 4))
    model, variables = fmjax.create(
        "mlp", config, head="classification", num_labels=("left", "right"), rng=jax.random.key(0)
    )
    fmjax.save(tmp_path / "saved", model, variables)
    twin = nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)
    )  # fmt: skip
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    twin.load_state_dict(tensors)
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    with torch.no_grad():
        assert_near(model.apply(variables, x).logits, twin(torch.tensor(x)), "logits")
    again, loaded = fmjax.load(tmp_path / "saved")
    assert again.config.id2label == ("left", "right")
    for path, leaf in flatten(loaded).items():
        np.testing.assert_array_equal(leaf, flatten(variables)[path], err_msg=path)
    kernel = variables["params"]["dense_0"]["kernel"]
    np.testing.assert_allclose(kernel @ kernel.T, 2 * np.eye(3), atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_features=0 must be positive") as error:
        mlp.Config(num_features=0, hidden_sizes=(0,), hidden_act="bump")
    assert "hidden_sizes=(0,)" in str(error.value)
    assert "hidden_act='bump'" in str(error.value)
    model, variables = fmjax.create("mlp", "tiny", rng=jax.random.key(0))
    with pytest.raises(ValueError, match="must be"):
        model.apply(variables, np.zeros((2, 3)))
