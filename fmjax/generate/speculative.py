"""Speculative decoding: a small model drafts, the large one checks all drafts in one pass.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"
(arXiv:2211.17192), algorithm 1: what comes out is distributed exactly as if the large model had
drawn every token; taking the most likely tokens, it is the same text.

Rows of a batch advance together, by as many tokens as the row with the fewest accepted ones. A row
that accepted more goes on with the draft token at that place, which is as good a draw; its later
drafts are forgotten, and since the others' luck decides on that, no row's distribution changes.
"""

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
    rewind,
    unembed,
    while_decoding,
)
from fmjax.generate.sampling import draw
from fmjax.generate.search import Carry, append_token
from fmjax.generate.state import Controls, State, process
from fmjax.types import PyTree, Variables


class Speculation(NamedTuple):
    """What goes round the loop.

    Args:
        carry: of the large model, as `fmjax.generate.search` has it, without its cache.
        cache: of both models; what the small one's holds is right up to the last token but one.
        rounds: int32 [], passes of the large model.
        drafted: int32 [], tokens proposed for rows that had not ended.
        accepted: int32 [], those of them that are in the texts.
    """

    carry: Carry
    cache: dict[str, PyTree]
    rounds: Array
    drafted: Array
    accepted: Array


class Draft(NamedTuple):
    """One proposed token a row.

    Args:
        token: int32 [B].
        probabilities: float32 [B, V] it was drawn from; unused where none are drawn.
    """

    token: Array
    probabilities: Array


@partial(jax.jit, static_argnames=("model", "capacity", "repeats"))
def start_draft(
    model: Any,
    variables: Variables,
    prompt: Prompt,
    limit: Array,
    *,
    capacity: int,
    repeats: int = 1,
) -> tuple[PyTree, Context]:
    """The small model's cache after the prompts; see `fmjax.generate.search.start`."""
    _, cache, context = prefill(model, variables, prompt, limit, capacity=capacity)
    return repeat_rows(cache, context, repeats)


@partial(
    jax.jit,
    static_argnames=("model", "draft_model", "count"),
    donate_argnames=("carry", "draft_cache"),
)
def speculate(
    model: Any,
    variables: Variables,
    draft_model: Any,
    draft_variables: Variables,
    carry: Carry,
    context: Context,
    draft_cache: PyTree,
    draft_context: Context,
    controls: Controls,
    *,
    count: int,
) -> Speculation:
    """Chooses tokens until the limit, or until all rows have ended.

    Args:
        model, variables: the large model.
        draft_model, draft_variables: the small one.
        carry, context: of the large model, from `fmjax.generate.search.start`.
        draft_cache, draft_context: of the small one, from `start_draft`.
        controls: how tokens are chosen, by both.
        count: tokens proposed at a time; caches have so many columns to spare.
    """

    def unfinished(loop: Speculation) -> Array:
        state = loop.carry.state
        return (state.step < state.limit) & ~jnp.all(loop.carry.finished)

    def step(loop: Speculation) -> Speculation:
        carry, state = loop.carry, loop.carry.state
        key = None
        if controls.rng is not None:
            # The first token used fold_in(rng, 0); rounds count on from there.
            key = jax.random.fold_in(controls.rng, loop.rounds + 1)
        drafts, small = _propose(
            draft_model, draft_variables, state, loop.cache["small"], draft_context, controls, key,
            count,
        )  # fmt: skip
        scores, large = _check(
            model, variables, state, loop.cache["large"], context, controls, drafts
        )
        token, agreed = _accept(scores, drafts, carry.finished, key)
        carry, kept = _append(carry, drafts.token, token, agreed, controls)
        alive = jnp.sum(~loop.carry.finished)
        return Speculation(
            carry,
            {"large": large, "small": small},
            loop.rounds + 1,
            loop.drafted + count * alive,
            loop.accepted + kept,
        )

    zero = jnp.zeros((), jnp.int32)
    caches = {"large": carry.cache, "small": draft_cache}
    begin = Speculation(carry._replace(cache=None), caches, zero, zero, zero)
    return while_decoding(unfinished, step, begin)


def _propose(
    model: Any,
    variables: Variables,
    state: State,
    cache: PyTree,
    context: Context,
    controls: Controls,
    key: Array | None,
    count: int,
) -> tuple[Draft, PyTree]:
    """`count` tokens a row from the small model: (drafts [count, B, ...], its cache)."""

    def choose(state: State, logits: Array, i: Array | int) -> tuple[State, Draft]:
        scores = process(logits, state, controls)
        if key is None:
            token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        else:
            token = draw(scores, jax.random.fold_in(key, i))
        return state.append(token), Draft(token, jax.nn.softmax(scores, axis=-1))

    # The last token but one again: the cache lacks it where all drafts were accepted.
    cache = rewind(cache, state.length - 2)
    last = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 2, 2, axis=1)  # [B, 2]
    hidden, cache = forward(model, variables, last, cache, context)
    state, first = choose(state, unembed(model, variables, hidden[:, -1]), 0)

    def another(loop: tuple[State, PyTree, Array], i: Array) -> tuple[Any, Draft]:
        state, cache, token = loop
        hidden, cache = forward(model, variables, token[:, None], cache, context)
        state, new = choose(state, unembed(model, variables, hidden[:, -1]), i)
        return (state, cache, new.token), new

    (_, cache, _), others = jax.lax.scan(another, (state, cache, first.token), jnp.arange(1, count))
    drafts = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, others)
    return drafts, cache


