"""DeBERTa against PyTorch's, from the same configs and weights."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from encoder_checks import check_classes, check_defaults
from parity import assert_near, check_head, check_sizes, text_inputs, torch_twin

import fmjax
from fmjax.models import deberta

CONFIG = deberta.Config(
    vocab_size=51, hidden_size=30, num_hidden_layers=2, num_attention_heads=3, intermediate_size=44,
    max_position_embeddings=14, type_vocab_size=2, hidden_act="relu", id2label=("a", "b", "c"),
    relative_attention=True, pos_att_type="c2p|p2c", max_relative_positions=5,
)  # fmt: skip
LONG = dataclasses.replace(  # the table is longer than the text
    CONFIG, position_biased_input=False, type_vocab_size=0, max_relative_positions=-1,
    pos_att_type=("p2c",), legacy=False, pad_token_id=None, pooler_hidden_act="tanh",
)  # fmt: skip
PLAIN = dataclasses.replace(
    CONFIG, relative_attention=False, tie_word_embeddings=False, pos_att_type=None
)
CASES = [
    *((head, CONFIG) for head in deberta.HEADS),
    ("masked_lm", LONG),
    ("masked_lm", PLAIN),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    if head == "question_answering":
        config = dataclasses.replace(config, id2label=("a", "b"))
    inputs = text_inputs(config, head)
    if config.type_vocab_size:
        inputs["token_type_ids"] = np.random.default_rng(1).integers(0, 2, (2, 9))
    unused = () if config.tie_word_embeddings else ("cls.predictions.bias",)
    check_head(deberta, config, head, tmp_path, inputs, unused=unused)


@pytest.mark.parametrize("config", [CONFIG, LONG])
def test_files_tell_which_masked_lm_head_they_have(config, tmp_path):
    """config.json of the hub does not, and has a bar between kinds and tensors nobody reads."""
    twin = torch_twin(deberta, config, "masked_lm")
    tensors = dict(twin.state_dict())
    tensors |= {
        "deberta.embeddings.position_ids": torch.arange(14)[None],
        "mask_predictions.dense.weight": torch.zeros(30, 30),
    }
    if not config.position_biased_input:
        tensors["deberta.embeddings.position_embeddings.weight"] = torch.zeros(14, 30)
    twin.config.pos_att_type = "|".join(config.kinds)
    twin.config.legacy = True
    twin.config.save_pretrained(tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model, variables = fmjax.load(tmp_path, head="masked_lm")
    assert model.config == config
    ids = np.arange(8).reshape(2, 4)
    ours = model.apply(variables, input_ids=ids).logits
    assert_near(ours, twin(torch.tensor(ids)).logits.detach(), "logits")
    fmjax.load(tmp_path, head="sequence_classification", new=("head/",))


def test_only_absolute_positions_end(tmp_path):
    """Without them PyTorch takes more tokens than max_position_embeddings=14."""
    twin = torch_twin(deberta, LONG, "model")
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    ids = np.random.default_rng(0).integers(3, 51, (2, 20))
    ours = model.apply(variables, input_ids=ids).last_hidden_state
    assert_near(ours, twin(torch.tensor(ids)).last_hidden_state.detach(), "last_hidden_state")
    with pytest.raises(ValueError, match=r"20 positions are more than .*=14"):
        deberta.Model(CONFIG).init(jax.random.key(0), ids)


def test_published_facts():
    check_classes(deberta)
    check_defaults(deberta, extra=("cls_dropout",))
    check_sizes(deberta, dict.fromkeys(deberta.VARIANTS, "DebertaModel"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "deberta config: hidden_size=768 is not a multiple"),
        ({"pos_att_type": "c2p|p2p"}, r"pos_att_type=\('c2p', 'p2p'\) must be of"),
        ({"pooler_hidden_size": 5}, "pooler_hidden_size=5 must be hidden_size=768"),
        ({"embedding_size": 5}, "embedding_size=5 must be hidden_size=768"),
        ({"pooler_hidden_act": "gelo"}, "pooler_hidden_act='gelo'"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        deberta.Config(**change)
