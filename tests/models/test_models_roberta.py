"""RoBERTa, XLM-RoBERTa and pre-norm RoBERTa against PyTorch, from the same configs and weights."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from encoder_checks import check_cached, check_classes, check_defaults, encoder_states
from parity import assert_near, check_head, check_sizes, shuffled, text_inputs, torch_twin

import fmjax
from fmjax import hub
from fmjax.models import roberta, roberta_prelayernorm, xlm_roberta

FAMILIES = [roberta, xlm_roberta, roberta_prelayernorm]
SIZES = {
    "vocab_size": 51, "hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 44, "max_position_embeddings": 14, "type_vocab_size": 2,
    "id2label": ("a", "b", "c"), "hidden_act": "relu",
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False, "pad_token_id": 2, "layer_norm_eps": 1e-5}
CROSS = {"is_decoder": True, "add_cross_attention": True}
CASES = [
    (family, head, settings)
    for family in FAMILIES
    for head in family.HEADS
    for settings in ({}, UNTIED | CROSS if head == "causal_lm" else UNTIED)
    if not settings or (head in ("causal_lm", "masked_lm") and family is not xlm_roberta)
]


@pytest.mark.parametrize(
    ("family", "head", "settings"),
    CASES,
    ids=lambda value: value.MODEL_TYPE if value in FAMILIES else None,
)
def test_equals_pytorch(family, head, settings, tmp_path):
    config = family.Config(**SIZES | settings)
    if head == "question_answering":
        config = dataclasses.replace(config, id2label=("a", "b"))
    inputs = text_inputs(config, head, pad_id=config.pad_token_id)
    inputs["input_ids"][0, ..., 2] = config.pad_token_id  # padding inside counts too
    inputs["token_type_ids"] = np.random.default_rng(1).integers(0, 2, inputs["input_ids"].shape)
    if config.add_cross_attention:
        inputs |= encoder_states(config)
    unused = () if config.tie_word_embeddings else ("lm_head.bias",)
    check_head(family, config, head, tmp_path, inputs, unused=unused)


@pytest.mark.parametrize("settings", [{"is_decoder": True}, CROSS])
@pytest.mark.parametrize("family", [roberta, roberta_prelayernorm])
def test_cached_decoding(family, settings):
    check_cached(family, family.Config(**SIZES | settings), scan="add_cross_attention" in settings)


def test_a_causal_model_generates():
    """As taking the likeliest token of full passes does, whatever the prompt's padding."""
    config = roberta.Config(**SIZES | {"is_decoder": True, "max_position_embeddings": 20})
    model, variables = fmjax.create("roberta", config, head="causal_lm", rng=jax.random.key(0))
    variables = shuffled(variables)
    prompt, pad = np.array([[5, 6, 7, 8, 9]]), np.array([[1, 1, 5, 6, 7]])
    ids, mask = np.concatenate([prompt, pad]), np.array([[1] * 5, [0, 0, 1, 1, 1]])
    made = fmjax.generate(
        model, variables, ids, attention_mask=mask, max_new_tokens=4, eos_token_id=None
    )
    logits = jax.jit(lambda ids: model.apply(variables, input_ids=ids).logits)
    for row, start in ((0, 0), (1, 2)):
        tokens = ids[row, start:]
        for _ in range(4):
            padded = np.pad(tokens, (0, 9 - tokens.size), constant_values=1)[None]
            tokens = np.append(tokens, np.argmax(logits(padded)[0, tokens.size - 1]))
        np.testing.assert_array_equal(made.sequences[row, start:], tokens)


def test_positions_as_pytorch(tmp_path):
    """From embeddings they count from pad_token_id + 1; given ones are rows of the table."""
    config = roberta.Config(**SIZES)
    twin = torch_twin(roberta, config, "model")
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    embeds = np.random.default_rng(0).normal(size=(2, 5, 30)).astype(np.float32)
    ours = model.apply(variables, inputs_embeds=embeds).last_hidden_state
    theirs = twin(inputs_embeds=torch.tensor(embeds)).last_hidden_state
    assert_near(ours, theirs.detach(), "from embeddings")
    ids, positions = np.full((1, 4), 7), np.array([[9, 3, 3, 5]])
    ours = model.apply(variables, input_ids=ids, position_ids=positions).last_hidden_state
    theirs = twin(input_ids=torch.tensor(ids), position_ids=torch.tensor(positions))
    assert_near(ours, theirs.last_hidden_state.detach(), "given")


def test_old_files_load(tmp_path):
    """What .bin files of the hub held: tied copies, the position buffer, a pooler."""
    config = roberta.Config(**SIZES)
    twin = torch_twin(roberta, config, "masked_lm")
    tensors = dict(twin.state_dict())
    assert "lm_head.decoder.weight" in tensors
    tensors |= {
        "roberta.embeddings.position_ids": torch.arange(14)[None],
        "roberta.pooler.dense.weight": torch.zeros(30, 30),
        "roberta.pooler.dense.bias": torch.zeros(30),
    }
    twin.config.save_pretrained(tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model, variables = fmjax.load(tmp_path, head="masked_lm")
    ids = np.arange(8).reshape(2, 4)
    theirs = twin(torch.tensor(ids)).logits
    assert_near(model.apply(variables, input_ids=ids).logits, theirs.detach(), "logits")
    bare, _ = fmjax.load(tmp_path, head="model")
    assert bare.config.add_pooling_layer


@pytest.mark.parametrize("family", FAMILIES)
def test_published_facts(family):
    check_classes(family)
    check_defaults(family)
    check_sizes(family, dict.fromkeys(family.VARIANTS, family.HEADS["model"]))


def test_published_sizes_of_the_papers():
    """Liu et al. 2019 section 2.4 and 3: 125 M, 355 M; Conneau et al. 2020 table 5: 270 M, 550 M.

    Their counts have no pooler, and XLM-RoBERTa's are rounded to tens.
    """
    millions = {
        (roberta, "base"): 125, (roberta, "large"): 355,
        (xlm_roberta, "base"): 270, (xlm_roberta, "large"): 550,
    }  # fmt: skip
    for (family, name), expected in millions.items():
        abstract = hub.abstract_variables(family.Model(family.VARIANTS[name]))
        ours = sum(leaf.size for leaf in jax.tree.leaves(abstract)) / 1e6
        assert abs(ours / expected - 1) < 0.04


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "roberta config: hidden_size=768 is not a multiple"),
        ({"pad_token_id": None}, "pad_token_id=null"),
        ({"hidden_act": "gelo"}, "hidden_act='gelo' is not known"),
        ({"pad_token_id": 60000, "classifier_dropout": 1.0}, r"pad_token_id=60000.*dropout=1.0"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        roberta.Config(**change)


def test_bad_inputs_are_refused():
    model = roberta.Model(roberta.Config(**SIZES))
    variables = shuffled(model.init(jax.random.key(0), np.zeros((1, 1), int)))
    with pytest.raises(
        ValueError,
        match=r"13 positions are more than the model's 12 \(max_position_embeddings=14\)",
    ):
        model.apply(variables, input_ids=np.zeros((1, 13), int))
    with pytest.raises(ValueError, match="no head 'tail'"):
        roberta.Model(model.config, head="tail").init(jax.random.key(0), np.zeros((1, 1), int))
