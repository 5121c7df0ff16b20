"""What compiles, and what does not: second calls, streams, processors of one's own."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmjax
from fmjax.generate.forward import Prompt
from fmjax.generate.inputs import bucket
from fmjax.generate.search import go_on, start
from fmjax.generate.state import Controls
from fmjax.models import family_of, gpt2, t5
from fmjax.perf.timing import compile_events
from fmjax.tree import unstack_layers

CONFIG = gpt2.Config(vocab_size=47, n_positions=64, n_embd=16, n_layer=1, n_head=2)


@pytest.fixture(scope="module")
def decoder():
    model, variables = fmjax.create("gpt2", CONFIG, head="causal_lm", rng=jax.random.key(0))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda x: x + 0.4 * rng.normal(size=x.shape).astype(np.float32), variables
    )


def prompts(width, rows=2, seed=0):
    return np.random.default_rng(seed).integers(1, CONFIG.vocab_size, (rows, width))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"eos_token_id": None}),
        (
            {"eos_token_id": 3, "repetition_penalty": 1.2, "min_new_tokens": 2},
            {"eos_token_id": 9, "repetition_penalty": 1.9, "min_new_tokens": 4},
        ),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 7, "top_p": 0.9, "min_p": 0.01},
            {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.3, "min_p": 0.2},
        ),
        (
            {"num_beams": 2, "length_penalty": 0.5, "num_return_sequences": 2},
            {"num_beams": 2, "length_penalty": 2.0, "early_stopping": True},
        ),
    ],
    ids=["greedy", "penalties", "sampling", "beams"],
)
def test_second_calls_compile_nothing(decoder, first, second):
    """Another prompt length and number of tokens in their buckets, other numbers in options."""
    key = {"rng": jax.random.key(1)} if "do_sample" in first else {}
    a = fmjax.generate(*decoder, prompts(5), max_new_tokens=9, **first, **key)
    with compile_events() as events:
        b = fmjax.generate(*decoder, prompts(12), max_new_tokens=14, **second, **key)
    assert (events.traces, events.compilations) == (0, 0)
    assert a.tokens.shape[1] == 9
    assert b.tokens.shape == (2, 14)
    assert b.lengths.shape == (2,)


def test_second_calls_of_an_encoder_decoder_compile_nothing():
    config = t5.Config(vocab_size=47, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model, variables = fmjax.create("t5", config, head="seq2seq_lm", rng=jax.random.key(0))
    options = {"decoder_start_token_id": 0}
    fmjax.generate(model, variables, prompts(5), max_new_tokens=9, **options)
    with compile_events() as events:
        fmjax.generate(model, variables, prompts(16), max_new_tokens=5, **options)
    assert (events.traces, events.compilations) == (0, 0)


def test_the_bucket_changes_nothing(decoder):
    """Texts do not depend on what pads prompts, cache and batch."""
    ids = prompts(7)
    out = fmjax.generate(*decoder, ids, max_new_tokens=20)
    longer = np.concatenate([np.zeros((2, 30), np.int64), ids], axis=1)
    mask = np.concatenate([np.zeros((2, 30), np.int64), np.ones_like(ids)], axis=1)
    padded = fmjax.generate(*decoder, longer, attention_mask=mask, max_new_tokens=20)
    np.testing.assert_array_equal(padded.tokens, out.tokens)
    np.testing.assert_array_equal(padded.sequences[:, 30:], out.sequences)
    more = fmjax.generate(*decoder, ids, max_new_tokens=33)  # another bucket
    np.testing.assert_array_equal(more.tokens[:, :20], out.tokens)
    alone = fmjax.generate(*decoder, ids[1:], max_new_tokens=20)
    np.testing.assert_array_equal(alone.tokens, out.tokens[1:])
    beside = np.concatenate([prompts(37, rows=1, seed=3), longer[:1]])  # a longer one
    mask = np.concatenate([np.ones((1, 37), np.int64), mask[:1]])
    other = fmjax.generate(*decoder, beside, attention_mask=mask, max_new_tokens=20)
    np.testing.assert_array_equal(other.tokens[1], out.tokens[0])


@pytest.mark.parametrize(
    ("family", "change", "rows"),
    [
        ("gpt2", {}, 1),
        ("gpt2", {}, 2),
        ("llama", {"num_key_value_heads": 1}, 2),
        ("t5", {}, 1),
    ],
)
def test_the_cache_is_updated_in_place(family, change, rows):
    """The compiled loop copies no keys or values, as it would for a careless update."""
    config = dataclasses.replace(family_of(family).VARIANTS["tiny"], **change)
    head = "seq2seq_lm" if family == "t5" else "causal_lm"
    model, variables = fmjax.create(family, config, head=head, rng=jax.random.key(0))
    empty = np.zeros(0, np.int32)
    controls = Controls((), empty, np.array(0, np.int32), None, None)
    ids = np.ones((rows, 16), np.int32)
    none = np.zeros(rows, np.int32)
    if head == "causal_lm":
        prompt = Prompt(ids, none)
    else:
        prompt = Prompt(ids[:, :1], none, {"input_ids": ids}, None, ids)
    limit = np.int32(8)

    def begin(variables):
        return start(model, variables, prompt, controls, limit, none, capacity=37)

    carry, context = jax.eval_shape(begin, variables)
    program = go_on.lower(model, variables, carry, context, controls, limit).compile().as_text()
    name = re.findall(r"while\(.*?body=%?([\w.-]+)", program)[-1]
    body = program[program.index(f"\n%{name} ") :]
    body = body[: body.index("\n}")]
    cached = [line for line in body.splitlines() if re.search(r"\[[\d,]*37,\d+\]", line)]
    assert any("dynamic-update-slice" in line for line in cached)
    assert not [line for line in cached if re.search(r" copy\(| transpose\(", line)]


@pytest.mark.slow
def test_scanned_and_sharded_models_say_the_same(decoder):
    """Layers in one scan, and weights spread over four devices."""
    config = dataclasses.replace(CONFIG, n_layer=2)
    model, variables = fmjax.create(
        "gpt2", config, head="causal_lm", rng=jax.random.key(0), scan=True
    )
    ids = prompts(5)
    for options in ({}, {"num_beams": 2}):
        scanned = fmjax.generate(model, variables, ids, max_new_tokens=9, **options)
        loop = model.clone(scan=False), unstack_layers(variables)
        plain = fmjax.generate(*loop, ids, max_new_tokens=9, **options)
        np.testing.assert_array_equal(scanned.tokens, plain.tokens)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(leaf):
        axis = "model" if leaf.ndim > 1 and leaf.shape[-1] % 4 == 0 else None
        spec = jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), axis)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    sharded = jax.tree.map(spread, loop[1])
    out = fmjax.generate(loop[0], sharded, ids, max_new_tokens=9, num_beams=2)
    np.testing.assert_array_equal(out.tokens, plain.tokens)


def test_buckets():
    sizes = [bucket(n) for n in range(1, 200)]
    assert sorted(set(sizes)) == [16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert all(n <= size < max(1.5 * n, 17) for n, size in enumerate(sizes, 1))


def test_stream_is_generate(decoder):
    for options in ({}, {"do_sample": True, "rng": jax.random.key(3)}, {"eos_token_id": [11, 30]}):
        whole = fmjax.generate(*decoder, prompts(6), max_new_tokens=12, **options)
        pieces = list(fmjax.stream(*decoder, prompts(6), max_new_tokens=12, **options))
        assert all(piece.shape == (2, 1) for piece in pieces)
        streamed = np.concatenate(pieces, axis=1)
        np.testing.assert_array_equal(streamed, whole.tokens[:, : whole.lengths.max()])
        with compile_events() as events:
            pieces = list(
                fmjax.stream(*decoder, prompts(6), max_new_tokens=12, chunk_size=5, **options)
            )
        assert events.compilations == 0
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1), streamed)
        assert all(piece.shape[1] == 5 for piece in pieces[:-1])


def test_streams_do_not_disturb_each_other(decoder):
    """Two at a time, one of them given up halfway: buffers that are given away are its own."""
    first = fmjax.stream(*decoder, prompts(6), max_new_tokens=8)
    second = fmjax.stream(*decoder, prompts(6, seed=1), max_new_tokens=8)
    taken = [next(first), next(second), next(first), next(second)]
    del first
    rest = list(second)
    expected = fmjax.generate(*decoder, prompts(6, seed=1), max_new_tokens=8).tokens
    got = np.concatenate([taken[1], taken[3], *rest], axis=1)
    np.testing.assert_array_equal(got, expected)


def test_processors_of_ones_own(decoder):
    """A pure function of logits and state, compiled once, which sees the text so far."""
    calls = itertools.count()

    def no_token_twice_in_a_row(logits, state):
        next(calls)
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)
        words = jnp.arange(logits.shape[-1])
        return jnp.where(words == last, -jnp.inf, logits)

    def only_even(logits, state):
        return jnp.where(jnp.arange(logits.shape[-1]) % 2 == 1, -jnp.inf, logits)

    own = (no_token_twice_in_a_row, only_even)
    out = fmjax.generate(*decoder, prompts(6), max_new_tokens=12, processors=own)
    assert (out.tokens % 2 == 0).all()
    assert (np.diff(out.sequences[:, 5:], axis=1) != 0).all()
    traced = next(calls)
    fmjax.generate(*decoder, prompts(9), max_new_tokens=15, processors=own)
    assert next(calls) == traced + 1


def test_the_state_is_the_text(decoder):
    """Counts, mask and numbers of the state agree with its tokens at every step."""
    seen = []

    def spy(logits, state):
        jax.debug.callback(lambda *parts: seen.append(parts), *state, state.mask, ordered=True)
        return logits

    ids = prompts(6)
    mask = np.ones_like(ids)
    mask[1, :2] = 0
    out = fmjax.generate(
        *decoder, ids, attention_mask=mask, max_new_tokens=5, processors=(spy,), eos_token_id=None
    )
    jax.effects_barrier()
    assert len(seen) == 5
    for step, (tokens, padding, counts, length, at, limit, real) in enumerate(seen):
        assert (int(at), int(limit), int(length)) == (step, 5, 16 + step)
        np.testing.assert_array_equal(padding, [10, 12])
        for row in range(2):
            text = np.asarray(tokens)[row, int(padding[row]) : int(length)]
            expected = np.concatenate([ids[row][mask[row] == 1], out.tokens[row, :step]])
            np.testing.assert_array_equal(text, expected)
            np.testing.assert_array_equal(
                counts[row], np.bincount(expected, minlength=CONFIG.vocab_size)
            )
            assert np.asarray(real)[row].sum() == len(expected)


def test_logits_and_scores_of_each_step(decoder):
    """They are the full pass's logits, and what the processors make of them."""
    model, variables = decoder
    out = fmjax.generate(
        *decoder, prompts(6), max_new_tokens=7, output_logits=True, output_scores=True,
        suppress_tokens=[2, 5],
    )  # fmt: skip
    assert out.step_logits.shape == (2, 7, CONFIG.vocab_size)
    full = model.apply(variables, input_ids=out.sequences).logits[:, 5:-1]
    np.testing.assert_allclose(out.step_logits, full, atol=1e-4 * np.abs(full).max())
    assert (out.step_scores[:, :, [2, 5]] == -np.inf).all()
    kept = np.delete(np.arange(CONFIG.vocab_size), [2, 5])
    np.testing.assert_array_equal(out.step_scores[:, :, kept], out.step_logits[:, :, kept])
    np.testing.assert_array_equal(out.step_scores.argmax(axis=-1), out.tokens)


