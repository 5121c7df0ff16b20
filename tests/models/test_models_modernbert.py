"""ModernBERT against PyTorch's, from the same configs and weights."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
import torch
from encoder_checks import check_classes
from parity import assert_near, check_head, check_sizes, text_inputs, torch_twin
from transformers import ModernBertConfig

import fmjax
from fmjax import hub
from fmjax.config import config_to_json, parse_config
from fmjax.models import modernbert

# A window that reaches from every padding to a token: a row that sees nothing is nan in PyTorch's
# float64, whose softmax is float32.
CONFIG = modernbert.Config(
    vocab_size=51, hidden_size=24, intermediate_size=44, num_hidden_layers=3, num_attention_heads=3,
    max_position_embeddings=14, hidden_activation="silu", pad_token_id=2, local_attention=6,
    global_attn_every_n_layers=2, id2label=("a", "b", "c"), local_rope_theta=100.0,
)  # fmt: skip
OTHER = dataclasses.replace(
    CONFIG, norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True,
    decoder_bias=False, tie_word_embeddings=False, classifier_pooling="mean",
    layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    classifier_activation="relu",
)  # fmt: skip
CASES = [
    *((head, CONFIG) for head in modernbert.HEADS),
    *((head, OTHER) for head in ("masked_lm", "sequence_classification", "multiple_choice")),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    if head == "question_answering":
        config = dataclasses.replace(config, id2label=("a", "b"))
    inputs = text_inputs(config, head)
    if head == "multiple_choice":
        inputs["attention_mask"][0, 1, :2] = 0  # padding on the left
    check_head(modernbert, config, head, tmp_path, inputs)


def test_texts_may_be_longer_than_max_position_embeddings(tmp_path):
    twin = torch_twin(modernbert, CONFIG, "model")
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    ids = np.random.default_rng(0).integers(3, 51, (2, CONFIG.max_position_embeddings + 6))
    ours = model.apply(variables, input_ids=ids).last_hidden_state
    assert_near(ours, twin(torch.tensor(ids)).last_hidden_state.detach(), "last_hidden_state")


def test_without_a_mask_all_is_kept():
    model, variables = fmjax.create("modernbert", CONFIG, rng=jax.random.key(0))
    ids = np.arange(18).reshape(2, 9)
    out = model.apply(variables, input_ids=ids).last_hidden_state
    masked = model.apply(variables, input_ids=ids, attention_mask=np.ones((2, 9)))
    np.testing.assert_allclose(out, masked.last_hidden_state, atol=1e-6)


def test_configs_of_both_versions_say_the_same(tmp_path):
    """Version 5 writes layer_types and rope_parameters."""
    every: dict[str, Any] = {"global_attn_every_n_layers": 4}  # a key that its class only reads
    published: Any = ModernBertConfig(**every)
    published.rope_parameters["sliding_attention"]["rope_theta"] = 500.0
    published.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    config = parse_config(modernbert.Config, data, modernbert.FIXED)
    assert config == modernbert.Config(global_attn_every_n_layers=4, local_rope_theta=500.0)
    again = ModernBertConfig(**config_to_json(config, {}))
    assert again.layer_types == published.layer_types
    assert again.rope_parameters == published.rope_parameters
    hub_file = {  # keys of answerdotai/ModernBERT-base that are not defaults or not of version 5
        "classifier_pooling": "mean", "global_attn_every_n_layers": 3, "layer_norm_eps": 1e-05,
        "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "reference_compile": None,
        "position_embedding_type": "absolute", "cls_token_id": 50281,
    }  # fmt: skip
    config = parse_config(modernbert.Config, hub_file, modernbert.FIXED)
    assert config == modernbert.Config(classifier_pooling="mean")


def test_published_facts():
    """Warner et al. 2024: 149 and 395 million; Marone et al. 2025: 140 and 307 million."""
    check_classes(modernbert)
    theirs = ModernBertConfig().to_dict()
    assert parse_config(modernbert.Config, theirs, modernbert.FIXED) == modernbert.Config()
    check_sizes(modernbert, dict.fromkeys(modernbert.VARIANTS, "ModernBertModel"))
    published = {"base": 149, "large": 395, "mmbert-small": 140, "mmbert-base": 307}
    for name, millions in published.items():
        abstract = hub.abstract_variables(modernbert.Model(modernbert.VARIANTS[name], "masked_lm"))
        ours = sum(leaf.size for leaf in jax.tree.leaves(abstract)) / 1e6
        assert abs(ours / millions - 1) < 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "modernbert config: .*hidden_size=768 is not a multiple"),
        ({"layer_types": ("full_attention",)}, "layer_types=.* for each of the 22 layers"),
        ({"classifier_pooling": "max"}, "classifier_pooling='max'"),
        ({"hidden_size": 60, "num_attention_heads": 4, "pad_token_id": 0}, "must be even"),
        ({"local_attention": 0, "hidden_activation": "gelo"}, "local_attention=0.*gelo"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        modernbert.Config(**change)


def test_bad_masks_are_refused():
    model = modernbert.Model(CONFIG, "sequence_classification")
    with pytest.raises(ValueError, match=r"attention_mask \[B, T\]"):
        model.init(jax.random.key(0), np.ones((1, 3), int), np.ones((1, 3, 3)))
