"""Pairs of encoders against transformers' VisionTextDualEncoderModel."""

import dataclasses

import jax
import numpy as np
import pytest
from parity import check_head, check_old_file, text_inputs
from pictures import SMALL, images, without_labels
from towers import TEXT, VISION, texts

import fmjax
from fmjax import hub
from fmjax.config import config_to_json, parse_config
from fmjax.models import bert, clip, efficientnet_lite, gpt2, roberta, vision_text_dual_encoder
from fmjax.models.vision_text_dual_encoder import Config
from fmjax.tree import flatten

BERT = bert.Config(
    vocab_size=51, hidden_size=30, num_hidden_layers=1, num_attention_heads=3, intermediate_size=44,
    max_position_embeddings=20,
)  # fmt: skip
ROBERTA = roberta.Config(
    vocab_size=51, hidden_size=30, num_hidden_layers=1, num_attention_heads=3, intermediate_size=44,
    max_position_embeddings=20,
)  # fmt: skip
VIT = without_labels(SMALL, "model")
LITE = efficientnet_lite.VARIANTS["tiny"]


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        (BERT, VIT),
        pytest.param(ROBERTA, VISION, marks=pytest.mark.slow),
        pytest.param(TEXT, VIT, marks=pytest.mark.slow),
    ],
    ids=["bert-vit", "roberta-clip", "clip-vit"],
)
def test_pairs_equal_pytorch(text, vision, tmp_path):
    config = Config(text, vision, projection_dim=11, logit_scale_init_value=1.5)
    inputs = texts(text) if text is TEXT else text_inputs(BERT, "model")
    if text is ROBERTA:  # its positions count the tokens that are no padding
        inputs["input_ids"] = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], 1)
    check_head(vision_text_dual_encoder, config, "model", tmp_path, inputs | images(vision))


@pytest.mark.slow
def test_files_of_version_4(tmp_path):
    """CLIP's towers had their own prefix inside the pair's."""
    config = Config(TEXT, VISION, projection_dim=11)

    def rename(name):
        first = name.partition(".")[0]
        return f"{first}.{name}" if first in ("text_model", "vision_model") else name

    check_old_file(vision_text_dual_encoder, config, "model", tmp_path, rename=rename)


@pytest.mark.slow
def test_a_pair_that_only_we_have(tmp_path):
    """A convolutional net and the mean of a sentence's tokens, saved and read again."""
    config = Config(
        dataclasses.replace(BERT, add_pooling_layer=False), LITE, projection_dim=11,
        text_pooling="mean",
    )  # fmt: skip
    model, variables = fmjax.create("vision-text-dual-encoder", config, rng=jax.random.key(0))
    assert "batch_stats/vision/top/norm/mean" in flatten(variables)
    fmjax.save(tmp_path, model, variables)
    again, read = fmjax.load(tmp_path)
    assert again == model
    inputs = text_inputs(BERT, "model")
    filled = inputs | {"input_ids": np.where(inputs["attention_mask"] == 1, inputs["input_ids"], 7)}
    one, two = (again.apply(read, **given).text_embeds for given in (inputs, filled))
    np.testing.assert_allclose(one, two, atol=1e-6)  # padding does not count
    np.testing.assert_allclose(np.linalg.norm(one, axis=-1), 1.0, rtol=1e-5)


def test_config_goes_there_and_back():
    for config in vision_text_dual_encoder.VARIANTS.values():
        data = config_to_json(config, {"model_type": "vision-text-dual-encoder"})
        assert parse_config(Config, data, vision_text_dual_encoder.FIXED) == config


def test_bad_pairs_are_refused():
    with pytest.raises(ValueError, match="text_config is of vit, which reads") as error:
        Config(VIT, clip.Config(), projection_dim=0, text_pooling="last")
    for words in ("vision_config is of clip", "text_pooling='last'", "projection_dim=0 must be"):
        assert words in str(error.value)
    text = gpt2.Config(vocab_size=51, n_positions=20, n_embd=12, n_layer=1, n_head=3)
    with pytest.raises(ValueError, match="text encoder has no pooled output"):
        hub.abstract_variables(vision_text_dual_encoder.Model(Config(text, VIT)))
