"""Hub-era names and prefixes."""

import numpy as np
import pytest

from fmjax.weights import Tensor, fit_prefix, modern_names


def tensors(*names):
    array = np.zeros(1)
    return {name: Tensor(name, (1,), array.dtype, lambda: array) for name in names}


def renamed(result):
    assert all(tensor.name == name for name, tensor in result.items())
    return set(result)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("bert.embeddings.LayerNorm.beta", "bert.embeddings.LayerNorm.bias"),
        ("LayerNorm.beta", "LayerNorm.bias"),
        ("layer.0.layer_norm.gamma", "layer.0.layer_norm.weight"),
        ("encoder.layernorm_before.gamma", "encoder.layernorm_before.weight"),
        ("convnext.stages.0.layers.0.gamma", "convnext.stages.0.layers.0.gamma"),
        ("LayerNorm.block.gamma", "LayerNorm.block.gamma"),
        ("layer.0.grn.gamma", "layer.0.grn.gamma"),
        ("gamma", "gamma"),
        ("conv.weight_g", "conv.weight_g"),
    ],
)
def test_old_names_become_modern(old, new):
    assert renamed(modern_names(tensors(old))) == {new}


def test_data_parallel_prefix_goes_only_from_all():
    assert renamed(modern_names(tensors("module.a.b", "module.LayerNorm.beta"))) == {
        "a.b",
        "LayerNorm.bias",
    }
    assert renamed(modern_names(tensors("module.a", "b"))) == {"module.a", "b"}
    assert modern_names({}) == {}


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"'LayerNorm\.weight' and 'LayerNorm\.gamma' both"):
        modern_names(tensors("LayerNorm.weight", "LayerNorm.gamma"))
    with pytest.raises(ValueError, match=r"both become 'a'"):
        fit_prefix(tensors("a", "bert.a"), {"a"}, "bert.")


HEAD = {"bert.encoder.w", "bert.pooler.w", "classifier.w"}
BASE = {"encoder.w", "pooler.w"}


def test_base_checkpoint_into_a_head_model():
    assert renamed(fit_prefix(tensors("encoder.w", "pooler.w"), HEAD, "bert.")) == {
        "bert.encoder.w",
        "bert.pooler.w",
    }


def test_an_expected_name_stays_unless_the_prefixed_one_is_expected():
    result = fit_prefix(tensors("encoder.w", "classifier.w", "old.w"), HEAD, "bert.")
    assert renamed(result) == {"bert.encoder.w", "classifier.w", "bert.old.w"}
    both = {"bert.w", "w"}
    assert renamed(fit_prefix(tensors("w"), both, "bert.")) == {"bert.w"}


def test_head_checkpoint_into_a_base_model():
    result = fit_prefix(tensors(*HEAD), BASE, "bert.")
    assert renamed(result) == {"encoder.w", "pooler.w", "classifier.w"}


def test_names_that_fit_stay():
    assert renamed(fit_prefix(tensors(*HEAD), HEAD, "bert.")) == HEAD
    assert renamed(fit_prefix(tensors(*BASE), BASE, "bert.")) == BASE
    assert renamed(fit_prefix(tensors(*BASE), BASE, "")) == BASE
