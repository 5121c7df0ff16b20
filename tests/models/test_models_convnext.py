"""ConvNeXt and ConvNeXt V2 against transformers' PyTorch."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from parity import assert_near, check_defaults, check_head, check_old_file, check_sizes
from pictures import images, without_labels
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN

import fmjax
from fmjax.models import convnext, convnextv2
from fmjax.tree import count_parameters

SIZES = {
    "num_channels": 2, "patch_size": 3, "num_stages": 2, "hidden_sizes": (6, 10), "depths": (1, 2),
    "layer_norm_eps": 1e-4, "image_size": 18, "id2label": ("a", "b", "c"),
}  # fmt: skip
V1 = convnext.Config(**SIZES, layer_scale_init_value=0.7)
CASES = [
    (convnext, "model", dataclasses.replace(V1, hidden_act="relu", layer_scale_init_value=0.0)),
    (convnext, "image_classification", V1),
    (convnextv2, "model", convnextv2.Config(**SIZES)),
    (convnextv2, "image_classification", convnextv2.Config(**SIZES)),
]


@pytest.mark.parametrize(("family", "head", "config"), CASES)
def test_equals_pytorch(family, head, config, tmp_path):
    """On images whose last pixels are no whole patch."""
    config = without_labels(config, head)
    inputs = images(config, rows=19, columns=25)
    check_head(family, config, head, tmp_path, inputs, attentions=False)


def test_response_normalisation_of_a_feature_that_is_nowhere():
    """What relu may leave: no gradient, and not one that is nan."""
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    x[0, ..., 2] = 0
    scale, bias = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 5)).astype(np.float32)
    twin = ConvNextV2GRN(5).double()
    twin.weight.data, twin.bias.data = torch.tensor(scale).double(), torch.tensor(bias).double()
    theirs = torch.tensor(x).double().requires_grad_()
    out = twin(theirs)
    out.sin().sum().backward()
    norm = convnextv2.ResponseNorm()
    variables = {"params": {"scale": scale, "bias": bias}}
    assert_near(norm.apply(variables, x), out.detach(), "output")
    grad = jax.grad(lambda x: jax.numpy.sin(norm.apply(variables, x)).sum())(x)
    assert_near(grad, theirs.grad, "gradient")


AUTHORS = {
    "embeddings.patch_embeddings": "downsample_layers.0.0",
    "embeddings.layernorm": "downsample_layers.0.1",
    "encoder.stages.1.downsampling_layer.": "downsample_layers.1.",
    "encoder.stages.": "stages.",
    ".layers.": ".",
    ".layernorm.": ".norm.",
    ".layer_scale_parameter": ".gamma",
    ".grn.weight": ".grn.gamma",
    ".grn.bias": ".grn.beta",
    "classifier.": "head.",
}
TIMM = {
    "embeddings.patch_embeddings": "stem.0",
    "embeddings.layernorm": "stem.1",
    "downsampling_layer": "downsample",
    "encoder.stages.": "stages.",
    ".layers.": ".blocks.",
    ".layernorm.": ".norm.",
    ".layer_scale_parameter": ".gamma",
    ".dwconv.": ".conv_dw.",
    ".pwconv": ".mlp.fc",
    "classifier.": "head.fc.",
}


@pytest.mark.parametrize(
    ("family", "names", "last"),
    [(convnext, AUTHORS, "norm"), (convnext, TIMM, "head.norm"), (convnextv2, AUTHORS, "norm")],
    ids=["authors", "timm", "v2"],
)
def test_other_names_load(family, names, last, tmp_path):
    def rename(tensor):
        tensor = tensor.removeprefix(family.PREFIX)
        if tensor.startswith("layernorm."):
            return tensor.replace("layernorm", last)
        for ours, theirs in names.items():
            tensor = tensor.replace(ours, theirs)
        return tensor

    assert rename(f"{family.PREFIX}layernorm.bias") == f"{last}.bias"
    config = family.VARIANTS["tiny"]
    check_old_file(family, config, "image_classification", tmp_path, rename=rename)


def test_published_sizes():
    check_sizes(convnext, dict.fromkeys(("tiny", "tiny-224"), "ConvNextModel"))
    check_sizes(convnextv2, dict.fromkeys(("tiny", "atto-224"), "ConvNextV2Model"))
    names = tuple(map(str, range(1000)))
    # Liu et al. 2022, table 1, and Woo et al. 2023, table 9, in millions.
    for family, sizes in (
        (convnext, {"tiny-224": 29, "base-224": 89}),
        (convnextv2, {"atto-224": 3.7, "nano-224": 15.6, "huge-224": 660}),
    ):
        for variant, millions in sizes.items():
            config = dataclasses.replace(family.VARIANTS[variant], id2label=names)
            model = family.Model(config, head="image_classification")
            count = count_parameters(fmjax.hub.abstract_variables(model)) / 1e6
            assert round(count, 1 if millions < 20 else 0) == millions, variant


def test_config_defaults_are_transformers_defaults():
    check_defaults(convnext)
    check_defaults(convnextv2)


def test_stochastic_depth_grows_from_none():
    """Without its branches every block is the identity."""
    config = dataclasses.replace(V1, drop_path_rate=0.999, depths=(2, 1), num_stages=2)
    model = convnext.Model(config)
    pixels = images(config, rows=18, columns=18)["pixel_values"]
    variables = model.init(jax.random.key(0), pixels)

    def states(**options):
        out = model.apply(variables, pixels, output_hidden_states=True, **options)
        return out.hidden_states

    plain, dropped = states(), states(train=True, rngs={"dropout": jax.random.key(1)})
    assert not np.allclose(plain[1], plain[0])
    # The first block is never dropped, the last nearly always.
    first = convnext.Block(config, 0.0, False)
    block = {"params": variables["params"]["stages_0"]["blocks_0"]}
    assert not np.allclose(dropped[1], dropped[0])
    assert np.isfinite(np.asarray(dropped[2])).all()
    np.testing.assert_allclose(
        model.apply(variables, pixels, output_hidden_states=True).hidden_states[0], plain[0]
    )
    assert first.apply(block, plain[0]).shape == plain[0].shape


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one number a stage each") as error:
        convnext.Config(depths=(1,), hidden_act="bump", patch_size=(1, 2, 3), drop_path_rate=1.0)
    for words in ("num_stages=4", "hidden_act='bump'", "patch_size=(1, 2, 3)", "drop_path_rate=1"):
        assert words in str(error.value)
    model, variables = fmjax.create("convnext", "tiny", rng=jax.random.key(0))
    with pytest.raises(ValueError, match="need 4 rows and 4 columns"):
        model.apply(variables, np.zeros((1, 3, 8, 3)))
