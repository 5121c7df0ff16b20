"""CLIP and its two towers against transformers: heads, end tokens, old files, published sizes."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from encoder_checks import check_defaults
from parity import check_fixture, check_head, check_sizes
from pictures import images
from towers import TEXT, VISION, texts

import fmjax
from fmjax.config import config_to_json, parse_config
from fmjax.models import clip, clip_text_model, clip_vision_model
from fmjax.tree import count_parameters

FIXTURES = Path(__file__).parents[1] / "fixtures"
PAIR = clip.Config(TEXT, VISION, projection_dim=10, logit_scale_init_value=1.5)
OLD = dataclasses.replace(TEXT, eos_token_id=2, hidden_act="gelu")


def test_pair_equals_pytorch(tmp_path):
    inputs = texts(TEXT) | images(VISION)
    check_head(clip, PAIR, "model", tmp_path, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("head", clip_text_model.HEADS)
@pytest.mark.parametrize("config", [TEXT, OLD], ids=["first", "largest"])
def test_text_equals_pytorch(head, config, tmp_path):
    """Read at the first end token, or, of old configs, at the largest id."""
    check_head(clip_text_model, config, head, tmp_path, texts(config))


@pytest.mark.slow
@pytest.mark.parametrize("head", clip_vision_model.HEADS)
def test_vision_equals_pytorch(head, tmp_path):
    check_head(clip_vision_model, VISION, head, tmp_path, images(VISION))


@pytest.mark.slow
def test_classifier_equals_pytorch(tmp_path):
    config = dataclasses.replace(PAIR, id2label=("a", "b", "c"))
    check_head(clip, config, "image_classification", tmp_path, images(VISION))


@pytest.mark.slow
def test_positions_of_other_sizes_equal_pytorch(tmp_path):
    def prepare(twin):
        twin.forward = partial(twin.forward, interpolate_pos_encoding=True)

    inputs = images(VISION, rows=26, columns=31)
    check_head(clip_vision_model, VISION, "model", tmp_path, inputs, prepare=prepare)


def test_the_flax_fixture_equals_pytorch():
    check_fixture(FIXTURES / "clip-model")


@pytest.mark.slow
def test_one_side_of_a_whole_file():
    """Its heads read their side of a file of both, and PyTorch's class alone says the same."""
    folder = FIXTURES / "clip-model"
    io = np.load(folder / "io.npz")
    ids, pixels = io["in.input_ids"], np.moveaxis(io["in.pixel_values"], 1, -1)
    for head, given, field in (
        ("text_with_projection", {"input_ids": ids}, "text_embeds"),
        ("vision_with_projection", {"pixel_values": pixels}, "image_embeds"),
    ):
        model, variables = fmjax.load(folder, head=head)
        ours = getattr(model.apply(variables, **given), field)
        ours = ours / np.linalg.norm(ours, axis=-1, keepdims=True)
        np.testing.assert_allclose(ours, io[f"pt.{field}"], atol=1e-5)
    model, variables = fmjax.load(folder)
    both = model.apply(variables, input_ids=ids, pixel_values=pixels)
    alone = model.apply(variables, pixel_values=pixels)
    assert alone.logits_per_image is None
    np.testing.assert_array_equal(alone.image_embeds, both.image_embeds)
    features = model.apply(variables, pixels, method="pooled_images")
    again = model.apply(variables, input_ids=ids, image_features=features)
    np.testing.assert_array_equal(again.logits_per_text, both.logits_per_text)


def test_positions_are_the_text_towers():
    assert clip.Model(PAIR).max_positions == 16


def test_old_configs():
    """As version 4 wrote them: every key of every config, each side a second time."""
    generation = {"bos_token_id": 0, "eos_token_id": 2, "max_length": 20, "num_beams": 1}
    every = {
        "add_cross_attention": False, "is_decoder": False, "is_encoder_decoder": False,
        "pad_token_id": 1, "tie_word_embeddings": True, "pruned_heads": {}, "dropout": 0.0,
        "problem_type": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "torch_dtype": None,
        "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "cross_attention_hidden_size": None,
        "finetuning_task": None, "architectures": None, "return_dict": True, **generation,
    }  # fmt: skip
    own = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
           "projection_dim": 768}  # fmt: skip
    data = {
        "model_type": "clip", "architectures": ["CLIPModel"], "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592, "projection_dim": 768, "torch_dtype": "float32",
        "text_config": every | own, "vision_config": every | {"model_type": "clip_vision_model"},
        "text_config_dict": own | {"eos_token_id": 2}, "vision_config_dict": None,
    }  # fmt: skip
    config = parse_config(clip.Config, data, clip.FIXED)
    text = dataclasses.replace(clip_text_model.VARIANTS["l14"], eos_token_id=2)
    assert config == clip.Config(text, clip_vision_model.Config(), projection_dim=768)
    assert "text_config_dict" not in config_to_json(config, {})
    with pytest.raises(ValueError, match=r"text_config_dict=.* contradicts text_config="):
        parse_config(clip.Config, data | {"text_config_dict": {"hidden_size": 64}}, clip.FIXED)
    wrong = {"vision_config": {"model_type": "clip_text_model"}}
    with pytest.raises(ValueError, match="is of model_type 'clip_text_model'"):
        parse_config(clip.Config, wrong, clip.FIXED)


def test_config_defaults_are_transformers_defaults():
    check_defaults(clip_text_model)
    check_defaults(clip_vision_model)
    theirs = transformers.CLIPConfig().to_dict()
    assert parse_config(clip.Config, theirs, clip.FIXED) == clip.Config()


def test_published_sizes():
    check_sizes(clip_text_model, dict.fromkeys(clip_text_model.VARIANTS, "CLIPTextModel"))
    check_sizes(clip_vision_model, dict.fromkeys(clip_vision_model.VARIANTS, "CLIPVisionModel"))
    check_sizes(clip, dict.fromkeys(clip.VARIANTS, "CLIPModel"))
    # What the authors' notebook prints of ViT-B/32.
    model = clip.Model(clip.VARIANTS["b32"])
    assert count_parameters(fmjax.hub.abstract_variables(model)) == 151_277_313


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="hidden_size=10 is not a multiple") as error:
        clip_vision_model.Config(hidden_size=10, image_size=8, hidden_act="bump")
    for words in ("patch_size=32 does not fit into image_size=8", "hidden_act='bump'"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"vision_config=.* must be a .*clip_vision_model.Config"):
        clip.Config(vision_config=TEXT)

    def run(head, **inputs):
        return jax.eval_shape(clip.Model(PAIR, head=head).init, jax.random.key(0), **inputs)

    with pytest.raises(ValueError, match="it was given neither"):
        run("model")
    pixels, features = np.zeros((1, 15, 15, 2)), np.zeros((1, 12))
    with pytest.raises(ValueError, match=r"given \['pixel_values', 'image_features'\]"):
        run("model", pixel_values=pixels, image_features=features)
    with pytest.raises(ValueError, match="17 positions are more than the model's 16"):
        run("model", input_ids=np.zeros((1, 17), np.int32))
    with pytest.raises(ValueError, match="'text_with_projection' reads input_ids; it was given"):
        run("text_with_projection", pixel_values=pixels)
