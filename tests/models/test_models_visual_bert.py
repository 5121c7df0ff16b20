"""VisualBERT against transformers' PyTorch classes, from the same configs and weights."""

import dataclasses

import jax
import numpy as np
import pytest
from encoder_checks import check_classes, check_defaults
from parity import check_head, check_old_file, check_sizes

import fmjax
from fmjax.config import parse_config
from fmjax.models import visual_bert

CONFIG = visual_bert.Config(
    vocab_size=51, hidden_size=24, visual_embedding_dim=7, num_hidden_layers=2,
    num_attention_heads=3, intermediate_size=32, max_position_embeddings=20,
    id2label=("yes", "no", "two"),
)  # fmt: skip
# What PyTorch's classes have and these heads do not read.
POOLER = ("visual_bert.pooler.dense.weight", "visual_bert.pooler.dense.bias")
PREDICTIONS = (
    "cls.predictions.bias", "cls.predictions.transform.dense.weight",
    "cls.predictions.transform.dense.bias", "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.bias", "cls.predictions.decoder.bias",
    "cls.predictions.decoder.weight", "cls.seq_relationship.weight", "cls.seq_relationship.bias",
    "attention.value.weight", "attention.value.bias",
)  # fmt: skip
UNUSED = {
    "question_answering": POOLER,
    "region_to_phrase_alignment": (*POOLER, *PREDICTIONS),
}


def text_and_regions(config, head, length=6, regions=4):
    """Random words and regions; the second row's last ones are padding."""
    rng = np.random.default_rng(0)
    lead = (2, 3) if head == "multiple_choice" else (2,)
    words, boxes = np.ones((*lead, length), np.int64), np.ones((*lead, regions), np.int64)
    words[1, ..., length - 2 :] = 0
    if head != "region_to_phrase_alignment":  # which tells masked regions by the lowest number
        boxes[1, ..., regions - 1 :] = 0
    inputs = {
        "input_ids": rng.integers(3, config.vocab_size, words.shape),
        "attention_mask": words,
        "token_type_ids": rng.integers(0, 2, words.shape),
        "visual_embeds": rng.normal(size=(*boxes.shape, config.visual_embedding_dim)),
        "visual_attention_mask": boxes,
        "visual_token_type_ids": rng.integers(0, 2, boxes.shape),
    }
    if head == "region_to_phrase_alignment":
        inputs["region_to_phrase_position"] = np.array([[1, 3, -1], [2, 0, 1]])
    if head != "multiple_choice":  # which PyTorch's class does not flatten
        alignment = rng.integers(-1, length, (*boxes.shape, 3))
        alignment[0, 0] = -1
        inputs["image_text_alignment"] = alignment
    return inputs


@pytest.mark.parametrize(
    "head",
    [
        head if head == "pretraining" else pytest.param(head, marks=pytest.mark.slow)
        for head in visual_bert.HEADS
    ],
)
def test_equals_pytorch(head, tmp_path):
    config = CONFIG
    if head == "region_to_phrase_alignment":  # no classes
        config = dataclasses.replace(CONFIG, id2label=("LABEL_0", "LABEL_1"))
    check_head(
        visual_bert, config, head, tmp_path, text_and_regions(config, head),
        unused=UNUSED.get(head, ()),
    )  # fmt: skip


@pytest.mark.slow
def test_text_alone_and_untied_equals_pytorch(tmp_path):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False, pad_token_id=None)
    inputs = text_and_regions(config, "pretraining")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    check_head(
        visual_bert, config, "pretraining", tmp_path, inputs,
        unused=("cls.predictions.bias",),
    )  # fmt: skip


@pytest.mark.slow
def test_masked_regions_change_nothing():
    """Whatever a masked region's features are, and absent masks are masks of ones."""
    model, variables = fmjax.create("visual_bert", CONFIG, rng=jax.random.key(0))
    inputs = text_and_regions(CONFIG, "model")
    run = jax.jit(lambda inputs: model.apply(variables, **inputs).last_hidden_state)
    out = run(inputs)
    moved = inputs["visual_embeds"] + 100.0 * (inputs["visual_attention_mask"] == 0)[..., None]
    keep = np.concatenate([inputs["attention_mask"], inputs["visual_attention_mask"]], axis=1) == 1
    np.testing.assert_allclose(run(inputs | {"visual_embeds": moved})[keep], out[keep], atol=1e-5)
    plain = {name: inputs[name] for name in ("input_ids", "visual_embeds")}
    ones = {
        "attention_mask": np.ones((2, 6), np.int64),
        "visual_attention_mask": np.ones((2, 4), np.int64),
        "visual_token_type_ids": np.ones((2, 4), np.int64),
        "token_type_ids": np.zeros((2, 6), np.int64),
    }
    np.testing.assert_allclose(run(plain), run(plain | ones), atol=1e-6)


def test_config_and_classes_are_transformers():
    check_defaults(visual_bert)
    check_classes(visual_bert)
    with pytest.raises(ValueError, match="bypass_transformer=True is not supported"):
        parse_config(visual_bert.Config, {"bypass_transformer": True}, visual_bert.FIXED)


def test_published_sizes():
    check_sizes(visual_bert, dict.fromkeys(("vcr", "nlvr2", "vqa"), "VisualBertModel"))


@pytest.mark.slow
def test_files_of_older_versions(tmp_path):
    check_old_file(
        visual_bert, CONFIG, "pretraining", tmp_path,
        extra=("visual_bert.embeddings.position_ids",),
    )  # fmt: skip


def test_bad_inputs_are_refused():
    model = visual_bert.Model(CONFIG)
    ids = np.ones((2, 3), np.int32)
    with pytest.raises(ValueError, match=r"\(2, 4, 5\); it must be \[2, N, 7\]") as error:
        model.apply({}, ids, visual_embeds=np.ones((2, 4, 5)), visual_attention_mask=ids)
    assert "visual_attention_mask has shape (2, 3); it must begin (2, 4)" in str(error.value)
    with pytest.raises(ValueError, match="visual_token_type_ids needs visual_embeds") as error:
        model.apply({}, ids, visual_token_type_ids=ids, region_to_phrase_position=ids)
    assert "does not take region_to_phrase_position" in str(error.value)
    with pytest.raises(ValueError, match="type_vocab_size=1 must be at least 2"):
        visual_bert.Config(type_vocab_size=1)
