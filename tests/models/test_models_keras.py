"""The convolutional families against keras.applications, from its files of weights."""

import os
import re
import types

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
import pytest
from keras.src.applications import (
    convnext,
    densenet,
    efficientnet,
    inception_v3,
    mobilenet_v2,
    resnet,
    vgg16,
)
from keras.src.legacy.saving import legacy_h5_format
from parity import assert_near

import fmjax
from fmjax.cli import main
from fmjax.models import convnext as our_convnext
from fmjax.models import densenet as our_densenet
from fmjax.models import efficientnet as our_efficientnet
from fmjax.models import inception_v3 as our_inception_v3
from fmjax.models import mobilenet_v2 as our_mobilenet_v2
from fmjax.models import resnet as our_resnet
from fmjax.models import vgg as our_vgg
from fmjax.tree import flatten

LABELS = ("a", "b", "c")


@pytest.fixture
def narrow(monkeypatch):
    """Makes the layers of a module of keras.applications build with a share of their features."""

    def divide(module, by):
        names = types.SimpleNamespace(**vars(keras.layers))
        # Weights are drawn by numpy afterwards: to draw each on its own takes a compilation.
        names.Conv2D = lambda filters, *args, **kw: keras.layers.Conv2D(
            filters // by, *args, kernel_initializer="zeros", **kw
        )
        names.Dense = lambda units, *args, **kw: keras.layers.Dense(
            units if units == len(LABELS) else units // by, *args, **kw
        )
        monkeypatch.setattr(module, "layers", names)

    return divide


def randomised(model, seed=0):
    """Every weight random: norms, statistics and biases too."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        value = np.asarray(variable)
        noise = 0.1 * rng.normal(size=value.shape)
        positive = variable.name in ("variance", "moving_variance", "gamma")
        if value.dtype.kind == "f":
            variable.assign(value + (np.abs(noise) if positive else noise))
    return model


def legacy_file(model, path):
    """As keras.applications' files are: the older layout, the weights alone."""
    import h5py

    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)


def check(twin, model_type, config, tmp_path, size, *, tolerance=1e-5, logits=None):
    """The classifier and the bare model give Keras' numbers, from each kind of file."""
    randomised(twin)
    legacy_file(twin, tmp_path / "old.h5")
    twin.save_weights(tmp_path / "new.weights.h5")
    pixels = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    theirs = np.asarray((logits or twin.predict_on_batch)(pixels))
    head = {"head": "image_classification", "num_labels": LABELS}
    model, variables = fmjax.load_weights(tmp_path / "old.h5", model_type, config, **head)
    ours = jax.jit(model.apply)(variables, pixels).logits
    assert_near(ours, theirs, "logits", tolerance)
    again, read = fmjax.load_weights(tmp_path / "new.weights.h5", model_type, config, **head)
    assert again == model
    for path, leaf in flatten(read).items():
        np.testing.assert_array_equal(leaf, flatten(variables)[path], err_msg=path)
    _, body = fmjax.load_weights(tmp_path / "old.h5", model_type, config)
    assert flatten(body).keys() == {p for p in flatten(variables) if "params/head" not in p}
    return model, variables


@pytest.mark.slow
def test_vgg(narrow, tmp_path):
    """Two rows and columns are left to flatten."""
    narrow(vgg16, 16)
    twin = vgg16.VGG16(weights=None, input_shape=(64, 64, 3), classes=3, classifier_activation=None)
    config = our_vgg.Config(
        image_size=64, hidden_sizes=(4, 8, 16, 32, 32), pooled_size=2, dense_sizes=(256, 256)
    )
    check(twin, "vgg", config, tmp_path, 64)


def test_resnet(tmp_path):
    def stacks(x):
        x = resnet.stack_residual_blocks_v1(x, 4, 2, stride1=1, name="conv2")
        return resnet.stack_residual_blocks_v1(x, 8, 2, name="conv3")

    twin = resnet.ResNet(
        stacks, preact=False, use_bias=True, weights=None, input_shape=(40, 40, 3), classes=3,
        classifier_activation=None,
    )  # fmt: skip
    config = our_resnet.Config(hidden_sizes=(16, 32), depths=(2, 2))
    model, _ = check(twin, "resnet", config, tmp_path, 40)
    assert model.config.downsample_in_bottleneck


@pytest.mark.slow
def test_efficientnet(tmp_path):
    """From a .keras file too, by the command line."""
    stages = [
        {"kernel_size": 3, "repeats": 1, "filters_in": 32, "filters_out": 16, "expand_ratio": 1},
        {"kernel_size": 5, "repeats": 2, "filters_in": 16, "filters_out": 24, "expand_ratio": 3},
    ]
    stages = [
        stage | {"strides": stride, "id_skip": True, "se_ratio": 0.25}
        for stage, stride in zip(stages, (1, 2), strict=True)
    ]
    twin = efficientnet.EfficientNet(
        width_coefficient=0.25, depth_coefficient=1.0, default_size=32, depth_divisor=4,
        blocks_args=stages, weights=None, input_shape=(32, 32, 3), classes=3,
        classifier_activation=None,
    )  # fmt: skip
    normalised = keras.Model(twin.get_layer("stem_conv_pad").input, twin.output)
    model, variables = check(
        twin, "efficientnet", "tiny", tmp_path, 32, logits=normalised.predict_on_batch
    )
    twin.save(tmp_path / "whole.keras")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    options = ["--like", "efficientnet/tiny", "--head", "image_classification"]
    command = ["convert", str(tmp_path / "whole.keras"), str(tmp_path / "new"), *options]
    assert main([*command, "--labels", str(tmp_path / "labels.txt")]) == 0
    again, read = fmjax.load(tmp_path / "new")
    assert again == model
    for path, leaf in flatten(read).items():
        np.testing.assert_array_equal(leaf, flatten(variables)[path], err_msg=path)


