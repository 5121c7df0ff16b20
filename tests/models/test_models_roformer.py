"""RoFormer against PyTorch's, from the same configs and weights."""

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

from fmjax.models import roformer

CONFIG = roformer.Config(
    vocab_size=51, embedding_size=18, hidden_size=30, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=44, max_position_embeddings=14, hidden_act="relu", id2label=("a", "b", "c"),
)  # fmt: skip
CROSS = dataclasses.replace(
    CONFIG, is_decoder=True, add_cross_attention=True, embedding_size=None, hidden_act="gelu",
    rotary_value=True, tie_word_embeddings=False,
)  # fmt: skip
TABLE = "encoder.embed_positions.weight"
CASES = [*((head, CONFIG) for head in roformer.HEADS), ("causal_lm", CROSS)]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    if head == "question_answering":
        config = dataclasses.replace(config, id2label=("a", "b"))
    inputs = text_inputs(config, head)
    inputs["token_type_ids"] = np.random.default_rng(1).integers(0, 2, inputs["input_ids"].shape)
    if config.add_cross_attention:
        inputs |= encoder_states(config)
    unused = () if config.tie_word_embeddings else ("cls.predictions.bias",)
    check_head(roformer, config, head, tmp_path, inputs, unused=unused)


@pytest.mark.parametrize("config", [CROSS, dataclasses.replace(CONFIG, is_decoder=True)])
def test_cached_decoding(config):
    check_cached(roformer, config, scan=config.add_cross_attention)


def test_flax_files_load(tmp_path):
    """They lack the table of sinusoids, which is computed then."""
    check_flax_names(tmp_path, roformer, CONFIG, "masked_lm", dropped=(f"roformer.{TABLE}",))


def test_published_facts():
    check_classes(roformer)
    check_defaults(roformer)
    check_sizes(roformer, dict.fromkeys(roformer.VARIANTS, "RoFormerModel"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "roformer config: .*hidden_size=768 is not a multiple"),
        ({"hidden_size": 60, "num_attention_heads": 4}, "must be even"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        roformer.Config(**change)
