"""Beam search, step for step as transformers has it, the whole loop on the device."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.generate.forward import (
    Prompt,
    forward,
    prefill,
    repeat_rows,
    take_rows,
    unembed,
    while_decoding,
)
from fmjax.generate.state import Controls, State, advance_stop, begin_state, is_end, process
from fmjax.types import PyTree, Variables

# Subtracted from the scores of hypotheses that must not be chosen.
OUT = 1e9


class Scoring(NamedTuple):
    """How finished hypotheses are ranked and when none can be better; all traced.

    Args:
        length_penalty: float32 [], scores are divided by length to this power.
        stop_when_full: bool [], stop at K finished hypotheses (early_stopping=True).
        look_ahead: bool [], judge running hypotheses by the best length there can be
            (early_stopping="never").
    """

    length_penalty: Array | np.ndarray
    stop_when_full: Array | np.ndarray
    look_ahead: Array | np.ndarray


class Finished(NamedTuple):
    """The best finished hypotheses of each prompt, best first.

    Args:
        tokens: int32 [B, K, S].
        scores: float32 [B, K].
        lengths: int32 [B, K], new tokens, the end included.
        there: bool [B, K], whether there are so many yet.
    """

    tokens: Array
    scores: Array
    lengths: Array
    there: Array


class Beams(NamedTuple):
    """What goes round the loop.

    Args:
        state: of the running hypotheses; its rows are [B * K].
        scores: float32 [B, K], log-probabilities of the running hypotheses.
        parents: int32 [B * K], the rows of the cache that they continue.
        stop: int32 [B, K], states of the stop strings' automaton.
        finished: the finished ones.
        hopeful: bool [B], whether a running hypothesis can still be among the best.
        go_on: bool [], whether there is another step.
        cache: keys and values of the hypotheses one step ago.
    """

    state: State
    scores: Array
    parents: Array
    stop: Array
    finished: Finished
    hopeful: Array
    go_on: Array
    cache: PyTree


def _pick(array: Array, at: Array) -> Array:
    """Beams [B, k, ...] of [B, K, ...], by numbers int32 [B, k]."""
    return jnp.take_along_axis(array, at.reshape(*at.shape, *[1] * (array.ndim - 2)), axis=1)


def _draw(log_probs: Array, count: int, rng: Array) -> Array:
    """int32 [B, count] of [B, N]: drawn without replacement, the most probable first.

    The largest of log-probabilities with Gumbel noise are such a draw (Kool et al. 2019,
    arXiv:1903.06059, sec. 2.3).
    """
    noise = jax.random.gumbel(rng, log_probs.shape)
    drawn = jax.lax.top_k(log_probs + noise, count)[1]
    order = jnp.argsort(jnp.take_along_axis(log_probs, drawn, axis=1), axis=1, descending=True)
    return jnp.take_along_axis(drawn, order, axis=1)


def _choose(logits: Array, beams: Beams, controls: Controls, scoring: Scoring) -> Beams:
    """Continues the hypotheses by logits [B * K, V] of their next tokens."""
    state, finished = beams.state, beams.finished
    batch, width = beams.scores.shape
    log_probs = process(jax.nn.log_softmax(logits, axis=-1), state, controls)
    vocab_size = log_probs.shape[-1]
    total = log_probs.reshape(batch, width, vocab_size) + beams.scores[:, :, None]
    total = total.reshape(batch, width * vocab_size)
    # So many that K of them go on even if all others end.
    count = max(2, 1 + controls.eos.shape[0]) * width
    if controls.rng is None:
        values, chosen = jax.lax.top_k(total, count)  # [B, count]
    else:
        chosen = _draw(total, count, jax.random.fold_in(controls.rng, state.step))
        values = jnp.take_along_axis(total, chosen, axis=1)
    parent, token = chosen // vocab_size, chosen % vocab_size
    stop, stopped = advance_stop(controls.stop, _pick(beams.stop, parent), token)
    step = state.step + 1
    ended = is_end(token, controls) | stopped | (step >= state.limit)

    # The best that have not ended run on.
    running, at = jax.lax.top_k(values - OUT * ended, width)
    parents = _pick(parent, at)  # [B, K]
    rows = (jnp.arange(batch)[:, None] * width + parents).reshape(-1)
    new_state = State(
        state.tokens[rows], state.padding[rows], state.counts[rows], *state[3:]
    ).append(_pick(token, at).reshape(-1))

    # Of those that have ended, only the best K count; the others were there as a reserve.
    tokens = _pick(state.tokens.reshape(batch, width, -1), parent)  # [B, count, S]
    tokens = jax.lax.dynamic_update_slice(tokens, token[:, :, None], (0, 0, state.length))
    new = ended & (jnp.arange(count) < width)
    full = jnp.all(finished.there, axis=1) & scoring.stop_when_full  # [B]
    scores = values / (step.astype(jnp.float32) ** scoring.length_penalty)
    scores = scores - OUT * full[:, None] - OUT * ~beams.hopeful[:, None] - OUT * ~new
    candidates = Finished(tokens, scores, jnp.full_like(token, step), new)
    merged = Finished(
        *(jnp.concatenate(pair, axis=1) for pair in zip(finished, candidates, strict=True))
    )
    best = jax.lax.top_k(merged.scores, width)[1]
    finished = Finished(*(_pick(part, best) for part in merged))

    # Can a running one still become better than the worst finished one?
    ahead = scoring.look_ahead & (scoring.length_penalty > 0)
    length = jnp.where(ahead, state.limit, step).astype(jnp.float32)
    possible = running[:, :1] / length**scoring.length_penalty
    worst = jnp.min(finished.scores, axis=1, keepdims=True)
    worst = jnp.where(finished.there, worst, -OUT)
    hopeful = beams.hopeful & jnp.any(possible > worst, axis=1)
    done = jnp.all(finished.there) & scoring.stop_when_full
    return Beams(
        new_state,
        running,
        rows,
        _pick(stop, at),
        finished,
        hopeful,
        jnp.any(hopeful) & ~done & ~jnp.all(ended),
        beams.cache,
    )


@partial(jax.jit, static_argnames=("model", "num_beams", "capacity"))
def beam_search(
    model: Any,
    variables: Variables,
    prompt: Prompt,
    controls: Controls,
    scoring: Scoring,
    limit: Array,
    stop: Array,
    *,
    num_beams: int,
    capacity: int,
) -> Finished:
    """The best K finished hypotheses of each prompt.

    Args:
        model, variables: the model.
        prompt: B prompts.
        controls: how hypotheses are continued; they are drawn where there is a key.
        scoring: how they are ranked.
        limit: int32 [], new tokens there may be.
        stop: int32 [B], states of the stop strings' automaton after the prompts.
        num_beams: K.
        capacity: columns there are room for.
    """
    hidden, cache, context = prefill(model, variables, prompt, limit, capacity=capacity)
    cache, context = repeat_rows(cache, context, num_beams)
    logits = jnp.repeat(unembed(model, variables, hidden), num_beams, axis=0)  # [B * K, V]
    batch = prompt.tokens.shape[0]
    state = begin_state(
        jnp.repeat(prompt.tokens, num_beams, axis=0),
        context.padding,
        controls.pad,
        limit,
        capacity=capacity,
        vocab_size=logits.shape[-1],
    )
    shape = (batch, num_beams)
    beams = Beams(
        state,
        # All hypotheses are the same yet: only the first is continued.
        jnp.zeros(shape).at[:, 1:].set(-OUT),
        jnp.arange(batch * num_beams),
        jnp.repeat(stop[:, None], num_beams, axis=1),
        Finished(
            state.tokens.reshape(*shape, -1),
            jnp.full(shape, -OUT),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape, bool),
        ),
        jnp.ones(batch, bool),
        jnp.array(True),
        cache,
    )
    beams = _choose(logits, beams, controls, scoring)

    def step(beams: Beams) -> Beams:
        state = beams.state
        cache = take_rows(beams.cache, beams.parents)
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)
        hidden, cache = forward(model, variables, last, cache, context)
        logits = unembed(model, variables, hidden[:, -1])
        return _choose(logits, beams._replace(cache=cache), controls, scoring)

    return while_decoding(lambda beams: beams.go_on, step, beams).finished
