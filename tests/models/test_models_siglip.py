"""SigLIP and its two towers against transformers."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from encoder_checks import check_defaults
from parity import check_head, check_sizes, text_inputs
from pictures import images

import fmjax
from fmjax import hub
from fmjax.config import parse_config
from fmjax.models import siglip, siglip_text_model, siglip_vision_model

TEXT = siglip_text_model.Config(
    vocab_size=51, hidden_size=18, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
    max_position_embeddings=16, projection_size=12,
)  # fmt: skip
VISION = siglip_vision_model.Config(
    hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
    num_channels=2, image_size=15, patch_size=5,
)  # fmt: skip
PAIR = siglip.Config(TEXT, VISION)


def test_pair_equals_pytorch(tmp_path):
    inputs = text_inputs(TEXT, "model") | images(VISION)
    check_head(siglip, PAIR, "model", tmp_path, inputs)


@pytest.mark.slow
def test_text_equals_pytorch(tmp_path):
    check_head(siglip_text_model, TEXT, "model", tmp_path, text_inputs(TEXT, "model"))


@pytest.mark.slow
@pytest.mark.parametrize("use_head", [True, False])
def test_vision_equals_pytorch(use_head, tmp_path):
    """Of another size than the positions are for, too."""

    def prepare(twin):
        twin.forward = partial(twin.forward, interpolate_pos_encoding=True)

    config = dataclasses.replace(VISION, vision_use_head=use_head)
    inputs = images(VISION, rows=26, columns=31)
    # A key's bias changes nothing, and its gradient is rounding alone: 1.1e-5 of the floor.
    check_head(
        siglip_vision_model, config, "model", tmp_path, inputs, prepare=prepare,
        gradient_tolerance=2e-5,
    )  # fmt: skip


@pytest.mark.slow
def test_classifier_equals_pytorch(tmp_path):
    config = dataclasses.replace(PAIR, id2label=("a", "b", "c"))
    check_head(siglip, config, "image_classification", tmp_path, images(VISION))


def test_configs_of_released_models():
    """Which say what is not the default alone."""
    large = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
             "num_hidden_layers": 27}  # fmt: skip
    data = {
        "architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", **large},
        "vision_config": {"image_size": 384, "model_type": "siglip_vision_model", "patch_size": 14,
                          **large},
    }  # fmt: skip
    config = parse_config(siglip.Config, data, siglip.FIXED)
    assert config == siglip.VARIANTS["so400m-384"]
    check_defaults(siglip_text_model)
    check_defaults(siglip_vision_model)


def test_published_sizes():
    check_sizes(siglip_text_model, dict.fromkeys(siglip_text_model.VARIANTS, "SiglipTextModel"))
    check_sizes(
        siglip_vision_model, dict.fromkeys(siglip_vision_model.VARIANTS, "SiglipVisionModel")
    )
    check_sizes(siglip, dict.fromkeys(siglip.VARIANTS, "SiglipModel"))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"text_config=.* must be a .*siglip_text_model.Config"):
        siglip.Config(VISION, VISION)
    text = dataclasses.replace(TEXT, projection_size=18)
    with pytest.raises(ValueError, match="projection_size=18 must be vision_config"):
        hub.abstract_variables(siglip.Model(siglip.Config(text, VISION)))
    bare = dataclasses.replace(VISION, vision_use_head=False)
    with pytest.raises(ValueError, match="picture encoder has no pooled output"):
        hub.abstract_variables(siglip.Model(siglip.Config(TEXT, bare)))


@pytest.mark.slow
def test_first_scale_and_bias():
    model, variables = fmjax.create("siglip", PAIR, rng=jax.random.key(0))
    out = model.apply(variables, pixel_values=np.zeros((1, 15, 15, 2)))
    # Section 3.2: t' = log 10 and b = -10.
    np.testing.assert_allclose([out.logit_scale, out.logit_bias], [10.0, -10.0], rtol=1e-6)
