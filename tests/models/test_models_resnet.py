"""ResNet against transformers' PyTorch ResNet, in evaluation and in training."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity import (
    check_defaults,
    check_fixture,
    check_head,
    check_old_file,
    check_sizes,
    check_training,
)
from pictures import images, without_labels

import fmjax
from fmjax.models import resnet
from fmjax.tasks import sequence_classification
from fmjax.train import (
    accumulate,
    cast,
    gradient,
    init_state,
    jit_step,
    make_train_step,
    pmap_step,
)
from fmjax.tree import count_parameters, flatten

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
BOTTLENECK = resnet.Config(
    num_channels=4, embedding_size=6, hidden_sizes=(8, 12), depths=(2, 1), hidden_act="gelu",
    id2label=("a", "b", "c"),
)  # fmt: skip
PUBLISHED = dataclasses.replace(
    BOTTLENECK, downsample_in_bottleneck=True, downsample_in_first_stage=True, hidden_act="relu"
)
BASIC = dataclasses.replace(BOTTLENECK, layer_type="basic", hidden_sizes=(6, 10))
CONFIGS = {"bottleneck": BOTTLENECK, "published": PUBLISHED, "basic": BASIC}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("head", resnet.HEADS)
def test_equals_pytorch(head, name, tmp_path):
    config = without_labels(CONFIGS[name], head)
    inputs = images(config, rows=23, columns=27)  # odd, so that padding on the wrong side shows
    check_head(resnet, config, head, tmp_path, inputs, attentions=False)


@pytest.mark.parametrize("name", ["bottleneck", "basic"])
def test_training_equals_pytorch(name, tmp_path):
    config = CONFIGS[name]
    inputs = images(config, rows=23, columns=27)
    check_training(resnet, config, "image_classification", tmp_path, inputs)


def test_the_flax_fixture_equals_pytorch():
    check_fixture(FIXTURES / "resnet_bottleneck-cls")


@pytest.mark.parametrize("name", ["bottleneck", "basic"])
def test_torchvision_names_load(name, tmp_path):
    """ "resnet.encoder.stages.0.layers.1.layer.2.convolution" is "layer1.1.conv3"."""
    parts = {"convolution": "conv", "normalization": "bn"}

    def rename(tensor):
        *path, kind, leaf = tensor.removeprefix("resnet.").split(".")
        if path == ["classifier"]:
            return f"fc.{leaf}"
        if path == ["embedder", "embedder"]:
            return f"{parts[kind]}1.{leaf}"
        _, _, stage, _, block, *rest = path
        where = f"layer{int(stage) + 1}.{block}"
        if rest == ["shortcut"]:
            return f"{where}.downsample.{int(kind == 'normalization')}.{leaf}"
        return f"{where}.{parts[kind]}{int(rest[1]) + 1}.{leaf}"

    assert rename("classifier.1.weight") == "fc.weight"
    check_old_file(resnet, CONFIGS[name], "image_classification", tmp_path, rename=rename)


def test_published_sizes():
    check_sizes(resnet, dict.fromkeys(resnet.VARIANTS, "ResNetModel"))


def test_classifiers_have_the_published_number_of_parameters():
    """Of torchvision's resnet18, 50 and 152 with 1,000 classes."""
    names = tuple(map(str, range(1000)))
    for variant, size in (("18", 11_689_512), ("50", 25_557_032), ("152", 60_192_808)):
        config = dataclasses.replace(resnet.VARIANTS[variant], id2label=names)
        model = resnet.Model(config, head="image_classification")
        abstract = fmjax.hub.abstract_variables(model)
        assert count_parameters(abstract) == size


def test_config_defaults_are_transformers_defaults():
    check_defaults(resnet)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one number a stage") as error:
        resnet.Config(layer_type="deep", depths=(1,), hidden_act="bump", hidden_sizes=(4, 6))
    for words in ("layer_type='deep'", "hidden_act='bump'"):
        assert words in str(error.value)
    model, variables = fmjax.create("resnet", "tiny", rng=jax.random.key(0))
    with pytest.raises(ValueError, match=r"must be \[B, X, Y, 3\], channels last"):
        model.apply(variables, np.zeros((2, 3, 32, 32)))
    with pytest.raises(ValueError, match="1 value a channel"):
        model.apply(variables, np.zeros((1, 8, 8, 3)), train=True, mutable=["batch_stats"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["accumulated", "jit", "pmap"])
def test_a_step_in_bfloat16_moves_the_running_statistics_in_float32(way):
    model, variables = fmjax.create(
        "resnet", "tiny", head="image_classification", num_labels=3, rng=jax.random.key(0)
    )
    batch = {
        "pixel_values": np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32),
        "labels": np.arange(8) % 3,
        "weight": np.ones(8, np.float32),
    }
    before = flatten(jax.tree.map(np.asarray, variables))
    tx = optax.sgd(1e-2)
    grad = gradient(cast(sequence_classification.loss(model), jnp.bfloat16))
    if way == "pmap":
        step = pmap_step(grad, tx)
    else:
        grad = accumulate(grad, 2 if way == "accumulated" else 1)
        step = jit_step(make_train_step(grad, tx))
    state, metrics = step(init_state(variables, tx, jax.random.key(0)), batch)
    assert np.isfinite(float(metrics["loss"].value))
    for path, leaf in flatten(state.non_trainable).items():
        assert leaf.dtype == before[path].dtype
        if path.endswith("count"):
            assert int(leaf) == (2 if way == "accumulated" else 1)
        else:
            assert leaf.dtype == jnp.float32
            moved = np.asarray(leaf) - before[path]
            assert np.abs(moved).max() > 0
            # A tenth of the way, to more digits than bfloat16 has.
            assert not np.array_equal(leaf, leaf.astype(jnp.bfloat16).astype(jnp.float32))