@pytest.mark.slow
def test_sampling_has_the_processed_distribution(decoder):
    """The first token of many draws against transformers' chain on the model's logits."""
    import torch
    from transformers.generation import logits_process as hf

    model, variables = decoder
    ids = prompts(6, rows=1)
    count = 6000
    out = fmjax.generate(
        *decoder, ids, max_new_tokens=2, do_sample=True, rng=jax.random.key(5), temperature=1.6,
        top_k=20, top_p=0.9, repetition_penalty=1.5, num_return_sequences=count,
    )  # fmt: skip
    logits = np.asarray(model.apply(variables, input_ids=ids).logits[:, -1])
    chain = hf.LogitsProcessorList(
        [
            hf.RepetitionPenaltyLogitsProcessor(1.5),
            hf.TemperatureLogitsWarper(1.6),
            hf.TopKLogitsWarper(20),
            hf.TopPLogitsWarper(0.9),
        ]
    )
    expected = count * torch.softmax(chain(torch.tensor(ids), torch.tensor(logits)), -1)[0].numpy()
    seen = np.bincount(out.tokens[:, 0], minlength=CONFIG.vocab_size)
    assert (seen[expected == 0] == 0).all()
    there = expected > 0
    chi = ((seen - expected)[there] ** 2 / expected[there]).sum()
    freedom = there.sum() - 1
    assert chi < freedom + 5 * np.sqrt(2 * freedom)
    # And a second token does not repeat the first one's luck: given one, all others occur.
    most = np.bincount(out.tokens[:, 0]).argmax()
    assert len(set(out.tokens[out.tokens[:, 0] == most][:, 1])) > 3
    again = fmjax.generate(
        *decoder, ids, max_new_tokens=2, do_sample=True, rng=jax.random.key(5), temperature=1.6,
        top_k=20, top_p=0.9, repetition_penalty=1.5, num_return_sequences=count,
    )  # fmt: skip
    np.testing.assert_array_equal(again.tokens, out.tokens)


@pytest.mark.slow
def test_sampled_beams(decoder):
    """Beams that are drawn: different for different keys, each as probable as it says."""
    model, variables = decoder
    options = {"do_sample": True, "num_beams": 3, "num_return_sequences": 3, "temperature": 1.0}
    runs = [
        fmjax.generate(
            *decoder, prompts(6), max_new_tokens=5, top_k=0, length_penalty=0.0,
            rng=jax.random.key(key), **options,
        )
        for key in (0, 1)
    ]  # fmt: skip
    assert (runs[0].tokens != runs[1].tokens).any()
    out = runs[0]
    logits = model.apply(variables, input_ids=out.sequences).logits[:, 5:-1]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    chosen = np.take_along_axis(log_p, out.tokens[:, :, None], axis=2)[:, :, 0].sum(axis=1)
    np.testing.assert_allclose(out.scores, chosen, atol=1e-4)
    assert (np.diff(out.scores.reshape(2, 3), axis=1) <= 0).all()
    for texts in out.tokens.reshape(2, 3, 5):
        assert len({tuple(text) for text in texts}) == 3
