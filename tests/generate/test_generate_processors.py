"""Processors against transformers' on the same logits; what they say of themselves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from fmjax.generate import processors as p
from fmjax.generate import sampling as s
from fmjax.generate.state import begin_state

V, S, PROMPT = 37, 14, 5


def make_state(seed, rows=3, new=4, padding=None, words=V):
    """A state of random texts, few words so that they repeat, and their ids [B, P + new]."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, words, (rows, PROMPT + new))
    padding = np.zeros(rows, np.int32) if padding is None else np.asarray(padding, np.int32)
    state = begin_state(
        jnp.asarray(ids[:, :PROMPT]), jnp.asarray(padding), jnp.int32(0), jnp.int32(9),
        capacity=S, vocab_size=V,
    )  # fmt: skip
    for column in range(PROMPT, PROMPT + new):
        state = state.append(jnp.asarray(ids[:, column]))
    return state, ids


def logits(seed, rows=3):
    return np.random.default_rng(seed + 100).normal(size=(rows, V)).astype(np.float32) * 3


def check(ours, theirs, state, ids, scores):
    expected = theirs(torch.tensor(ids), torch.tensor(scores)).numpy()
    np.testing.assert_allclose(ours(jnp.asarray(scores), state), expected, rtol=2e-6, atol=2e-6)


EOS = p.token_mask((3, 8), V)
LISTS = [
    (p.RepetitionPenalty(1.4), hf.RepetitionPenaltyLogitsProcessor(1.4)),
    (p.NoRepeatNgrams(1), hf.NoRepeatNGramLogitsProcessor(1)),
    (p.NoRepeatNgrams(2), hf.NoRepeatNGramLogitsProcessor(2)),
    (p.NoRepeatNgrams(3), hf.NoRepeatNGramLogitsProcessor(3)),
    (p.MinNewTokens(5, EOS), hf.MinNewTokensLengthLogitsProcessor(PROMPT, 5, [3, 8], "cpu")),
    (p.MinNewTokens(4, EOS), hf.MinNewTokensLengthLogitsProcessor(PROMPT, 4, [3, 8], "cpu")),
    (p.SuppressTokens(EOS), hf.SuppressTokensLogitsProcessor([3, 8])),
    (p.SuppressAt(EOS, 4), hf.SuppressTokensAtBeginLogitsProcessor([3, 8], PROMPT + 4)),
    (p.SuppressAt(EOS, 3), hf.SuppressTokensAtBeginLogitsProcessor([3, 8], PROMPT + 3)),
    (p.ForceAt(EOS, -1), hf.ForcedEOSTokenLogitsProcessor(PROMPT + 5, [3, 8])),
    (p.ExponentialDecay(2, 1.3, EOS), hf.ExponentialDecayLengthPenalty((2, 1.3), [3, 8], PROMPT)),
    (p.ExponentialDecay(4, 1.3, EOS), hf.ExponentialDecayLengthPenalty((4, 1.3), [3, 8], PROMPT)),
    (p.RemoveInvalid(), hf.InfNanRemoveLogitsProcessor()),
    (p.Normalize(), hf.LogitNormalization()),
    (s.Temperature(0.6), hf.TemperatureLogitsWarper(0.6)),
    (s.TopK(5), hf.TopKLogitsWarper(5)),
    (s.TopK(V + 9), hf.TopKLogitsWarper(V + 9)),
    (s.TopP(0.8, 1), hf.TopPLogitsWarper(0.8)),
    (s.TopP(0.01, 1), hf.TopPLogitsWarper(0.01)),
    (s.TopP(0.1, 3), hf.TopPLogitsWarper(0.1, min_tokens_to_keep=3)),
    (s.MinP(0.2, 1), hf.MinPLogitsWarper(0.2)),
    (s.MinP(0.99, 3), hf.MinPLogitsWarper(0.99, min_tokens_to_keep=3)),
    (s.Typical(0.7, 1), hf.TypicalLogitsWarper(0.7)),
    (s.Typical(0.05, 2), hf.TypicalLogitsWarper(0.05, min_tokens_to_keep=2)),
    (s.EpsilonCutoff(0.03, 1), hf.EpsilonLogitsWarper(0.03)),
    (s.EpsilonCutoff(0.9, 2), hf.EpsilonLogitsWarper(0.9, min_tokens_to_keep=2)),
    (s.EtaCutoff(0.05, 1), hf.EtaLogitsWarper(0.05)),
]


@pytest.mark.parametrize(("ours", "theirs"), LISTS, ids=lambda x: type(x).__name__)
def test_equal_to_transformers(ours, theirs):
    for seed in range(3):
        state, ids = make_state(seed, words=6)
        if isinstance(ours, p.ForceAt):
            state = state._replace(limit=jnp.int32(5))
        check(ours, theirs, state, ids, logits(seed))


def test_sequence_bias():
    state, ids = make_state(1, words=5)
    # Sequences that do complete, in some rows, beside some that do not.
    biases = {(7,): 1.5, (int(ids[0, -1]), 9): -2.0, (int(ids[1, -2]), int(ids[1, -1]), 9): 4.0}
    biases |= {(30, 31): 1.0, (11,): -0.5, (*(int(token) for token in ids[2]), 12): 3.0}
    biases |= {(0,) * (S + 2): 1.0}  # longer than the text
    ours = p.SequenceBias.of(tuple(biases.items()), V)
    check(ours, hf.SequenceBiasLogitsProcessor(biases), state, ids, logits(1))
    words = [[4], [int(ids[0, -1]), 9], [8]]  # 8 ends texts, so it is not forbidden
    ours = p.SequenceBias.of([(word, -np.inf) for word in words[:2]], V)
    check(ours, hf.NoBadWordsLogitsProcessor(words, [8]), state, ids, logits(2))


