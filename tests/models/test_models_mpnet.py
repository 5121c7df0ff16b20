"""MPNet against PyTorch's, from the same configs and weights."""

import dataclasses

import numpy as np
import pytest
from encoder_checks import check_classes, check_defaults
from parity import assert_near, check_head, check_sizes, text_inputs, torch_outputs, torch_twin

import fmjax
from fmjax.models import mpnet

CONFIG = mpnet.Config(
    vocab_size=51, hidden_size=30, num_hidden_layers=2, num_attention_heads=3, intermediate_size=44,
    max_position_embeddings=14, hidden_act="relu", id2label=("a", "b", "c"),
)  # fmt: skip
UNTIED = dataclasses.replace(
    CONFIG, tie_word_embeddings=False, relative_attention_num_buckets=40, pad_token_id=3
)
CASES = [*((head, CONFIG) for head in mpnet.HEADS), ("masked_lm", UNTIED)]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    if head == "question_answering":
        config = dataclasses.replace(config, id2label=("a", "b"))
    inputs = text_inputs(config, head, pad_id=1)
    inputs["input_ids"][0, ..., 2] = 1  # padding inside counts too
    unused = () if config.tie_word_embeddings else ("lm_head.bias",)
    check_head(mpnet, config, head, tmp_path, inputs, unused=unused)


def test_far_positions_share_buckets(tmp_path):
    """Distances past 128 too, where buckets are logarithmic and then one."""
    config = dataclasses.replace(CONFIG, max_position_embeddings=202, num_hidden_layers=1)
    twin = torch_twin(mpnet, config, "model")
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    ids = np.random.default_rng(0).integers(2, 51, (1, 200))
    reference = torch_outputs(twin.double(), {"input_ids": ids})
    out = model.apply(variables, input_ids=ids)
    assert_near(out.last_hidden_state, reference["last_hidden_state"].detach(), "states")


def test_published_facts():
    check_classes(mpnet)
    check_defaults(mpnet)
    check_sizes(mpnet, dict.fromkeys(mpnet.VARIANTS, "MPNetModel"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "mpnet config: hidden_size=768 is not a multiple"),
        ({"relative_attention_num_buckets": 16}, "num_buckets=16 must be at least 32"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        mpnet.Config(**change)
