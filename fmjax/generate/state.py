"""The words of generation: what was said so far, and what to say next by."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class State(NamedTuple):
    """The texts so far, which processors read.

    A column is written in all rows at the same time: prompts are padded on the left.

    Args:
        tokens: int32 [B, S]; padding, prompt, new tokens, and columns not yet written.
        padding: int32 [B], the columns before each row's first token.
        counts: int32 [B, V], how often each token is in the row, prompt included.
        length: int32 [], columns written.
        step: int32 [], new tokens among them.
        limit: int32 [], new tokens there may be.
    """

    tokens: Array
    padding: Array
    counts: Array
    length: Array
    step: Array
    limit: Array

    @property
    def mask(self) -> Array:
        """bool [B, S]: the columns that hold a row's tokens."""
        column = jnp.arange(self.tokens.shape[1])
        return (column >= self.padding[:, None]) & (column < self.length)

    def append(self, token: Array) -> State:
        """The state with one more token a row, int32 [B]."""
        tokens = jax.lax.dynamic_update_slice(self.tokens, token[:, None], (0, self.length))
        rows = jnp.arange(token.shape[0])
        return self._replace(
            tokens=tokens,
            counts=self.counts.at[rows, token].add(1),
            length=self.length + 1,
            step=self.step + 1,
        )


class Processor(Protocol):
    """``(logits float32 [B, V], state) -> logits``: a pure function that changes what is likely.

    A plain function is compiled in, once for each function object; one that carries numbers
    (a `jax.tree_util.Partial`, a registered dataclass) is compiled once for all their values.
    """

    def __call__(self, logits: Array, state: State) -> Array: ...


class StopTable(NamedTuple):
    """The automaton that finds stop strings (see `fmjax.generate.stop_strings`).

    Args:
        next: int32 [M, V], the state after each token; negative, -1 - state, where the token
            completes a stop string.
    """

    next: Array | np.ndarray


class Controls(NamedTuple):
    """What the choice of tokens reads beside logits and state; all traced, nothing recompiles.

    Args:
        processors: applied in this order.
        eos: int32 [E], tokens that end a row; E may be 0.
        pad: int32 [], what ended rows are continued with.
        stop: for stop strings, or None.
        rng: key of the draws; None takes the largest logit.
    """

    processors: tuple[Processor, ...]
    eos: Array | np.ndarray
    pad: Array | np.ndarray
    stop: StopTable | None
    rng: Array | None


def begin_state(
    prompt: Array,
    padding: Array,
    pad: Array | np.ndarray,
    limit: Array,
    *,
    capacity: int,
    vocab_size: int,
) -> State:
    """The state of prompts [B, P], with room for `capacity` columns."""
    batch, length = prompt.shape
    tokens = jnp.full((batch, capacity), pad, jnp.int32)
    tokens = jax.lax.dynamic_update_slice(tokens, prompt.astype(jnp.int32), (0, 0))
    real = jnp.arange(length) >= padding[:, None]  # [B, P]
    rows = jnp.arange(batch)[:, None]
    counts = jnp.zeros((batch, vocab_size), jnp.int32).at[rows, prompt].add(real.astype(jnp.int32))
    zero = jnp.zeros((), jnp.int32)
    return State(tokens, padding, counts, zero + length, zero, limit)


def process(logits: Array, state: State, controls: Controls) -> Array:
    """Logits [B, V] after all processors.

    Raises:
        ValueError: a processor that returns another shape, whose columns are not the vocabulary's.
    """
    for processor in controls.processors:
        processed = processor(logits, state)
        if processed.shape != logits.shape:
            raise ValueError(
                f"the processor {processor} makes {processed.shape} of logits {logits.shape}; it "
                "must keep the shape [B, V]"
            )
        logits = processed
    return logits


def is_end(token: Array, controls: Controls) -> Array:
    """bool, of the tokens' shape: whether they end a text."""
    return jnp.any(token[..., None] == controls.eos, axis=-1)


def advance_stop(stop: StopTable | None, at: Array, token: Array) -> tuple[Array, Array | bool]:
    """(the automaton's states after the tokens, whether they complete a stop string)."""
    if stop is None:
        return at, False
    after = jnp.asarray(stop.next)[at, token]
    hit = after < 0
    return jnp.where(hit, -1 - after, after), hit