def test_encoder_processors():
    """With several hypotheses a text."""
    state, ids = make_state(2, rows=6, words=6)
    rng = np.random.default_rng(3)
    texts = rng.integers(0, 6, (2, 7)).astype(np.int32)
    seen = np.zeros((2, V), bool)
    seen[np.arange(2)[:, None], texts] = True
    scores = logits(2, rows=6)
    ours = p.EncoderRepetitionPenalty(1.7, seen)
    theirs = hf.EncoderRepetitionPenaltyLogitsProcessor(
        1.7, torch.tensor(texts).repeat_interleave(3, 0)
    )
    check(ours, theirs, state, ids, scores)
    ours = p.NoEncoderNgrams(texts, np.ones((2, 7), bool), 2)
    theirs = hf.EncoderNoRepeatNGramLogitsProcessor(2, torch.tensor(texts))
    check(ours, theirs, state, ids, scores)


def test_padding_is_no_text():
    """What stands in the padding neither repeats nor completes anything."""
    state, ids = make_state(4, padding=[0, 3, 4], words=6)
    scores = logits(4)
    mask = torch.tensor([0, 3, 4])
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.4, prompt_ignore_length=mask)
    check(p.RepetitionPenalty(1.4), theirs, state, ids, scores)
    other = state._replace(
        tokens=jnp.where(jnp.arange(S) < state.padding[:, None], 35, state.tokens)
    )
    longer = tuple(int(token) for token in ids[1, 2:])  # one token more than the row has
    for ours in (p.NoRepeatNgrams(2), p.SequenceBias.of([((*longer, 9), 2.0)], V)):
        scores = jnp.asarray(scores)
        np.testing.assert_array_equal(ours(scores, state), ours(scores, other))
    biased = p.SequenceBias.of([((*longer[1:], 9), 2.0)], V)(scores, state)
    assert biased[1, 9] == scores[1, 9] + 2.0  # what is all text does complete


@given(st.integers(0, 10**6), st.integers(1, 50), st.floats(0.01, 1.0))
def test_thresholds_are_exact(seed, k, p_mass):
    """Bisection over bits finds what sorting finds, for numbers of any size and for ties."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(2, 40)).astype(np.float32) * 10.0 ** rng.integers(-20, 20, (2, 40))
    values[:, :6] = np.float32([0.0, -0.0, 1.5, 1.5, np.inf, -np.inf])
    values = rng.permuted(values.astype(np.float32), axis=1)
    found = s.kth_largest(jnp.asarray(values), jnp.int32(k))[:, 0]
    np.testing.assert_array_equal(found, np.sort(values, axis=1)[:, ::-1][:, min(k, 40) - 1])
    probabilities = rng.dirichlet(np.full(40, 0.3), 2).astype(np.float32)
    kept = s.TopP(np.float32(p_mass), 1)(jnp.log(probabilities), None) > -jnp.inf
    for row, mask in zip(probabilities.astype(np.float64), np.asarray(kept), strict=True):
        assert row[mask].sum() >= p_mass - 1e-5
        assert row[mask].sum() - row[mask].min() < p_mass + 1e-5  # none too many
        assert row[mask].min() >= row[~mask].max(initial=0)


def test_draws_have_the_distribution():
    """Frequencies of draws, for vocabularies that fill their blocks and such that do not."""
    for size in (1, 2, 7, 16, 17, 50):
        scores = np.random.default_rng(size).normal(size=size).astype(np.float32) * 2
        scores[size // 2 : size // 2 + 1] = -np.inf if size > 2 else 0.0
        count = 20_000
        drawn = s.draw(jnp.broadcast_to(scores, (count, size)), jax.random.key(size))
        seen = np.bincount(drawn, minlength=size)
        expected = count * np.asarray(jax.nn.softmax(scores), np.float64)
        assert (seen[expected == 0] == 0).all()
        there = expected > 0
        chi = ((seen - expected)[there] ** 2 / expected[there]).sum()
        freedom = there.sum() - 1
        assert chi <= freedom + 5 * np.sqrt(2 * freedom) + 1e-6, (size, chi)


def test_draws_never_leave_the_support():
    """Not even where the uniform number rounds to the whole."""
    scores = jnp.full((3, 10), -jnp.inf).at[:, 4].set(1.0)
    for at in (0.0, 0.5, 1.0, 1.1):
        token, _ = s._reach(jax.nn.softmax(scores), jnp.full(3, at))
        assert (np.asarray(token) == 4).all()
    assert (np.asarray(s.draw(scores, jax.random.key(0))) == 4).all()


def test_processors_are_arguments():
    """Their numbers are leaves, what changes the program is structure."""
    calls = itertools.count()

    @jax.jit
    def run(chain, scores, state):
        next(calls)
        for processor in chain:
            scores = processor(scores, state)
        return scores

    state, _ = make_state(0)
    scores = logits(0)
    for temperature, k, top_p in ((0.5, 3, 0.9), (2.0, 30, 0.5)):
        chain = (
            s.Temperature(np.float32(temperature)), s.TopK(np.int32(k)),
            s.TopP(np.float32(top_p), 1),
            p.RepetitionPenalty(np.float32(temperature)), p.NoRepeatNgrams(2),
        )  # fmt: skip
        expected = scores
        for processor in chain:
            expected = processor(jnp.asarray(expected), state)
        np.testing.assert_allclose(run(chain, scores, state), expected, rtol=1e-6)
    assert next(calls) == 1
