"""VGG and the small CNN against PyTorch's layers, in the Sequentials that torchvision has."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from parity import assert_near
from safetensors.torch import save_file
from torch import nn

import fmjax
from fmjax.config import config_to_json, write_json
from fmjax.models import cnn, vgg
from fmjax.nn.conv import average_grid
from fmjax.tasks.apply import apply_fn
from fmjax.tree import count_parameters, flatten

SMALL = vgg.Config(
    num_channels=2, image_size=12, hidden_sizes=(3, 5), depths=(1, 2), pooled_size=2,
    dense_sizes=(7, 6), id2label=("a", "b", "c"),
)  # fmt: skip
NORMED = dataclasses.replace(SMALL, batch_norm=True, dense_sizes=(), hidden_act="gelu")


class Twin(nn.Module):
    """Torchvision's layout."""

    def __init__(self, config):
        super().__init__()
        act = {"relu": nn.ReLU, "gelu": nn.GELU}[config.hidden_act]
        layers, width = [], config.num_channels
        for features, depth in zip(config.hidden_sizes, config.depths, strict=True):
            for _ in range(depth):
                layers.append(nn.Conv2d(width, features, 3, padding=1))
                layers += [nn.BatchNorm2d(features)] if config.batch_norm else []
                layers.append(act())
                width = features
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(config.pooled_size)
        layers, width = [], width * config.pooled_size**2
        for features in config.dense_sizes:
            layers += [nn.Linear(width, features), act(), nn.Dropout(config.dropout)]
            width = features
        self.classifier = nn.Sequential(*layers, nn.Linear(width, len(config.id2label)))

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def twin_of(family, config, folder):
    """A random twin and its weights in a folder that fmjax loads."""
    torch.manual_seed(0)
    twin = Twin(config)
    for tensor in twin.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.randn_like(tensor).abs()
    folder.mkdir()
    save_file(twin.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    data = config_to_json(config, {}) | {
        "model_type": family.MODEL_TYPE,
        "architectures": [family.HEADS["image_classification"]],
    }
    write_json(folder / "config.json", data)
    return twin


@pytest.mark.parametrize(
    ("family", "config", "rows"),
    [(vgg, SMALL, 12), (vgg, NORMED, 15), (cnn, cnn.VARIANTS["mnist"], 28)],
    ids=["plain", "normed", "cnn"],
)
def test_equals_pytorch(family, config, rows, tmp_path):
    """Logits, gradients, images of another size, training's statistics, and the way back."""
    twin = twin_of(family, config, tmp_path / "torch").double()
    model, variables = fmjax.load(tmp_path / "torch")
    assert model.config == config
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, rows, rows + 2, config.num_channels)).astype(np.float32)
    weights = rng.normal(size=(3, len(config.id2label)))
    x = torch.tensor(pixels).double().movedim(-1, 1)
    for train in (False, True):
        if train and config.dropout:  # which no two libraries draw alike
            twin.classifier.eval()
            model = model.clone(config=dataclasses.replace(config, dropout=0.0))
            twin.features.train()
        else:
            twin.train(train)
        apply = apply_fn(model)

        @jax.jit
        def run(variables, apply=apply, train=train):
            def total(params):
                inputs = {"pixel_values": pixels}
                out, updates = apply(variables | {"params": params}, inputs, None, train=train)
                return (out.logits * weights).sum(), (out.logits, updates)

            return jax.value_and_grad(total, has_aux=True)(variables["params"])

        (_, (logits, updates)), grads = run(variables)
        theirs = twin(x)
        assert_near(logits, theirs.detach(), "logits")
        twin.zero_grad()
        (theirs * torch.tensor(weights)).sum().backward()
        ours = {tensor.name: tensor for tensor in exported(family, model, variables, grads)}
        largest = max(float(parameter.grad.abs().max()) for parameter in twin.parameters())
        for name, parameter in twin.named_parameters():
            # A bias before a norm has a gradient of sums that cancel.
            scale = max(float(parameter.grad.abs().max()), 1e-2 * largest)
            error = np.abs(ours[name].read() - parameter.grad.numpy()).max() / scale
            assert error < 2e-5, f"gradient of {name}: {error}"
        if train and config.batch_norm:
            moved = {t.name: t for t in exported(family, model, updates, variables["params"])}
            for name, buffer in twin.named_buffers():
                assert_near(moved[name].read(), buffer, name)
    fmjax.save(tmp_path / "again", model, variables)
    _, again = fmjax.load(tmp_path / "again")
    for path, leaf in flatten(again).items():
        np.testing.assert_array_equal(leaf, flatten(variables)[path], err_msg=path)


def exported(family, model, statistics, params):
    """Variables as tensors by PyTorch's names."""
    from fmjax.weights import export_params

    flat = flatten({**statistics, "params": params})
    return export_params(family.rules(model.config, model.head), flat)


def test_averages_equal_pytorch():
    x = np.random.default_rng(0).normal(size=(2, 7, 3, 5)).astype(np.float32)
    theirs = nn.functional.adaptive_avg_pool2d(torch.tensor(x).movedim(-1, 1), (3, 4))
    np.testing.assert_allclose(average_grid(x, (3, 4)), theirs.movedim(1, -1), atol=1e-6)


def test_classifiers_have_the_published_number_of_parameters():
    """Simonyan & Zisserman 2014, table 2, in millions; torchvision's to the last one."""
    names = tuple(map(str, range(1000)))
    sizes = {"11": 132_863_336, "13": 133_047_848, "16": 138_357_544, "19": 143_667_240}
    sizes["19-bn"] = 143_678_248
    for variant, size in sizes.items():
        config = dataclasses.replace(vgg.VARIANTS[variant], id2label=names)
        model = vgg.Model(config, head="image_classification")
        assert count_parameters(fmjax.hub.abstract_variables(model)) == size


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one number a stage") as error:
        vgg.Config(depths=(1,), dense_sizes=(0,), hidden_act="bump", dropout=1.0, pooled_size=0)
    for words in ("dense_sizes=(0,)", "hidden_act='bump'", "dropout=1.0", "pooled_size=0"):
        assert words in str(error.value)
    model, variables = fmjax.create("cnn", "tiny", rng=jax.random.key(0))
    with pytest.raises(ValueError, match="need 4 rows and 4 columns"):
        model.apply(variables, np.zeros((1, 3, 8, 1)))
