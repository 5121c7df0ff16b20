"""ELECTRA against PyTorch's, from the same configs and weights."""

import dataclasses

import numpy as np
import pytest
from encoder_checks import (
    check_cached,
    check_classes,
    check_defaults,
    check_flax_names,
    encoder_states,
)
from parity import check_head, check_sizes, text_inputs

from fmjax.models import electra

CONFIG = electra.Config(
    vocab_size=51, embedding_size=18, hidden_size=30, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=44, max_position_embeddings=14, hidden_act="relu", id2label=("a", "b", "c"),
)  # fmt: skip
CROSS = dataclasses.replace(
    CONFIG, is_decoder=True, add_cross_attention=True, embedding_size=30, hidden_act="gelu",
    tie_word_embeddings=False,
)  # fmt: skip
SUMMARIES = [
    {"summary_type": "mean", "summary_use_proj": False, "summary_activation": ""},
    {"summary_type": "cls_index", "summary_activation": "tanh"},
]
CASES = [
    *((head, CONFIG) for head in electra.HEADS),
    ("causal_lm", CROSS),
    *(("multiple_choice", dataclasses.replace(CONFIG, **change)) for change in SUMMARIES),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    if head == "question_answering":
        config = dataclasses.replace(config, id2label=("a", "b"))
    inputs = text_inputs(config, head)
    inputs["token_type_ids"] = np.random.default_rng(1).integers(0, 2, inputs["input_ids"].shape)
    if config.add_cross_attention:
        inputs |= encoder_states(config)
    check_head(electra, config, head, tmp_path, inputs)


@pytest.mark.parametrize("config", [CROSS, dataclasses.replace(CONFIG, is_decoder=True)])
def test_cached_decoding(config):
    check_cached(electra, config, scan=config.add_cross_attention)


@pytest.mark.parametrize("head", ["masked_lm", "pretraining"])
def test_flax_files_load(head, tmp_path):
    check_flax_names(tmp_path, electra, CONFIG, head)


def test_published_facts():
    check_classes(electra)
    check_defaults(electra)
    check_sizes(electra, dict.fromkeys(electra.VARIANTS, "ElectraModel"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "electra config: hidden_size=256 is not a multiple"),
        ({"summary_type": "attn"}, "summary_type='attn' must be"),
        ({"summary_activation": "gelo"}, "summary_activation='gelo'"),
        ({"add_cross_attention": True}, "needs is_decoder=True"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        electra.Config(**change)
