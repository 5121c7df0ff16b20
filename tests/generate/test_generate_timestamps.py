"""Whisper's rules of times against transformers'."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from fmjax.generate.processors import TimestampRules
from fmjax.generate.state import begin_state

V, BEGIN, NONE, EOS, PROMPT = 37, 25, 24, 20, 3
TIME_0, TIME_3, TIME_5 = BEGIN, BEGIN + 3, BEGIN + 5
# What was said so far: nothing, an open text, a text, a closed one, a pair, a second text, ...
SAID = [
    [],
    [TIME_0],
    [TIME_3],
    [TIME_0, 5],
    [TIME_0, 5, TIME_3],
    [TIME_0, 5, TIME_3, TIME_3],
    [TIME_0, 5, 6, TIME_3, TIME_3, 7],
    [TIME_0, 5, TIME_3, TIME_5, 7, TIME_5],
    [7, TIME_5],
    [7, 8],
]


@jax.jit
def apply(rules, scores, state):
    return rules(scores, state)


@pytest.mark.parametrize("first", [None, 2])
@pytest.mark.parametrize("bias", [-3.0, 0.0, 3.0])
def test_timestamp_rules_equal_transformers(first, bias):
    """With times unlikely, likely, and likelier than text; -inf in the same places."""
    config = SimpleNamespace(
        no_timestamps_token_id=NONE, eos_token_id=EOS, bos_token_id=EOS,
        max_initial_timestamp_index=first,
    )  # fmt: skip
    theirs = hf.WhisperTimeStampLogitsProcessor(config, begin_index=PROMPT)
    ours = TimestampRules(BEGIN, NONE, EOS, V if first is None else first)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, EOS, (2, PROMPT))
    for said in SAID:
        state = begin_state(
            jnp.asarray(prompt), jnp.zeros(2, jnp.int32), jnp.int32(0), jnp.int32(9), capacity=14,
            vocab_size=V,
        )  # fmt: skip
        for token in said:
            state = state.append(jnp.full(2, token))
        ids = np.concatenate([prompt, np.tile(said, (2, 1)).astype(np.int64)], axis=1)
        scores = rng.normal(size=(2, V)).astype(np.float32)
        scores[:, BEGIN:] += bias
        expected = theirs(torch.tensor(ids), torch.tensor(scores)).numpy()
        np.testing.assert_array_equal(apply(ours, scores, state), expected, str(said))
