"""RegNet against transformers' PyTorch RegNet, in evaluation and in training."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from parity import check_defaults, check_head, check_old_file, check_sizes, check_training
from pictures import images, without_labels

from fmjax.models import regnet

Y = regnet.Config(
    num_channels=2, embedding_size=6, hidden_sizes=(8, 12), depths=(2, 1), groups_width=4,
    id2label=("a", "b", "c"),
)  # fmt: skip
# Of groups as wide as the layer, and of one feature each.
X = dataclasses.replace(
    Y, layer_type="x", hidden_act="gelu", downsample_in_first_stage=False, hidden_sizes=(6, 8),
    groups_width=7,
)  # fmt: skip


@pytest.mark.parametrize(
    ("head", "config"), [("model", X), ("image_classification", Y)], ids=["x", "y"]
)
def test_equals_pytorch(head, config, tmp_path):
    config = without_labels(config, head)
    check_head(
        regnet, config, head, tmp_path, images(config, rows=13, columns=18), attentions=False
    )


def test_training_equals_pytorch(tmp_path):
    check_training(regnet, Y, "image_classification", tmp_path, images(Y, rows=13, columns=18))


def vision(stage, block, kind, rest):
    """Torchvision's name of what stands in a block."""
    where = f"trunk_output.block{stage + 1}.block{stage + 1}-{block}"
    number = {"convolution": 0, "normalization": 1}
    if kind == "shortcut":
        return f"{where}.proj.{number[rest[0]]}"
    if rest[0] == "attention":
        return f"{where}.f.se.fc{int(rest[1]) // 2 + 1}"
    return f"{where}.f.{'ab-c'[kind]}.{number[rest[0]]}"


def timm(stage, block, kind, rest):
    """timm's."""
    where = f"s{stage + 1}.b{block + 1}"
    part = {"convolution": "conv", "normalization": "bn"}
    if kind == "shortcut":
        return f"{where}.downsample.{part[rest[0]]}"
    if rest[0] == "attention":
        return f"{where}.se.fc{int(rest[1]) // 2 + 1}"
    return f"{where}.conv{(1, 2, 0, 3)[kind]}.{part[rest[0]]}"


@pytest.mark.parametrize("library", [vision, timm])
def test_other_names_load(library, tmp_path):
    """ "regnet.encoder.stages.0.layers.1.layer.3.convolution" is "s1.b2.conv3.conv"."""

    def rename(tensor):
        *path, leaf = tensor.removeprefix("regnet.").split(".")
        if path[0] == "classifier":
            return f"{'fc' if library is vision else 'head.fc'}.{leaf}"
        if path[0] == "embedder":
            normed = path[2] == "normalization"
            return f"stem.{int(normed) if library is vision else ('conv', 'bn')[normed]}.{leaf}"
        _, _, stage, _, block, *rest = path
        kind = "shortcut" if rest[0] == "shortcut" else int(rest[1])
        inside = rest[1:] if kind == "shortcut" else rest[2:]
        return f"{library(int(stage), int(block), kind, inside)}.{leaf}"

    assert rename("regnet.encoder.stages.0.layers.1.layer.3.convolution.weight") in (
        "s1.b2.conv3.conv.weight", "trunk_output.block1.block1-1.f.c.0.weight",
    )  # fmt: skip
    check_old_file(regnet, Y, "image_classification", tmp_path, rename=rename)


# Radosavovic et al. 2020, figures 16 and 17, in millions.
PUBLISHED = {
    "x": (2.7, 5.2, 6.2, 7.3, 9.2, 15.3, 22.1, 26.2, 39.6, 46.1, 54.3, 107.8),
    "y": (3.2, 4.3, 6.1, 6.3, 11.2, 19.4, 20.6, 30.6, 39.2, 51.8, 83.6, 145.0),
}


def test_published_sizes():
    check_sizes(regnet, dict.fromkeys(("tiny", "x-002", "y-002"), "RegNetModel"))
    published = dict(zip(regnet.SIZES, PUBLISHED["x"] + PUBLISHED["y"], strict=True))
    for name, millions in published.items():
        config = dataclasses.asdict(regnet.VARIANTS[name])
        del config["id2label"]
        with torch.device("meta"):
            twin = transformers.RegNetModel(transformers.RegNetConfig(**config))
        # The classifier of 1,000 classes is counted too.
        count = sum(p.numel() for p in twin.parameters()) + 1000 * (config["hidden_sizes"][-1] + 1)
        assert abs(count / 1e6 - millions) < 0.06, name


def test_widths_are_the_papers_quantised_lines():
    """Equations 2 to 4 of section 3.3, with figure 17's numbers of RegNetY-400MF and -1.6GF."""
    for name, depth, start, slope, step in (
        ("y-004", 16, 48, 27.89, 2.09), ("y-016", 27, 48, 20.71, 2.65),
    ):  # fmt: skip
        config = regnet.VARIANTS[name]
        lines = start + slope * np.arange(depth)
        powers = np.round(np.log(lines / start) / np.log(step))
        widths, depths = np.unique(np.round(start * step**powers / 8) * 8, return_counts=True)
        group = np.minimum(config.groups_width, widths)
        widths = np.round(widths / group) * group  # a whole number of groups
        assert config.hidden_sizes == tuple(widths.astype(int))
        assert config.depths == tuple(depths)


def test_config_defaults_are_transformers_defaults():
    check_defaults(regnet)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one number a stage each") as error:
        regnet.Config(layer_type="z", depths=(1,), hidden_act="bump", groups_width=0)
    for words in ("layer_type='z'", "hidden_act='bump'", "groups_width=0"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="must each divide into as many groups"):
        regnet.Config(groups_width=60)
