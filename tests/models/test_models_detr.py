"""DETR against transformers: masks, positions, all layers' outputs, names of files."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from parity import assert_near, check_defaults, check_head, check_old_file

import fmjax
from fmjax.config import config_to_json, parse_config
from fmjax.models import detr, resnet
from fmjax.nn.conv import Conv
from fmjax.tree import count_parameters

# Sizes that no wrong transpose survives.
SMALL = detr.Config(
    backbone_config=resnet.Config(
        num_channels=2, embedding_size=6, hidden_sizes=(8, 12), depths=(1, 2)
    ),
    num_channels=2, num_queries=5, encoder_layers=2, encoder_ffn_dim=20,
    encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=14, decoder_attention_heads=4,
    d_model=16, id2label=("a", "b", "c"),
)  # fmt: skip


def masked_images(config):
    """Two images of one batch, of which the second has padding below it and beside it."""
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 26, 37, config.num_channels)).astype(np.float32)
    mask = np.ones((2, 26, 37), np.int64)
    mask[1, 19:] = 0
    mask[1, :, 24:] = 0
    return {"pixel_values": pixels * mask[..., None].astype(np.float32), "pixel_mask": mask}


CONFIGS = {
    "model": dataclasses.replace(
        SMALL,
        auxiliary_loss=True,
        position_embedding_type="learned",
        activation_function="gelu",
        id2label=("LABEL_0", "LABEL_1"),
    ),
    "object_detection": SMALL,
}


@pytest.mark.parametrize("head", detr.HEADS)
def test_equals_pytorch(head, tmp_path):
    """PyTorch's class freezes the backbone, which is not what is compared here."""
    config = CONFIGS[head]
    check_head(
        detr, config, head, tmp_path, masked_images(config),
        prepare=lambda twin: twin.requires_grad_(True),
        # Kernels of queries, whose gradients nearly cancel: 1.2e-5 measured.
        gradient_tolerance=3e-5,
    )  # fmt: skip


def test_auxiliary_outputs_are_those_of_a_model_with_fewer_layers():
    config = dataclasses.replace(SMALL, encoder_layers=1)
    model, variables = fmjax.create("detr", config, head="object_detection", rng=jax.random.key(0))
    shorter = detr.Model(dataclasses.replace(config, decoder_layers=1), head="object_detection")
    pixels = masked_images(config)["pixel_values"][:, :16, :16]
    out = jax.jit(lambda v: model.apply(v, pixels, output_intermediate=True))(variables)
    first = jax.jit(lambda v: shorter.apply(v, pixels))(variables)
    assert len(out.auxiliary_logits) == 1
    np.testing.assert_allclose(out.auxiliary_logits[0], first.logits, atol=1e-5)
    np.testing.assert_allclose(out.auxiliary_boxes[0], first.pred_boxes, atol=1e-5)
    assert np.abs(out.logits - first.logits).max() > 1e-3


def test_published_sizes():
    """As PyTorch's with a backbone of transformers' own: timm's has the same parameters."""
    for variant, depth in (("resnet-50", "50"), ("resnet-101", "101"), ("resnet-50-dc5", "50")):
        published = detr.VARIANTS[variant]
        config = dataclasses.replace(
            published, backbone_config=resnet.VARIANTS[depth], dilation=False
        )
        data = config_to_json(config, {})
        data.pop("label2id")
        with torch.device("meta"):
            twin = transformers.DetrModel(transformers.AutoConfig.for_model("detr", **data))
        theirs = sum(parameter.numel() for parameter in twin.parameters())
        assert count_parameters(fmjax.hub.abstract_variables(detr.Model(published))) == theirs


def test_config_defaults_are_transformers_defaults():
    check_defaults(detr)


def timm_name(name):
    """ "embedder.embedder.convolution" is "conv1", and so on."""
    body, _, inner = name.partition("backbone.conv_encoder.model.")
    if not inner:
        return name.replace("out_proj", "o_proj").replace(".fc", ".mlp.fc")  # of version 5
    *path, kind, leaf = inner.split(".")
    part = {"convolution": "conv", "normalization": "bn"}[kind]
    if path == ["embedder", "embedder"]:
        return f"{body}backbone.conv_encoder.model.{part}1.{leaf}"
    _, _, stage, _, block, *rest = path
    place = f"{body}backbone.conv_encoder.model.layer{int(stage) + 1}.{block}"
    if rest == ["shortcut"]:
        return f"{place}.downsample.{int(part == 'bn')}.{leaf}"
    return f"{place}.{part}{int(rest[1]) + 1}.{leaf}"


