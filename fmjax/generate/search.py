"""Greedy search and sampling: one token a row and step, the whole loop on the device."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.generate.forward import (
    Context,
    Prompt,
    forward,
    prefill,
    repeat_rows,
    unembed,
    while_decoding,
)
from fmjax.generate.sampling import draw, untempered
from fmjax.generate.state import (
    Controls,
    State,
    advance_stop,
    begin_state,
    is_end,
    process,
)
from fmjax.types import PyTree, Variables


class Carry(NamedTuple):
    """What goes round the loop.

    Args:
        state: the texts so far.
        cache: keys and values of all but the last token.
        finished: bool [B].
        lengths: int32 [B], new tokens of each row, its end included.
        stop: int32 [B], states of the stop strings' automaton.
        logits: float32 [N, B, V] of each step as the model gave them, where they are kept.
        scores: the same after the processors.
        log_probs: float32 [B, N] of the chosen tokens, after all processors but temperature, where
            they are kept.
    """

    state: State
    cache: PyTree
    finished: Array
    lengths: Array
    stop: Array
    logits: Array | None
    scores: Array | None
    log_probs: Array | None


def append_token(
    state: State, finished: Array, lengths: Array, stop: Array, token: Array, controls: Controls
) -> tuple[State, Array, Array, Array]:
    """One more token a row, which may end it: (state, finished, lengths, stop)."""
    token = jnp.where(finished, controls.pad, token)
    stop, stopped = advance_stop(controls.stop, stop, token)
    lengths = lengths + ~finished
    finished = finished | is_end(token, controls) | stopped
    return state.append(token), finished, lengths, stop


def _choose(logits: Array, carry: Carry, controls: Controls) -> Carry:
    """Takes or draws the next token from logits [B, V]."""
    state = carry.state
    scores = process(logits, state, controls)
    if controls.rng is None:
        token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    else:
        token = draw(scores, jax.random.fold_in(controls.rng, state.step))

    def store(kept: Array | None, new: Array) -> Array | None:
        if kept is None:
            return None
        return jax.lax.dynamic_update_slice(kept, new[None], (state.step, 0, 0))

    kept = store(carry.logits, logits), store(carry.scores, scores)
    log_probs = carry.log_probs
    if log_probs is not None:
        whole = jax.nn.log_softmax(untempered(scores, controls.processors), axis=-1)
        chosen = jnp.take_along_axis(whole, token[:, None], axis=1)  # [B, 1]
        log_probs = jax.lax.dynamic_update_slice(log_probs, chosen, (0, state.step))
    state, finished, lengths, stop = append_token(
        state, carry.finished, carry.lengths, carry.stop, token, controls
    )
    return Carry(state, carry.cache, finished, lengths, stop, *kept, log_probs)


@partial(
    jax.jit,
    static_argnames=(
        "model", "capacity", "repeats", "keep_logits", "keep_scores", "keep_log_probs",
    ),
)  # fmt: skip
def start(
    model: Any,
    variables: Variables,
    prompt: Prompt,
    controls: Controls,
    limit: Array,
    stop: Array,
    *,
    capacity: int,
    repeats: int = 1,
    keep_logits: bool = False,
    keep_scores: bool = False,
    keep_log_probs: bool = False,
) -> tuple[Carry, Context]:
    """Runs the prompts and chooses the first token.

    Args:
        model, variables: the model.
        prompt: B prompts.
        controls: how tokens are chosen.
        limit: int32 [], new tokens there may be.
        stop: int32 [B], states of the stop strings' automaton after the prompts.
        capacity: columns there are room for.
        repeats: texts per prompt: B becomes B * repeats.
        keep_logits, keep_scores, keep_log_probs: whether each step's are kept.
    """
    hidden, cache, context = prefill(model, variables, prompt, limit, capacity=capacity)
    cache, context = repeat_rows(cache, context, repeats)
    logits = jnp.repeat(unembed(model, variables, hidden), repeats, axis=0)  # [B, V]
    tokens = jnp.repeat(prompt.tokens, repeats, axis=0)
    batch, vocab_size = logits.shape
    # A copy: the carry is given away to the loop, the context is not.
    padding = jnp.copy(context.padding)
    state = begin_state(
        tokens, padding, controls.pad, limit, capacity=capacity, vocab_size=vocab_size
    )
    room = (capacity - prompt.tokens.shape[1], batch, vocab_size)
    carry = Carry(
        state,
        cache,
        jnp.zeros(batch, bool),
        jnp.zeros(batch, jnp.int32),
        jnp.repeat(stop, repeats),
        jnp.zeros(room) if keep_logits else None,
        jnp.zeros(room) if keep_scores else None,
        jnp.zeros((batch, room[0])) if keep_log_probs else None,
    )
    return _choose(logits, carry, controls), context


@partial(jax.jit, static_argnames=("model",), donate_argnames=("carry",))
def go_on(
    model: Any,
    variables: Variables,
    carry: Carry,
    context: Context,
    controls: Controls,
    until: Array,
) -> Carry:
    """Chooses tokens until there are `until` new ones, or all rows have ended."""

    def unfinished(carry: Carry) -> Array:
        step, limit = carry.state.step, carry.state.limit
        return (step < jnp.minimum(until, limit)) & ~jnp.all(carry.finished)

    def step(carry: Carry) -> Carry:
        state = carry.state
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)  # [B, 1]
        hidden, cache = forward(model, variables, last, carry.cache, context)
        logits = unembed(model, variables, hidden[:, -1])  # [B, V]
        return _choose(logits, carry._replace(cache=cache), controls)

    return while_decoding(unfinished, step, carry)
