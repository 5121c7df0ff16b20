"""ALBERT against PyTorch's, from the same configs and weights."""

import dataclasses

import jax
import numpy as np
import pytest
from encoder_checks import check_classes, check_defaults, check_flax_names
from parity import assert_near, check_head, check_sizes, shuffled, text_inputs

import fmjax
from fmjax import hub
from fmjax.models import albert
from fmjax.tree import flatten, stack_layers

CONFIG = albert.Config(
    vocab_size=51, embedding_size=18, hidden_size=30, num_hidden_layers=3, num_attention_heads=3,
    intermediate_size=44, max_position_embeddings=14, id2label=("a", "b", "c"),
)  # fmt: skip
GROUPS = dataclasses.replace(
    CONFIG, num_hidden_groups=2, inner_group_num=2, hidden_act="relu", tie_word_embeddings=False,
    embedding_size=30,
)  # fmt: skip
CASES = [*((head, CONFIG) for head in albert.HEADS), ("pretraining", GROUPS)]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    if head in ("question_answering", "pretraining"):
        config = dataclasses.replace(config, id2label=("a", "b"))
    inputs = text_inputs(config, head)
    inputs["token_type_ids"] = np.random.default_rng(1).integers(0, 2, inputs["input_ids"].shape)
    unused = () if config.tie_word_embeddings else ("predictions.bias",)
    # Through six blocks of which two share weights, float32 differs by 1.02e-5.
    check_head(albert, config, head, tmp_path, inputs, unused=unused, gradient_tolerance=2e-5)


def test_order_of_shared_weights():
    assert CONFIG.order == (0, 0, 0)
    assert GROUPS.order == (0, 1, 0, 1, 2, 3)
    five = dataclasses.replace(CONFIG, num_hidden_layers=5, num_hidden_groups=3)
    assert five.order == (0, 0, 1, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block", "dots", "offload"])
def test_scanned_with_dropout(remat):
    """Every block drops by its own bits, and a scan returns each block's states."""
    config = dataclasses.replace(GROUPS, hidden_dropout_prob=0.5)
    model, variables = fmjax.create("albert", config, rng=jax.random.key(0))
    variables = shuffled(variables)
    ids = np.arange(10).reshape(2, 5)
    scanned = model.clone(scan=True, remat=remat)
    stacked = stack_layers(variables)
    assert flatten(stacked)["params/layers/attn/query/kernel"].shape == (4, 30, 30)
    out = model.apply(variables, input_ids=ids, output_hidden_states=True)
    scan_out = scanned.apply(stacked, input_ids=ids, output_hidden_states=True)
    for i, (ours, other) in enumerate(zip(scan_out.hidden_states, out.hidden_states, strict=True)):
        assert_near(ours, other, f"state {i}")

    def states(key):
        rngs = {"dropout": jax.random.key(key)}
        return scanned.apply(
            stacked, input_ids=ids, train=True, rngs=rngs, output_hidden_states=True
        ).hidden_states

    first, again, other = states(0), states(0), states(1)
    np.testing.assert_array_equal(first[-1], again[-1])
    assert not np.allclose(first[-1], other[-1], atol=1e-2)


def test_flax_files_load(tmp_path):
    config = dataclasses.replace(CONFIG, id2label=("a", "b"))
    check_flax_names(tmp_path, albert, config, "pretraining")


def test_published_facts():
    """Lan et al. 2020, table 1: 12, 18, 60 and 235 million."""
    check_classes(albert)
    check_defaults(albert)
    check_sizes(albert, dict.fromkeys(albert.VARIANTS, "AlbertModel"))
    for name, millions in (("base", 12), ("large", 18), ("xlarge", 60), ("xxlarge", 235)):
        abstract = hub.abstract_variables(albert.Model(albert.VARIANTS[name]))
        ours = sum(leaf.size for leaf in jax.tree.leaves(abstract)) / 1e6
        assert abs(ours / millions - 1) < 0.06


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "albert config: hidden_size=4096 is not a multiple"),
        ({"num_hidden_groups": 13}, "num_hidden_groups=13 must be 1 to num_hidden_layers=12"),
        ({"inner_group_num": 0}, "inner_group_num=0"),
        ({"hidden_act": "gelo"}, "hidden_act='gelo'"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        albert.Config(**change)