def _check(
    model: Any,
    variables: Variables,
    state: State,
    cache: PyTree,
    context: Context,
    controls: Controls,
    drafts: Draft,
) -> tuple[Array, PyTree]:
    """The large model's scores of the token after each draft: [count + 1, B, V], and its cache."""
    last = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)
    tokens = jnp.concatenate([last, drafts.token.T], axis=1)  # [B, count + 1]
    cache = rewind(cache, state.length - 1)
    hidden, cache = forward(model, variables, tokens, cache, context)
    logits = unembed(model, variables, hidden)  # [B, count + 1, V]

    def scored(state: State, at: tuple[Array, Array]) -> tuple[State, Array]:
        logits, token = at
        return state.append(token), process(logits, state, controls)

    after = jnp.concatenate([drafts.token, drafts.token[-1:]])  # the last one follows nothing
    _, scores = jax.lax.scan(scored, state, (jnp.moveaxis(logits, 1, 0), after))
    return scores, cache


def _accept(
    scores: Array, drafts: Draft, finished: Array, key: Array | None
) -> tuple[Array, Array]:
    """(int32 [B], the token after the accepted drafts; int32 [], how many are accepted).

    Args:
        scores: [n + 1, B, V], of the large model.
        drafts: [n, B, ...].
        finished: bool [B], rows whose drafts do not matter.
        key: of the draws; None takes the largest.
    """
    count = drafts.token.shape[0]
    if key is None:
        best = jnp.argmax(scores, axis=-1).astype(jnp.int32)  # [n + 1, B]
        right = best[:count] == drafts.token
        agreed = _fewest(right, finished)
        return best[agreed], agreed
    target = jax.nn.softmax(scores, axis=-1)  # p of the paper; the drafts' are q
    at = drafts.token[:, :, None]
    p = jnp.take_along_axis(target[:count], at, axis=2)[:, :, 0]  # [n, B]
    q = jnp.take_along_axis(drafts.probabilities, at, axis=2)[:, :, 0]
    accept_key, draw_key = jax.random.split(jax.random.fold_in(key, count))
    # u < p / q, and never where p is 0.
    right = jax.random.uniform(accept_key, p.shape) * q < p
    agreed = _fewest(right, finished)
    # Where there is no draft, q is 0 and the rest is p itself.
    none = jnp.zeros_like(drafts.probabilities[:1])
    proposed = jnp.concatenate([drafts.probabilities, none])[agreed]  # [B, V]
    rest = jnp.maximum(target[agreed] - proposed, 0.0)
    # Of equal distributions nothing is left; a rejection by rounding then draws from p.
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, target[agreed])
    drawn = draw(jnp.log(rest), draw_key)
    at_end = agreed == count
    accepted_here = ~at_end & right[jnp.minimum(agreed, count - 1)]
    return jnp.where(accepted_here, drafts.token[jnp.minimum(agreed, count - 1)], drawn), agreed


def _fewest(right: Array, finished: Array) -> Array:
    """int32 []: drafts that all rows accept one after the other, of bool [n, B]."""
    together = jnp.all(right | finished, axis=1)
    return jnp.sum(jnp.cumprod(together.astype(jnp.int32)))


def _append(
    carry: Carry, drafts: Array, token: Array, agreed: Array, controls: Controls
) -> tuple[Carry, Array]:
    """The carry with the accepted drafts and the token after them; and how many drafts that is."""
    limit = carry.state.limit
    tokens = jnp.concatenate([drafts, drafts[-1:]])  # [n + 1, B]

    def unfinished(loop: tuple[Array, Carry, Array]) -> Array:
        i, carry, _ = loop
        return (i <= agreed) & (carry.state.step < limit)

    def append(loop: tuple[Array, Carry, Array]) -> tuple[Array, Carry, Array]:
        i, carry, kept = loop
        new = jnp.where(i < agreed, tokens[i], token)
        kept = kept + jnp.where(i < agreed, jnp.sum(~carry.finished), 0)
        state, finished, lengths, stop = append_token(
            carry.state, carry.finished, carry.lengths, carry.stop, new, controls
        )
        carry = carry._replace(state=state, finished=finished, lengths=lengths, stop=stop)
        return i + 1, carry, kept

    zero = jnp.zeros((), jnp.int32)
    _, carry, kept = jax.lax.while_loop(unfinished, append, (zero, carry, zero))
    return carry, kept
