"""XGLM against transformers' PyTorch XGLM, from the same configs and weights."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from parity import (
    check_decoding,
    check_head,
    check_old_file,
    check_sizes,
    shuffled,
    text_inputs,
)
from transformers.models.xglm import modeling_xglm

import fmjax
from fmjax.config import config_to_json, parse_config
from fmjax.models import xglm
from fmjax.nn.decoder import Inputs

CONFIG = xglm.Config(
    vocab_size=51, d_model=30, ffn_dim=44, num_layers=2, attention_heads=3, pad_token_id=2
)
CROSSED = dataclasses.replace(
    CONFIG, add_cross_attention=True, scale_embedding=False, tie_word_embeddings=False,
    d_model=27, activation_function="relu",
)  # fmt: skip
CASES = [("model", CROSSED), ("causal_lm", CONFIG), ("causal_lm", CROSSED)]


@pytest.fixture
def torch_in_double(monkeypatch):
    """PyTorch's XGLM makes a constant in the default dtype, which a model in float64 overflows."""
    plain = modeling_xglm.XGLMAttention.forward

    def forward(self, *args, **kwargs):
        torch.set_default_dtype(self.q_proj.weight.dtype)
        try:
            return plain(self, *args, **kwargs)
        finally:
            torch.set_default_dtype(torch.float32)

    monkeypatch.setattr(modeling_xglm.XGLMAttention, "forward", forward)


@pytest.mark.usefixtures("torch_in_double")
@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    inputs = text_inputs(config, head, pad_id=2)
    if config.add_cross_attention:
        inputs["encoder_hidden_states"] = np.random.default_rng(1).normal(size=(2, 5, 27))
        inputs["encoder_attention_mask"] = np.array([[1] * 5, [1, 1, 1, 0, 0]])
    check_head(xglm, config, head, tmp_path, inputs)


def test_positions_go_on_and_padding_has_none():
    """Up to and past the table of PyTorch's model, and at the row it zeroes."""
    torch_module = modeling_xglm.XGLMSinusoidalPositionalEmbedding
    ids = np.array([[0, 1, 5, 1999, 2047, 9999, -1]])
    config = dataclasses.replace(CONFIG, pad_token_id=1)
    embed = xglm.Embeddings(config)
    given = Inputs(None, jax.numpy.zeros((1, 7, 30)), None, jax.numpy.asarray(ids), 7, 7, 0, False)
    variables = embed.init(jax.random.key(0), given._replace(
        input_ids=jax.numpy.asarray(ids), inputs_embeds=None
    ))  # fmt: skip
    ours = embed.apply(variables, given)
    theirs = torch_module(10000, 30, 1)(torch.tensor(ids)).numpy()
    np.testing.assert_array_equal(theirs[0, -1], 0)
    # An ulp of the angle at position 9999.
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    np.testing.assert_allclose(ours[:, :3], theirs[:, :3], atol=1e-6)


def test_cross_attention_is_refused_without_the_config():
    model = xglm.Model(CONFIG)
    ids, states = np.zeros((1, 3), int), np.zeros((1, 4, 30))
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        model.init(jax.random.key(0), ids, encoder_hidden_states=states)


def test_cached_decoding():
    model, variables = fmjax.create(
        "xglm", xglm.VARIANTS["tiny"], head="causal_lm", rng=jax.random.key(0)
    )
    check_decoding(model, shuffled(variables))


def test_files_of_the_hub_load(tmp_path):
    """The table of positions, a tied copy; no prefix."""
    check_old_file(
        xglm, xglm.VARIANTS["tiny"], "causal_lm", tmp_path,
        extra=("embed_positions.weights", "lm_head.weight"),
        rename=lambda name: name.removeprefix("model."),
    )  # fmt: skip


def test_published_sizes():
    check_sizes(xglm, dict.fromkeys(xglm.VARIANTS, "XGLMModel"))


def test_config_defaults_are_transformers_defaults():
    theirs = transformers.XGLMConfig().to_dict()
    ours = config_to_json(xglm.Config(), {})
    for key in ours:
        assert ours[key] == theirs[key], key
    assert parse_config(xglm.Config, theirs, xglm.FIXED) == xglm.Config()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_heads": 7}, "d_model=1024 is not a multiple of attention_heads=7"),
        ({"d_model": 2, "attention_heads": 1}, "d_model=2 must be at least 4"),
        ({"layerdrop": 1.0, "ffn_dim": 0}, r"ffn_dim=0 must be at least 1; layerdrop=1\.0"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        xglm.Config(**change)