@pytest.mark.slow  # 17 blocks whatever the size, of the same rules as the others
def test_mobilenet_v2(monkeypatch, tmp_path):
    """Images of an odd size, which are padded on both sides."""
    divisible = mobilenet_v2._make_divisible
    monkeypatch.setattr(mobilenet_v2, "_make_divisible", lambda width, _: divisible(width, 2))
    twin = mobilenet_v2.MobileNetV2(
        alpha=0.125, weights=None, input_shape=(45, 45, 3), classes=3, classifier_activation=None
    )
    config = our_mobilenet_v2.Config(
        depth_multiplier=0.125, depth_divisible_by=2, min_depth=2, classifier_dropout_prob=0.0
    )
    check(twin, "mobilenet_v2", config, tmp_path, 45)
    small = our_mobilenet_v2.Config(depth_multiplier=0.1)
    with pytest.raises(ValueError, match="has 8 features before and after"):
        fmjax.load_weights(tmp_path / "old.h5", "mobilenet_v2", small)


def test_what_keras_has_not_is_refused(tmp_path, capsys):
    """Families and variants of another function, files of another net."""
    net = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(2, name="fc1")])
    legacy_file(net, tmp_path / "x.h5")
    for model_type, config, words in (
        ("bert", "tiny", "bert is not read from Keras' files"),
        ("vgg", "tiny", "no VGG with batch normalisation"),
        ("resnet", our_resnet.Config(layer_type="basic"), "no such ResNet"),
        ("efficientnet", our_efficientnet.Config(out_channels=(32, 24, 40, 80, 112, 192, 320)),
         "block 0 has 64 features before and after"),
        ("resnet", "tiny", "conv1_conv/kernel"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(words)):
            fmjax.load_weights(tmp_path / "x.h5", model_type, config)
    assert main(["convert", str(tmp_path / "x.h5"), str(tmp_path / "new")]) == 2
    assert "like=FAMILY/VARIANT" in capsys.readouterr().err


@pytest.mark.slow
def test_densenet(tmp_path):
    twin = densenet.DenseNet(
        [1, 2, 1, 1], weights=None, input_shape=(32, 32, 3), classes=3, classifier_activation=None
    )
    config = our_densenet.Config(block_config=(1, 2, 1, 1))
    check(twin, "densenet", config, tmp_path, 32)
    with pytest.raises(ValueError, match="has four blocks"):
        fmjax.load_weights(tmp_path / "old.h5", "densenet", "tiny")


@pytest.mark.slow
def test_inception_v3(narrow, tmp_path):
    """Layers with numbers alone, averages without the zeros, no classifier but the last."""
    narrow(inception_v3, 32)
    keras.layers.Conv2D(1, 1)  # numbers begin anywhere
    twin = inception_v3.InceptionV3(
        weights=None, input_shape=(75, 75, 3), classes=3, classifier_activation=None
    )
    config = our_inception_v3.Config(depth_multiplier=1 / 32, min_depth=1)
    model, _ = check(twin, "inception_v3", config, tmp_path, 75)
    assert not model.config.aux_logits
    assert not model.config.count_include_pad


def test_convnext(tmp_path):
    """Layers inside layers, and a scale without a name."""
    twin = convnext.ConvNeXt(
        (1, 1, 2, 1), (4, 6, 8, 10), include_preprocessing=False, name="convnext_small",
        input_shape=(32, 32, 3), classes=3, classifier_activation=None, layer_scale_init_value=0.5,
    )  # fmt: skip
    config = our_convnext.Config(depths=(1, 1, 2, 1), hidden_sizes=(4, 6, 8, 10))
    model, _ = check(twin, "convnext", config, tmp_path, 32)
    assert model.config.layer_norm_eps == 1e-6
    with pytest.raises(ValueError, match="has 4 stages"):
        fmjax.load_weights(tmp_path / "old.h5", "convnext", "tiny")
    sizes = {"name": "mine", "include_top": False, "pooling": "avg", "include_preprocessing": False}
    bare = convnext.ConvNeXt((1, 1, 1, 1), (4, 4, 4, 4), input_shape=(32, 32, 3), **sizes)
    legacy_file(bare, tmp_path / "bare.h5")
    config = our_convnext.Config(depths=(1, 1, 1, 1), hidden_sizes=(4, 4, 4, 4))
    with pytest.raises(ValueError, match="mine_stem"):
        fmjax.load_weights(tmp_path / "bare.h5", "convnext", config)
    sizes["name"] = "convnext_base"
    bare = convnext.ConvNeXt((1, 1, 1, 1), (4, 4, 4, 4), input_shape=(32, 32, 3), **sizes)
    legacy_file(bare, tmp_path / "bare.h5")
    _, body = fmjax.load_weights(tmp_path / "bare.h5", "convnext", config)
    np.testing.assert_array_equal(body["params"]["final_norm"]["scale"], bare.weights[-2])
