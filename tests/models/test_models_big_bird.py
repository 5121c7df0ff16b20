"""BigBird against PyTorch's, from the same configs and weights."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from encoder_checks import (
    check_cached,
    check_classes,
    check_defaults,
    check_flax_names,
    encoder_states,
)
from parity import (
    assert_near,
    check_head,
    check_numbers,
    check_round_trip,
    check_sizes,
    text_inputs,
    torch_outputs,
    torch_twin,
)
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

import fmjax
from fmjax.models import big_bird

FULL = big_bird.Config(
    vocab_size=51, hidden_size=30, num_hidden_layers=2, num_attention_heads=3, intermediate_size=44,
    max_position_embeddings=24, id2label=("a", "b", "c"), sep_token_id=7, hidden_act="relu",
    attention_type="original_full",
)  # fmt: skip
SPARSE = dataclasses.replace(
    FULL, attention_type="block_sparse", block_size=2, num_random_blocks=2, use_bias=False,
    rescale_embeddings=True, num_attention_heads=2, hidden_act="gelu_new",
)  # fmt: skip
CROSS = dataclasses.replace(
    FULL, is_decoder=True, add_cross_attention=True, use_bias=False, tie_word_embeddings=False
)
CASES = [
    *((head, FULL, 9) for head in big_bird.HEADS),
    ("pretraining", SPARSE, 22),
    ("question_answering", SPARSE, 9),  # short: full attention
]


@pytest.mark.parametrize(("head", "config", "length"), CASES)
def test_equals_pytorch(head, config, length, tmp_path):
    inputs = text_inputs(config, head, length=length)
    if head == "question_answering":
        config = dataclasses.replace(config, id2label=("a", "b"))
        inputs["input_ids"][:, 4] = 7  # the end of the question
    else:
        types = np.random.default_rng(1).integers(0, 2, inputs["input_ids"].shape)
        inputs["token_type_ids"] = types
    # PyTorch loses the probabilities of a sparse model that attends to everything.
    attentions = config.attention_type == "original_full" or config.sparse(length)
    check_head(big_bird, config, head, tmp_path, inputs, attentions=attentions)


def test_cross_attention_equals_pytorch(tmp_path):
    """Once its layers are mended: PyTorch's self-attention is given the encoder's states too, and
    attends to them instead; its cross-attention reads the mask from another argument than it gets;
    and its cache keeps the keys of both in one place.
    """
    twin = torch_twin(big_bird, CROSS, "causal_lm")
    twin.config.use_cache = False
    none = {"encoder_hidden_states": None, "encoder_attention_mask": None}
    for layer in twin.bert.encoder.layer:
        layer.attention.forward = functools.partial(
            lambda forward, hidden, **inputs: forward(hidden, **inputs | none),
            layer.attention.forward,
        )
        layer.crossattention.forward = functools.partial(
            lambda forward, hidden, attention_mask, **inputs: forward(
                hidden, encoder_attention_mask=attention_mask, **inputs
            ),
            layer.crossattention.forward,
        )
    twin.save_pretrained(tmp_path / "torch")
    model, variables = fmjax.load(tmp_path / "torch")
    assert model.config == CROSS
    inputs = text_inputs(CROSS, "causal_lm") | encoder_states(CROSS)
    unused = ("cls.predictions.bias",)
    check_numbers(big_bird, model, variables, twin, inputs, tmp_path, unused=unused)
    check_round_trip(model, variables, type(twin), tmp_path, unused=unused)


def test_sparse_attention_of_any_length_and_when_training(tmp_path):
    """What is no multiple of the block size; and the random blocks that PyTorch trains with."""
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = dataclasses.replace(SPARSE, max_position_embeddings=32, **quiet)
    twin = torch_twin(big_bird, config, "masked_lm")
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    inputs = text_inputs(config, "masked_lm", length=29)
    run = jax.jit(
        lambda train: model.apply(variables, **inputs, train=train).logits, static_argnums=0
    )
    twin = twin.double()
    real = inputs["attention_mask"] == 1
    reference = torch_outputs(twin, inputs, attentions=False)["logits"].detach().numpy()
    assert_near(run(False)[real], reference[real], "evaluated")
    twin.train()
    trained = torch_outputs(twin, inputs, attentions=False)["logits"].detach().numpy()
    assert_near(run(True)[real], trained[real], "trained")
    assert np.abs(trained - reference)[real].max() > 1e-2


@pytest.mark.parametrize(
    ("length", "size", "positions"),
    [(1024, 64, 4096), (3072, 64, 4096), (4096, 64, 4096), (1024, 16, 1024), (832, 64, 4096)],
)
def test_random_blocks_are_pytorchs(length, size, positions):
    config = dataclasses.replace(
        SPARSE, block_size=size, num_random_blocks=3, max_position_embeddings=positions
    )
    theirs = BigBirdBlockSparseAttention(config, seed=5).train()
    np.random.seed(5)  # noqa: NPY002 it is what PyTorch's code draws from
    if length in (1024, 3072, 4096):
        rows = length // size - 2
        expected = [
            theirs._bigbird_block_rand_mask(positions, positions, size, size, 3, last_idx=1024)
            for _ in range(2)
        ]
        expected = [head[:rows] for head in expected]
    else:
        plan = theirs._get_rand_attn_plan(length, size, 3)
        expected = theirs._bigbird_block_rand_mask_with_head(length, length, size, size, 2, *plan)
    ours = big_bird.random_blocks(config, 5, length, train=True)
    np.testing.assert_array_equal(ours, np.stack(expected))
    assert not big_bird.random_blocks(config, 5, length, train=False).any()


def test_given_question_lengths(tmp_path):
    config = dataclasses.replace(FULL, id2label=("a", "b"))
    twin = torch_twin(big_bird, config, "question_answering")
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    inputs = text_inputs(config, "question_answering")
    inputs["question_lengths"] = np.array([[3], [5]])
    check_numbers(big_bird, model, variables, twin, inputs, tmp_path)
    with pytest.raises(ValueError, match="question_lengths is for question answering"):
        model.clone(head="model").apply(variables, **inputs)


@pytest.mark.parametrize("config", [CROSS, dataclasses.replace(SPARSE, is_decoder=True)])
def test_cached_decoding(config):
    check_cached(big_bird, config, scan=config.add_cross_attention)


def test_flax_files_load(tmp_path):
    """Those of some heads have no pooler."""
    config = dataclasses.replace(FULL, add_pooling_layer=False)
    check_flax_names(tmp_path, big_bird, config, "masked_lm")


def test_published_facts():
    check_classes(big_bird)
    check_defaults(big_bird)
    check_sizes(big_bird, dict.fromkeys(big_bird.VARIANTS, "BigBirdModel"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "big_bird config: hidden_size=768 is not a multiple"),
        ({"attention_type": "sparse"}, "attention_type='sparse'"),
        ({"block_size": 0, "num_random_blocks": -1}, "block_size=0.*num_random_blocks=-1"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        big_bird.Config(**change)


def test_bad_masks_are_refused():
    model = big_bird.Model(SPARSE)
    with pytest.raises(ValueError, match="sparse attention takes an attention_mask"):
        model.init(jax.random.key(0), np.ones((1, 20), int), np.ones((1, 20, 20)))
