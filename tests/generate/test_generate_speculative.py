"""With a draft model: the same text, the same distribution, fewer passes of the large model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import shuffled

import fmjax
from fmjax.generate.forward import Prompt
from fmjax.generate.sampling import Temperature, TopK
from fmjax.generate.search import start
from fmjax.generate.speculative import Draft, _accept, speculate, start_draft
from fmjax.generate.state import Controls
from fmjax.models import gpt2, t5


def model_of(seed, layers=2, vocab_size=41):
    config = gpt2.Config(vocab_size=vocab_size, n_positions=48, n_embd=16, n_layer=layers, n_head=2)
    model, variables = fmjax.create("gpt2", config, head="causal_lm", rng=jax.random.key(seed))
    return model, shuffled(variables, seed, 0.3)


def near(variables, seed, spread):
    """Weights near the given ones: a draft model that is often right."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + spread * rng.normal(size=x.shape), variables)


@pytest.fixture(scope="module")
def large():
    return model_of(0)


def test_greedy_text_is_the_same(large):
    """Whatever is proposed, in rows that end at different times, with padding and processors."""
    ids = np.random.default_rng(1).integers(2, 41, (3, 8))
    mask = np.ones_like(ids)
    mask[2, :3] = 0
    plain = fmjax.generate(*large, ids, attention_mask=mask, max_new_tokens=30)
    eos = [int(plain.tokens[0, 5]), int(plain.tokens[1, 9])]
    for draft, count in ((near(large[1], 2, 0.02), 4), (model_of(7)[1], 4)):
        for options in (
            {},
            {"eos_token_id": eos, "repetition_penalty": 1.3, "min_new_tokens": 3},
        ):
            common = {"attention_mask": mask, "max_new_tokens": 30, **options}
            expected = fmjax.generate(*large, ids, **common)
            out = fmjax.generate(
                *large, ids, **common, draft=(large[0], draft), num_assistant_tokens=count
            )
            np.testing.assert_array_equal(out.tokens, expected.tokens)
            np.testing.assert_array_equal(out.lengths, expected.lengths)
            assert 0 <= out.accepted <= out.drafted


@pytest.mark.slow
def test_its_own_draft_is_always_accepted(large):
    """All proposals are taken: one pass of the large model makes count + 1 tokens."""
    ids = np.random.default_rng(1).integers(2, 41, (2, 8))
    for options in ({}, {"do_sample": True, "rng": jax.random.key(2)}):
        out = fmjax.generate(
            *large, ids, max_new_tokens=21, draft=large, num_assistant_tokens=4, **options
        )
        # 1 token, then 4 rounds of 5; float32 may reject a proposal of another shape's product.
        assert out.drafted == 2 * 4 * 4
        assert out.accepted >= out.drafted - 1


