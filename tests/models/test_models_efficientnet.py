"""EfficientNet against transformers, EfficientNet-Lite against plain PyTorch layers."""

import dataclasses
import math

import jax
import numpy as np
import pictures
import pytest
import torch
from parity import assert_near, check_defaults, check_head, check_sizes, check_training
from pictures import without_labels
from torch import nn

import fmjax
from fmjax.models import efficientnet, efficientnet_lite
from fmjax.models.efficientnet import places
from fmjax.nn.vision import pair
from fmjax.tree import count_parameters, flatten
from fmjax.weights import export_params

SMALL = efficientnet.Config(
    num_channels=2, image_size=20, width_coefficient=0.25, depth_coefficient=1.5, depth_divisor=4,
    kernel_sizes=(3, 5), in_channels=(32, 16), out_channels=(16, 24), strides=(2, 2),
    num_block_repeats=(1, 1), expand_ratios=(1, 3), hidden_dim=320, depthwise_padding=(2,),
    dropout_rate=0.0, drop_connect_rate=0.0, id2label=("a", "b", "c"),
)  # fmt: skip
ODD = dataclasses.replace(SMALL, hidden_act="relu", pooling_type="max", depthwise_padding=(0,))


def images(config, rows=20):
    return pictures.images(config, rows=rows, columns=rows + 3)


@pytest.mark.parametrize(
    "config", [pytest.param(SMALL, marks=pytest.mark.slow, id="small"), pytest.param(ODD, id="odd")]
)
@pytest.mark.parametrize("head", efficientnet.HEADS)
def test_equals_pytorch(head, config, tmp_path):
    check_head(
        efficientnet, without_labels(config, head), head, tmp_path,
        images(config), attentions=False,
    )  # fmt: skip


def test_training_equals_pytorch(tmp_path):
    """As Keras: PyTorch's class has the momentum the wrong way round, so it is told 0.01."""

    def keras(twin):
        for module in twin.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.01

    check_training(
        efficientnet, SMALL, "image_classification", tmp_path, images(SMALL), tolerance=2e-5,
        prepare=keras,
    )  # fmt: skip


class Same(nn.Conv2d):
    """TensorFlow's padding."""

    def forward(self, x):
        def zeros(length):
            (size, _), (stride, _) = self.kernel_size, self.stride
            total = max((math.ceil(length / stride) - 1) * stride + size - length, 0)
            return total // 2, total - total // 2

        return super().forward(nn.functional.pad(x, (*zeros(x.shape[3]), *zeros(x.shape[2]))))


class LiteTwin(nn.Module):
    """The modules of efficientnet-lite-pytorch, by its names."""

    def __init__(self, config):
        super().__init__()

        def norm(width):
            return nn.BatchNorm2d(width, eps=config.batch_norm_eps)

        self._conv_stem = Same(config.num_channels, 32, 3, stride=2, bias=False)
        self._bn0 = norm(32)
        self._blocks = nn.ModuleList()
        for place in places(config):
            block = nn.Module()
            if place.inner != place.width:
                block._expand_conv = Same(place.width, place.inner, 1, bias=False)
                block._bn0 = norm(place.inner)
            block._depthwise_conv = Same(
                place.inner, place.inner, place.size, stride=place.stride, groups=place.inner,
                bias=False,
            )  # fmt: skip
            block._bn1 = norm(place.inner)
            block._project_conv = Same(place.inner, place.features, 1, bias=False)
            block._bn2 = norm(place.features)
            block.residual = place.residual
            self._blocks.append(block)
        self._conv_head = Same(place.features, config.hidden_dim, 1, bias=False)
        self._bn1 = norm(config.hidden_dim)
        self._fc = nn.Linear(config.hidden_dim, len(config.id2label))

    def forward(self, x):
        act = nn.functional.relu6
        x = act(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            y = x
            if hasattr(block, "_expand_conv"):
                y = act(block._bn0(block._expand_conv(y)))
            y = act(block._bn1(block._depthwise_conv(y)))
            y = block._bn2(block._project_conv(y))
            x = x + y if block.residual else y
        return self._fc(act(self._bn1(self._conv_head(x))).mean((2, 3)))


@pytest.mark.parametrize("rows", [20, 33])
def test_lite_equals_pytorch(rows):
    config = dataclasses.replace(efficientnet_lite.VARIANTS["tiny"], id2label=("a", "b", "c"))
    model = efficientnet_lite.Model(config, head="image_classification")
    _, variables = fmjax.create(
        "efficientnet_lite", config, head="image_classification", rng=jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: x + 0.3 * np.abs(rng.normal(size=x.shape)).astype(x.dtype), variables
    )
    twin = LiteTwin(config).double().eval()
    table = efficientnet_lite.rules(config, "image_classification")
    twin.load_state_dict(
        {
            tensor.name: torch.tensor(np.array(tensor.read()))
            for tensor in export_params(table, flatten(variables))
        }
    )
    pixels = images(config, rows)["pixel_values"]
    theirs = twin(torch.tensor(pixels).double().movedim(-1, 1))
    logits = jax.jit(lambda v: model.apply(v, pixels).logits)(variables)
    assert_near(logits, theirs.detach(), "logits", 2e-5)


def test_published_sizes():
    check_sizes(efficientnet, dict.fromkeys(("tiny", "b0"), "EfficientNetModel"))
    names = tuple(map(str, range(1000)))
    # Tan & Le 2019, table 2, and Liu 2020's code, in millions.
    for family, sizes in (
        (efficientnet, {"b0": 5.3, "b3": 12.2, "b5": 30.4, "b7": 66.3}),
        (
            efficientnet_lite,
            {"lite0": 4.7, "lite1": 5.4, "lite2": 6.1, "lite3": 8.2, "lite4": 13.0},
        ),
    ):
        for variant, millions in sizes.items():
            config = dataclasses.replace(family.VARIANTS[variant], id2label=names)
            model = family.Model(config, head="image_classification")
            count = count_parameters(fmjax.hub.abstract_variables(model))
            assert round(count / 1e6, 1) == millions, variant


@pytest.mark.parametrize("name", ["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7"])
def test_padding_on_both_sides_is_where_images_have_an_odd_size(name):
    config = efficientnet.VARIANTS[name]
    size, odd = -(-pair(config.image_size)[0] // 2), []
    for place in places(config):
        if place.stride == 2:
            odd += [place.number] if size % 2 else []
            size = -(-size // 2)
    assert config.depthwise_padding == tuple(odd)


def test_config_defaults_are_transformers_defaults():
    check_defaults(efficientnet)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one number a stage each") as error:
        efficientnet.Config(strides=(1, 0), pooling_type="sum", hidden_act="bump", dropout_rate=1.0)
    for words in ("strides=(1, 0)", "pooling_type='sum'", "hidden_act='bump'", "dropout_rate=1.0"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="hidden_dim=1280 must be 2560"):
        efficientnet.Config(hidden_dim=1280)
