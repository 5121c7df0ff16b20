"""TrOCR's decoder against transformers' PyTorch class."""

import dataclasses

import jax
import numpy as np
import pytest
from parity import check_decoding, check_defaults, check_head, check_sizes, shuffled, text_inputs

import fmjax
from fmjax.models import trocr

LEARNED = trocr.VARIANTS["tiny"]
SINUSOIDS = dataclasses.replace(
    LEARNED, use_learned_position_embeddings=False, layernorm_embedding=False,
    tie_word_embeddings=False, activation_function="relu",
)  # fmt: skip


@pytest.mark.parametrize("config", [LEARNED, SINUSOIDS], ids=["learned", "sinusoids"])
def test_equals_pytorch(config, tmp_path):
    """With states of another width, some of which are padding; padding in the texts too."""
    inputs = text_inputs(config, "causal_lm", pad_id=config.pad_token_id)
    inputs["encoder_hidden_states"] = np.random.default_rng(1).normal(size=(2, 5, 16))
    inputs["encoder_attention_mask"] = np.array([[1] * 5, [1, 1, 1, 0, 0]])
    check_head(trocr, config, "causal_lm", tmp_path, inputs)


@pytest.mark.parametrize("config", [LEARNED, SINUSOIDS], ids=["learned", "sinusoids"])
def test_cached_decoding(config):
    model, variables = fmjax.create(
        "trocr", config, head="causal_lm", rng=jax.random.key(0), scan=True
    )
    check_decoding(model, shuffled(variables))


def test_sinusoids_pass_over_padding():
    """Without given positions the cache's length and the tokens that are no padding count."""
    model, variables = fmjax.create("trocr", SINUSOIDS, head="causal_lm", rng=jax.random.key(0))
    ids = np.array([[5, 6, 7, 8]])
    mask = np.ones_like(ids)
    whole = model.apply(variables, ids, mask).logits
    first = model.apply(variables, ids[:, :2], mask, cache=model.init_cache(1, 4))
    last = model.apply(variables, ids[:, 2:], mask, cache=first.cache)
    np.testing.assert_allclose(last.logits, whole[:, 2:], atol=1e-5)
    padded = model.apply(variables, np.array([[1, 5, 6, 7, 8]]), np.array([[0, 1, 1, 1, 1]])).logits
    np.testing.assert_allclose(padded[:, 1:], whole, atol=1e-5)


def test_published_sizes():
    check_sizes(trocr, dict.fromkeys(trocr.VARIANTS, "TrOCRForCausalLM"))


def test_config_defaults_are_transformers_defaults():
    check_defaults(trocr)


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="cross_attention_hidden_size=0 must be") as error:
        trocr.Config(
            d_model=2, decoder_attention_heads=1, use_learned_position_embeddings=False,
            pad_token_id=None, cross_attention_hidden_size=0,
        )  # fmt: skip
    assert "at least 4 for two sinusoids" in str(error.value)
    assert "counted from pad_token_id" in str(error.value)