def test_timms_names_load(tmp_path):
    check_old_file(detr, SMALL, "object_detection", tmp_path, rename=timm_name)


def test_files_of_timm_backbones_are_read_and_written(tmp_path):
    """As the hub has them: the backbone by name, no config of it, and timm's names of tensors."""
    old = {
        "model_type": "detr", "backbone": "resnet18", "use_timm_backbone": True,
        "use_pretrained_backbone": True, "backbone_config": None, "dilation": True,
        "classifier_dropout": 0.0, "scale_embedding": False, "max_position_embeddings": 1024,
        "num_hidden_layers": 1, "encoder_layers": 1, "decoder_layers": 1, "d_model": 16,
        "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "num_queries": 4,
    }  # fmt: skip
    config = parse_config(detr.Config, old, detr.FIXED)
    assert config.backbone_config == resnet.TimmBackbone("resnet18", output_stride=16)
    names = {rule.tensors[0] for rule in detr.rules(config, "object_detection")}
    assert "model.backbone.conv_encoder.model.layer4.0.downsample.1.running_mean" in names
    written = config_to_json(config, {})
    assert written["backbone_config"]["output_stride"] == 16
    assert parse_config(detr.Config, written, detr.FIXED) == config
    with pytest.raises(ValueError, match="must be 16 with dilation=True"):
        parse_config(detr.Config, written | {"dilation": False}, detr.FIXED)
    features = {**resnet_json(SMALL), "out_features": ["stage1"]}
    with pytest.raises(ValueError, match="the last stage, stage2"):
        parse_config(detr.Config, {"backbone_config": features}, detr.FIXED)


def resnet_json(config):
    return config_to_json(config, {})["backbone_config"]


def test_a_dilated_stage_is_the_strided_one_at_more_places():
    """Kernels of an undilated ResNet give the same numbers at every second place of the first
    block; torchvision's and timm's dilated stages are the same function.
    """
    config = resnet.Config(
        embedding_size=4, hidden_sizes=(8,), depths=(1,), downsample_in_first_stage=True
    )
    pixels = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)
    plain, dilated = resnet.Model(config), resnet.Model(config, dilated=True)
    variables = jax.jit(plain.init)(jax.random.key(0), pixels)
    coarse = jax.jit(plain.apply)(variables, pixels).last_hidden_state
    fine = jax.jit(dilated.apply)(variables, pixels).last_hidden_state
    assert fine.shape == (1, 4, 4, 8)
    np.testing.assert_allclose(fine[:, ::2, ::2], coarse, atol=1e-5)
    deeper = dataclasses.replace(config, depths=(2,))
    places = list(resnet.places(deeper, dilated=True))[-1]
    assert [(place.stride, place.dilation) for place in places] == [(1, 1), (1, 2)]


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_dilated_convolutions_equal_pytorch(dilation):
    """Gradients too, which have a way of their own on CPUs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 11, 13, 3)).astype(np.float32)
    layer = Conv(5, 3, stride=2, dilation=dilation)
    variables = layer.init(jax.random.key(0), x)
    theirs = torch.nn.Conv2d(3, 5, 3, stride=2, padding=dilation, dilation=dilation, bias=False)
    kernel = np.asarray(variables["params"]["kernel"])
    theirs.weight.data = torch.tensor(kernel.transpose(3, 2, 0, 1))
    image = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    out = theirs(image)
    cotangent = rng.normal(size=out.shape).astype(np.float32)
    out.backward(torch.tensor(cotangent))
    ours, pull = jax.vjp(lambda v, x: layer.apply(v, x), variables, x)
    of_kernel, of_x = pull(jax.numpy.asarray(cotangent.transpose(0, 2, 3, 1)))
    assert_near(ours, out.detach().movedim(1, -1), "output")
    assert_near(of_x, image.grad.movedim(1, -1), "gradient of x")
    grad = theirs.weight.grad.numpy().transpose(2, 3, 1, 0)
    assert_near(of_kernel["params"]["kernel"], grad, "gradient of the kernel")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must be 'sine' or") as error:
        dataclasses.replace(
            SMALL, position_embedding_type="none", d_model=18, activation_function="bump",
            num_queries=0, dropout=1.0, dilation=True,
        )  # fmt: skip
    for words in ("d_model=18", "'bump'", "num_queries=0", "dropout=1.0", "needs a timm"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="backbone='vgg16' must be one of"):
        detr.Config(backbone="vgg16")
    pixels = masked_images(SMALL)["pixel_values"]
    with pytest.raises(ValueError, match="pixel_mask has the shape"):
        detr.Model(SMALL).apply({}, pixels, pixels[..., 0, 0])