@pytest.mark.slow
def test_encoder_decoder(large):
    config = t5.Config(vocab_size=41, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    model, variables = fmjax.create("t5", config, head="seq2seq_lm", rng=jax.random.key(0))
    variables = shuffled(variables, 3, 0.3)
    ids = np.random.default_rng(1).integers(2, 41, (2, 8))
    options = {"max_new_tokens": 14, "decoder_start_token_id": 0}
    expected = fmjax.generate(model, variables, ids, **options)
    draft = (model, near(variables, 1, 0.02))
    out = fmjax.generate(model, variables, ids, draft=draft, num_assistant_tokens=3, **options)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert out.accepted > 0


def test_acceptance_leaves_the_distribution():
    """Algorithm 1 alone, from given distributions: the token at each place is distributed as p."""
    rng = np.random.default_rng(0)
    count, rows, size, draws = 2, 2, 5, 40_000
    p = rng.dirichlet(np.ones(size), (count + 1, rows)).astype(np.float32)
    q = rng.dirichlet(np.ones(size), (count, rows)).astype(np.float32)
    p[0, 0] = q[0, 0]  # one that is never rejected
    q[0, 1] = np.float32([0, 0.5, 0.5, 0, 0])  # one that lacks tokens
    finished = jnp.array([False, False])

    @jax.jit
    @jax.vmap
    def run(key):
        keys = jax.random.split(key)
        tokens = jax.random.categorical(keys[0], jnp.log(q), axis=-1)
        token, agreed = _accept(jnp.log(p), Draft(tokens, jnp.asarray(q)), finished, keys[1])
        first = jnp.where(agreed > 0, tokens[0], token)
        return first, token, agreed

    first, token, agreed = (np.asarray(x) for x in run(jax.random.split(jax.random.key(1), draws)))
    assert set(agreed) == {0, 1, 2}

    def check(seen, expected):
        expected = expected.astype(np.float64) * seen.sum()
        chi = ((seen - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
        assert chi < size + 6 * np.sqrt(2 * size), (seen, expected)

    for row in range(rows):
        check(np.bincount(first[:, row], minlength=size), p[0, row])
        # The token after all drafts: p of the last place, for whom it is reached.
        check(np.bincount(token[agreed == count][:, row], minlength=size), p[count, row])


@pytest.mark.slow
def test_sampled_texts_have_the_distribution():
    """Whole texts of two tokens and their frequencies against the exact probabilities."""
    size = 7
    model, variables = model_of(0, 1, size)
    draft_model, draft_variables = model_of(1, 1, size)
    ids = np.array([[3, 1, 5]])
    prompt = Prompt(np.pad(ids, ((0, 0), (1, 0))).astype(np.int32), np.array([1], np.int32))
    chain = (Temperature(np.float32(0.9)), TopK(np.int32(5)))
    # The first token comes from the large model alone; the second and third from the rounds.
    limit, capacity, draws, count = np.int32(3), 10, 2000, 2

    @jax.jit
    @jax.vmap
    def run(key):
        controls = Controls(chain, np.zeros(0, np.int32), np.array(0, np.int32), None, key)
        carry, context = start(
            model, variables, prompt, controls, limit, np.zeros(1, np.int32), capacity=capacity
        )
        cache, draft_context = start_draft(
            draft_model, draft_variables, prompt, limit, capacity=capacity
        )
        loop = speculate(
            model, variables, draft_model, draft_variables, carry, context, cache, draft_context,
            controls, count=count,
        )  # fmt: skip
        return loop.carry.state.tokens[0, 4:7], loop.accepted

    tokens, accepted = run(jax.random.split(jax.random.key(0), draws))
    texts = np.asarray(tokens)
    assert 0 < np.asarray(accepted).mean() < 2  # some drafts are taken and some are not

    def distribution(prefixes):
        whole = np.concatenate([np.repeat(ids, len(prefixes), axis=0), prefixes], axis=1)
        logits = model.apply(variables, input_ids=whole).logits[:, -1]
        for processor in chain:
            logits = processor(logits, None)
        return np.asarray(jax.nn.softmax(logits), np.float64)

    one = distribution(np.zeros((1, 0), np.int64))[0]
    two = distribution(np.arange(size)[:, None])
    pairs = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1)
    three = distribution(pairs.reshape(-1, 2)).reshape(size, size, size)
    expected = draws * one[:, None, None] * two[:, :, None] * three
    seen = np.zeros((size,) * 3)
    np.add.at(seen, tuple(texts.T), 1)
    assert (seen[expected == 0] == 0).all()
    for axes in ((1, 2), (0, 2), (0, 1), (0,), (2,)):  # marginals, and pairs of neighbours
        mine, exact = seen.sum(axis=axes), expected.sum(axis=axes)
        many = exact > 5
        chi = ((mine - exact)[many] ** 2 / exact[many]).sum()
        assert chi < many.sum() + 6 * np.sqrt(2 * many.sum()), axes


def test_what_does_not_fit_is_refused(large):
    ids = np.ones((1, 4), np.int64)
    other = model_of(3, vocab_size=50)
    with pytest.raises(ValueError, match="vocabulary has 50 tokens, the model's 41"):
        fmjax.generate(*large, ids, draft=other)
    with pytest.raises(ValueError, match="does not help a beam search"):
        fmjax.generate(*large, ids, draft=large, num_beams=2)
    config = gpt2.Config(vocab_size=41, n_positions=10, n_embd=16, n_layer=1, n_head=2)
    short = fmjax.create("gpt2", config, head="causal_lm", rng=jax.random.key(0))
    with pytest.raises(ValueError, match=r"4 \+ 8 tokens are more than the draft model's 10"):
        fmjax.generate(*large, ids, draft=short, max_new_tokens=8)


@pytest.mark.parametrize(
    "length", [17, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 30))]
)
def test_to_the_last_position(large, length):
    """Drafts beyond the model's positions are dropped and spoil nothing, however much of the
    prompt's bucket is padding."""
    ids = np.random.default_rng(1).integers(2, 41, (1, length))
    expected = fmjax.generate(*large, ids, max_new_tokens=48 - length)
    options = {"max_new_tokens": 48 - length, "draft": model_of(7), "num_assistant_tokens": 5}
    out = fmjax.generate(*large, ids, **options)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
