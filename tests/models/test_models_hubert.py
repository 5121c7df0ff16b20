"""HuBERT against transformers: heads, both kinds of norms, both kinds of positions, sizes."""

import jax
import numpy as np
import pytest
from encoder_checks import check_classes
from parity import check_defaults, check_head, check_sizes
from waves import SIZES, STABLE, tied, waves

import fmjax
from fmjax import hub
from fmjax.models import hubert
from fmjax.tree import count_parameters, flatten

FIELDS = set(hubert.Config.__dataclass_fields__)
SMALL = {name: value for name, value in SIZES.items() if name in FIELDS}
BATCHED = {"conv_pos_batch_norm": True, "feat_proj_layer_norm": False}
CASES = [(head, settings) for head in hubert.HEADS for settings in ({}, BATCHED, STABLE)]


@pytest.mark.slow
@pytest.mark.parametrize(("head", "settings"), CASES, ids=lambda value: None)
def test_equals_pytorch(head, settings, tmp_path):
    settings = SMALL | settings
    if head == "sequence_classification":
        settings |= {"id2label": ("a", "b", "c"), "use_weighted_layer_sum": True}
    config = hubert.Config(**settings)
    inputs = waves(config, masked=head == "model")
    check_head(hubert, config, head, tmp_path, inputs, prepare=tied)


def test_ctc_equals_pytorch(tmp_path):
    config = hubert.Config(**SMALL | BATCHED)
    check_head(hubert, config, "ctc", tmp_path, waves(config), prepare=tied)


@pytest.mark.slow
def test_statistics_move_in_training(tmp_path):
    """Of batch normalisation before the positions."""
    config = hubert.Config(**SMALL | BATCHED | {"mask_time_prob": 0.0})
    model, variables = fmjax.create("hubert", config, rng=jax.random.key(0))
    values = waves(config)["input_values"]
    _, updates = model.apply(
        variables, values, train=True, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"]
    )
    moved = flatten(updates)["batch_stats/embed/position_batch_norm/mean"]
    assert np.abs(moved).max() > 1e-4


def test_published_sizes():
    """Hsu et al. 2021, table 1."""
    check_classes(hubert)
    check_sizes(hubert, dict.fromkeys(hubert.VARIANTS, "HubertModel"))
    for name, published in {"base": 95, "large": 317, "xlarge": 964}.items():
        model = hubert.Model(hubert.VARIANTS[name])
        count = count_parameters(hub.abstract_variables(model)) / 1e6
        assert abs(count / published - 1) < 0.01, (name, count)


def test_config_defaults_are_transformers_defaults():
    check_defaults(hubert)
