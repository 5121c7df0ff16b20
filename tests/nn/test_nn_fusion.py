"""The blocks of fusion: co-attention against PyTorch's layers, means and products by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from fmjax.nn.fusion import Layer, Shared, Stream, combine, masked_mean, only_present

D, F, H, EPSILON = 12, 20, 3, 1e-5


def torch_stream(params, x, mask, others, others_mask):
    """Cross-attention and feed-forward, self-attention and feed-forward, each normed after."""

    def tensor(value):
        return torch.tensor(np.asarray(value, np.float64))

    def linear(module, kernel):
        module.weight.data = tensor(kernel["kernel"]).T
        module.bias.data = tensor(kernel["bias"])
        return module

    def attend(name, x, keys, keep):
        own = params[name]
        layer = torch.nn.MultiheadAttention(D, H, batch_first=True, dtype=torch.float64)
        qkv = [tensor(own[part]["kernel"]).T for part in ("query", "key", "value")]
        layer.in_proj_weight.data = torch.cat(qkv)
        biases = [tensor(own[part]["bias"]) for part in ("query", "key", "value")]
        layer.in_proj_bias.data = torch.cat(biases)
        linear(layer.out_proj, own["out"])
        return layer(x, keys, keys, key_padding_mask=~torch.tensor(keep))[0]

    def feed(name, x):
        up = linear(torch.nn.Linear(D, F, dtype=torch.float64), params[name]["up"])
        down = linear(torch.nn.Linear(F, D, dtype=torch.float64), params[name]["down"])
        return down(torch.relu(up(x)))

    def norm(name, x):
        own = params[name]
        return torch.nn.functional.layer_norm(
            x, (D,), tensor(own["scale"]), tensor(own["bias"]), EPSILON
        )

    x, others = torch.tensor(x), torch.tensor(others)
    x = norm("norm_cross", x + attend("cross_attn", x, others, others_mask))
    x = norm("norm_cross_mlp", x + feed("cross_mlp", x))
    x = norm("norm_1", x + attend("attn", x, x, mask))
    return norm("norm_2", x + feed("mlp", x)).detach().numpy()


def test_co_attention_equals_pytorch():
    """A layer updates each stream by the other's states from before it."""
    rng = np.random.default_rng(0)
    hidden = {"text": rng.normal(size=(2, 5, D)), "image": rng.normal(size=(2, 4, D))}
    masks = {"text": np.ones((2, 5), bool), "image": np.ones((2, 4), bool)}
    masks["text"][1, 3:] = masks["image"][0, 2:] = False

    def stream(name):
        init = nn.initializers.normal(0.3)
        return Stream(H, F, "relu", EPSILON, 0.0, init, False, name=name)

    layer, states = Layer(stream), jax.tree.map(jnp.float32, hidden)
    shared = Shared({}, jax.tree.map(jnp.asarray, masks))
    variables = layer.init(jax.random.key(0), states, None, 0, shared)
    variables = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), variables)
    out, _ = layer.apply(variables, states, None, 0, shared)
    for name, other in (("text", "image"), ("image", "text")):
        theirs = torch_stream(
            variables["params"][name], hidden[name], masks[name], hidden[other], masks[other]
        )
        np.testing.assert_allclose(out[name], theirs, atol=2e-5)


def test_vectors_are_combined_where_they_are_present():
    first, second = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), jnp.full((3, 2), 10.0)
    present = jnp.array([[1, 1], [1, 0], [0, 0]], bool)
    mean = combine((first, second), present, "mean")
    np.testing.assert_allclose(mean, [[5.5, 6.0], [3.0, 4.0], [0.0, 0.0]])
    product = combine((first, second), present, "product")
    np.testing.assert_allclose(product, [[10.0, 20.0], [3.0, 4.0], [0.0, 0.0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_masked_is_not_read(bad):
    states = jnp.array([[[1.0], [bad]], [[bad], [bad]]])
    keep = jnp.array([[1, 0], [0, 0]], bool)
    np.testing.assert_array_equal(masked_mean(states, keep), [[1.0], [0.0]])
    np.testing.assert_array_equal(only_present(states[:, 1], keep[:, 1]), [[0.0], [0.0]])
