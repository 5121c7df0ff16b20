"""DistilBERT against PyTorch's, from the same configs and weights."""

import dataclasses

import numpy as np
import pytest
from encoder_checks import check_classes, check_defaults, check_flax_names
from parity import check_head, check_sizes, text_inputs

from fmjax.models import distilbert

CONFIG = distilbert.Config(
    vocab_size=51, max_position_embeddings=14, n_layers=2, n_heads=3, dim=30, hidden_dim=44,
    activation="relu", id2label=("a", "b", "c"),
)  # fmt: skip
OTHER = dataclasses.replace(
    CONFIG, sinusoidal_pos_embds=True, tie_word_embeddings=False, pad_token_id=None,
    activation="gelu",
)  # fmt: skip
CASES = [*((head, CONFIG) for head in distilbert.HEADS), ("masked_lm", OTHER)]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    if head == "question_answering":
        config = dataclasses.replace(config, id2label=("a", "b"))
    check_head(distilbert, config, head, tmp_path, text_inputs(config, head))


def test_flax_files_load(tmp_path):
    """They lack the table of sinusoids, which is computed then."""
    table = "distilbert.embeddings.position_embeddings.weight"
    (tmp_path / "sinusoidal").mkdir()
    check_flax_names(tmp_path / "sinusoidal", distilbert, OTHER, "masked_lm", dropped=(table,))
    learned = dataclasses.replace(OTHER, sinusoidal_pos_embds=False)
    with pytest.raises(ValueError, match="position_embeddings"):
        check_flax_names(tmp_path, distilbert, learned, "masked_lm", dropped=(table,))


def test_published_facts():
    check_classes(distilbert)
    check_defaults(distilbert)
    check_sizes(distilbert, dict.fromkeys(distilbert.VARIANTS, "DistilBertModel"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_heads": 7}, "distilbert config: hidden_size=768 is not a multiple"),
        ({"activation": "gelo"}, "activation='gelo' is not known"),
        ({"qa_dropout": -0.1, "dropout": 1.0}, r"dropout=1.0.*; qa_dropout=-0.1"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        distilbert.Config(**change)


def test_positions_are_limited():
    model = distilbert.Model(CONFIG)
    with pytest.raises(ValueError, match="15 positions are more than"):
        model.init({}, np.zeros((1, 15), int))
