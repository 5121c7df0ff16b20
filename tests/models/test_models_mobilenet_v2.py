"""MobileNetV2 against transformers' PyTorch, in evaluation and in training."""

import dataclasses

import jax
import numpy as np
import pytest
from parity import check_defaults, check_head, check_old_file, check_sizes, check_training
from pictures import images, without_labels
from torch import nn

import fmjax
from fmjax.models import mobilenet_v2
from fmjax.tree import count_parameters

# Narrow, with gaps in the last blocks' windows, padded as PyTorch does.
NARROW = mobilenet_v2.Config(
    num_channels=2, image_size=32, depth_multiplier=0.125, depth_divisible_by=2, min_depth=4,
    expand_ratio=1.5, output_stride=8, first_layer_is_expansion=False, finegrained_output=False,
    tf_padding=False, classifier_dropout_prob=0.0, id2label=("a", "b", "c"),
)  # fmt: skip
# Padded as TensorFlow does, images get as small as they can.
WIDER = dataclasses.replace(
    NARROW, tf_padding=True, output_stride=32, first_layer_is_expansion=True, hidden_act="silu"
)


@pytest.mark.parametrize(
    ("head", "config"),
    [
        pytest.param("model", WIDER, marks=pytest.mark.slow),
        ("semantic_segmentation", NARROW),
    ],
)
def test_equals_pytorch(head, config, tmp_path):
    if head == "model":
        config = without_labels(config, head)
    inputs = images(config, rows=27, columns=32)
    check_head(mobilenet_v2, config, head, tmp_path, inputs, attentions=False)


@pytest.mark.slow
def test_training_equals_pytorch(tmp_path):
    """As TensorFlow: PyTorch's class has the momentum the wrong way round, so it is told 0.003."""

    def tensorflow(twin):
        for module in twin.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.003

    # Through 52 normalisations by batches, gradients in float32 are off by 9.6e-5 (PyTorch's own:
    # 8.8e-5).
    inputs = images(NARROW, rows=27, columns=32)
    check_training(
        mobilenet_v2, NARROW, "image_classification", tmp_path, inputs,
        gradient_tolerance=2e-4, prepare=tensorflow,
    )  # fmt: skip


def test_torchvision_names_load(tmp_path):
    """ "mobilenet_v2.layer.0.conv_3x3.normalization" is "features.2.conv.1.1"; and its config."""
    steps = {"expand_1x1": "0.", "conv_3x3": "1."}

    def rename(tensor):
        *path, kind, leaf = tensor.removeprefix("mobilenet_v2.").split(".")
        number = int(kind == "normalization")
        if kind == "classifier":
            return f"classifier.1.{leaf}"
        if path == ["conv_1x1"]:
            return f"features.18.{number}.{leaf}"
        if path[-1] == "first_conv":
            return f"features.0.{number}.{leaf}"
        if path[0] == "conv_stem":
            place, before = 1, {"conv_3x3": "0."}
        else:
            place, before = int(path[1]) + 2, steps
        step = before.get(path[-1])
        end = f"{len(before) + number}" if step is None else f"{step}{number}"
        return f"features.{place}.conv.{end}.{leaf}"

    config = dataclasses.replace(WIDER, tf_padding=False, layer_norm_eps=1e-5)
    check_old_file(mobilenet_v2, config, "image_classification", tmp_path, rename=rename)
    names = {rename("mobilenet_v2.conv_stem.first_conv.convolution.weight")}
    told = mobilenet_v2.from_tensors(WIDER, "image_classification", names)
    assert told == config
    assert mobilenet_v2.from_tensors(WIDER, "image_classification", {"classifier.bias"}) == WIDER


def test_published_sizes():
    check_sizes(mobilenet_v2, dict.fromkeys(("tiny", "0.35-96", "1.4-224"), "MobileNetV2Model"))
    names = tuple(map(str, range(1000)))
    config = dataclasses.replace(mobilenet_v2.VARIANTS["1.0-224"], id2label=names)
    model = mobilenet_v2.Model(config, head="image_classification")
    # Torchvision's; 3.4 million in Sandler et al. 2018, table 4.
    assert count_parameters(fmjax.hub.abstract_variables(model)) == 3_504_872


def test_config_defaults_are_transformers_defaults():
    check_defaults(mobilenet_v2)


def test_whole_features_are_dropped_before_labels():
    config = dataclasses.replace(NARROW, classifier_dropout_prob=0.5)
    head = mobilenet_v2.Segmentation(config, train=True)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 40)).astype(np.float32)
    variables = head.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, x)
    variables = jax.tree.map(np.array, variables)
    # One feature alone reaches the labels, as it is.
    variables["params"]["out"]["kernel"][:] = 0
    variables["params"]["out"]["kernel"][0, 0, 7] = 1
    seen = set()
    for seed in range(8):
        rngs = {"dropout": jax.random.key(seed)}
        y, _ = head.apply(variables, x, rngs=rngs, mutable=["batch_stats"])
        for image in np.asarray(y[..., 0]):
            seen.add(bool((image == 0).all()))
            assert (image == 0).all() or (image != 0).any()
    assert seen == {True, False}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="depth_multiplier=0 must be positive") as error:
        mobilenet_v2.Config(depth_multiplier=0, output_stride=5, hidden_act="bump")
    for words in ("output_stride=5", "hidden_act='bump'"):
        assert words in str(error.value)
