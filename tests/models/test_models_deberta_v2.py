"""DeBERTa-v2 and -v3 against PyTorch's, from the same configs and weights."""

import dataclasses

import numpy as np
import pytest
import torch
from encoder_checks import check_classes, check_defaults
from parity import assert_near, check_head, check_sizes, text_inputs, torch_twin
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

import fmjax
from fmjax.config import parse_config
from fmjax.models import deberta_v2

EXTRA = (
    *("cls_dropout", "position_buckets", "share_att_key", "norm_rel_ebd"),
    *("conv_kernel_size", "conv_groups", "conv_act"),
)
THIRD = deberta_v2.Config(
    vocab_size=51, hidden_size=30, num_hidden_layers=2, num_attention_heads=3, intermediate_size=44,
    max_position_embeddings=14, hidden_act="relu", id2label=("a", "b", "c"),
    relative_attention=True, pos_att_type=("p2c", "c2p"), position_biased_input=False,
    position_buckets=6, share_att_key=True, norm_rel_ebd="layer_norm",
)  # fmt: skip
SECOND = dataclasses.replace(  # with its convolution
    THIRD, conv_kernel_size=3, conv_groups=2, conv_act="gelu", legacy=False, type_vocab_size=2,
    position_biased_input=True,
)  # fmt: skip
OWN = dataclasses.replace(
    THIRD, share_att_key=False, position_buckets=-1, max_relative_positions=5,
    norm_rel_ebd="none", conv_kernel_size=5, tie_word_embeddings=False,
)  # fmt: skip
CASES = [
    *((head, THIRD) for head in deberta_v2.HEADS),
    ("masked_lm", SECOND),
    ("masked_lm", OWN),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    if head == "question_answering":
        config = dataclasses.replace(config, id2label=("a", "b"))
    inputs = text_inputs(config, head)
    if config.type_vocab_size:
        inputs["token_type_ids"] = np.random.default_rng(1).integers(0, 2, (2, 9))
    unused = () if config.tie_word_embeddings else ("cls.predictions.bias",)
    check_head(deberta_v2, config, head, tmp_path, inputs, unused=unused)


@pytest.mark.parametrize(("buckets", "positions"), [(256, 512), (6, 14), (32, 512), (100, 64)])
def test_buckets_are_pytorchs(buckets, positions):
    distance = torch.arange(-599, 600)
    theirs = make_log_bucket_position(distance, buckets, positions).long().numpy()
    np.testing.assert_array_equal(deberta_v2.log_buckets(600, buckets, positions), theirs)


def test_texts_may_be_longer_than_the_buckets_reach(tmp_path):
    """PyTorch takes more tokens than max_position_embeddings=14; far distances share a bucket."""
    twin = torch_twin(deberta_v2, THIRD, "model")
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    ids = np.random.default_rng(0).integers(3, 51, (2, 40))
    ours = model.apply(variables, input_ids=ids).last_hidden_state
    assert_near(ours, twin(torch.tensor(ids)).last_hidden_state.detach(), "last_hidden_state")


def test_configs_of_the_hub():
    """microsoft/deberta-v3-base, and the same with keys that say nothing new."""
    data = {
        "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
        "layer_norm_eps": 1e-7, "max_position_embeddings": 512, "max_relative_positions": -1,
        "model_type": "deberta-v2", "norm_rel_ebd": "layer_norm", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pos_att_type": "p2c|c2p", "position_biased_input": False,
        "position_buckets": 256, "relative_attention": True, "share_att_key": True,
        "type_vocab_size": 0, "vocab_size": 128100,
    }  # fmt: skip
    more = {"pooler_hidden_size": 768, "embedding_size": 768, "attention_head_size": 64}
    for keys in (data, data | more):
        config = parse_config(deberta_v2.Config, keys, deberta_v2.FIXED)
        assert config == deberta_v2.VARIANTS["v3-base"]


def test_published_facts():
    check_classes(deberta_v2)
    check_defaults(deberta_v2, extra=EXTRA)
    check_sizes(deberta_v2, dict.fromkeys(deberta_v2.VARIANTS, "DebertaV2Model"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "deberta_v2 config: .*hidden_size=1536 is not a multiple"),
        ({"attention_head_size": 32}, "attention_head_size=32 must be hidden_size"),
        ({"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd='batch_norm'"),
        ({"norm_rel_ebd": "layer_norm"}, "needs relative_attention=True"),
        ({"position_buckets": 1024}, "position_buckets=1024"),
        ({"position_buckets": 1022}, "position_buckets=1022 .* largest distance, 511"),
        ({"conv_kernel_size": 4, "conv_groups": 7}, "conv_kernel_size=4.*conv_groups=7"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        deberta_v2.Config(**change)
