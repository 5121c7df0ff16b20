"""Processors that forbid, force, favour or penalise tokens.

Each is a dataclass of arrays, so that its numbers can change without compiling anew. Tokens that
cannot come get -inf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.generate.state import State

Numbers = Any
"""A number or an array: traced where the processor is an argument of a compiled function."""


def static() -> Any:
    """A field that is compiled in."""
    return dataclasses.field(metadata={"static": True})


def token_mask(tokens: Collection[int], vocab_size: int) -> np.ndarray:
    """bool [V]: the given tokens."""
    mask = np.zeros(vocab_size, bool)
    mask[list(tokens)] = True
    return mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Tokens that have occurred get less likely (Keskar et al. 2019, arXiv:1909.05858, sec. 4.1).

    Args:
        penalty: divides positive and multiplies negative logits.
    """

    penalty: Numbers

    def __call__(self, logits: Array, state: State) -> Array:
        return jnp.where(state.counts > 0, _penalised(logits, self.penalty), logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderRepetitionPenalty:
    """Tokens of the encoder's text get more likely.

    Args:
        penalty: above 1 favours them.
        seen: bool [B, V], tokens of each text.
    """

    penalty: Numbers
    seen: Numbers

    def __call__(self, logits: Array, state: State) -> Array:
        seen = jnp.repeat(self.seen, logits.shape[0] // self.seen.shape[0], axis=0)
        return jnp.where(seen, _penalised(logits, 1.0 / self.penalty), logits)


def _penalised(logits: Array, penalty: Numbers) -> Array:
    return jnp.where(logits < 0, logits * penalty, logits / penalty)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoRepeatNgrams:
    """No n-gram occurs twice.

    Args:
        size: n.
    """

    size: int = static()

    def __call__(self, logits: Array, state: State) -> Array:
        return _ban_ngrams(logits, state, state.tokens, state.mask, self.size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoEncoderNgrams:
    """No n-gram of the encoder's text occurs.

    Args:
        tokens: int32 [B, S], the texts.
        mask: bool [B, S], without padding.
        size: n.
    """

    tokens: Numbers
    mask: Numbers
    size: int = static()

    def __call__(self, logits: Array, state: State) -> Array:
        times = logits.shape[0] // self.tokens.shape[0]
        tokens, mask = (jnp.repeat(x, times, axis=0) for x in (self.tokens, self.mask))
        return _ban_ngrams(logits, state, tokens, mask, self.size)


def _ban_ngrams(logits: Array, state: State, tokens: Array, mask: Array, size: int) -> Array:
    """-inf where a token would complete an n-gram that is in `tokens` [B, S]."""
    windows = tokens.shape[1] - size + 1
    if windows < 1:
        return logits
    match = mask[:, size - 1 :] & mask[:, :windows]  # [B, windows]; texts have no holes
    for i in range(size - 1):
        column = state.length - (size - 1) + i
        last = jax.lax.dynamic_slice_in_dim(state.tokens, column, 1, axis=1)  # [B, 1]
        match &= (tokens[:, i : i + windows] == last) & (column >= state.padding[:, None])
    rows = jnp.arange(tokens.shape[0])[:, None]
    banned = jnp.zeros(logits.shape, bool).at[rows, tokens[:, size - 1 :]].max(match)
    return jnp.where(banned, -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceBias:
    """Adds to the logit of a token that would complete a sequence; -inf forbids it.

    Args:
        single: float32 [V], for sequences of one token.
        prefixes: int32 [N, M], all but the last token of the others, on the right; -1 before.
        last: int32 [N].
        bias: float32 [N].
    """

    single: Numbers
    prefixes: Numbers
    last: Numbers
    bias: Numbers

    @classmethod
    def of(cls, biases: Sequence[tuple[Sequence[int], float]], vocab_size: int) -> SequenceBias:
        """From (sequence, bias) pairs; of equal sequences the last one counts."""
        table = {tuple(tokens): bias for tokens, bias in biases}
        single = np.zeros(vocab_size, np.float32)
        longer = {}
        for tokens, bias in table.items():
            if len(tokens) == 1:
                single[tokens[0]] = bias
            else:
                longer[tokens] = bias
        width = max((len(tokens) - 1 for tokens in longer), default=0)
        prefixes = np.full((len(longer), width), -1, np.int32)
        for row, tokens in zip(prefixes, longer, strict=True):
            row[width - len(tokens) + 1 :] = tokens[:-1]
        last = np.array([tokens[-1] for tokens in longer], np.int32)
        return cls(single, prefixes, last, np.array(list(longer.values()), np.float32))

    def __call__(self, logits: Array, state: State) -> Array:
        logits = logits + self.single
        count, width = self.prefixes.shape
        if count == 0:
            return logits
        match = jnp.ones((logits.shape[0], count), bool)  # [B, N]
        for i in range(width):
            wanted = self.prefixes[:, i]  # [N]
            column = state.length - width + i
            token = jax.lax.dynamic_slice_in_dim(state.tokens, column, 1, axis=1)  # [B, 1]
            there = (token == wanted) & (column >= state.padding[:, None])
            match &= there | (wanted < 0)
        return logits.at[:, self.last].add(jnp.where(match, self.bias, 0.0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SuppressTokens:
    """Tokens that never come.

    Args:
        tokens: bool [V].
    """

    tokens: Numbers

    def __call__(self, logits: Array, state: State) -> Array:
        return jnp.where(self.tokens, -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SuppressAt:
    """Tokens that do not come as one of the new tokens.

    Args:
        tokens: bool [V].
        step: which; 0 is the first.
    """

    tokens: Numbers
    step: Numbers

    def __call__(self, logits: Array, state: State) -> Array:
        return jnp.where((state.step == self.step) & self.tokens, -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinNewTokens:
    """No end before so many new tokens.

    Args:
        count: how many.
        eos: bool [V], the end tokens.
    """

    count: Numbers
    eos: Numbers

    def __call__(self, logits: Array, state: State) -> Array:
        return jnp.where((state.step < self.count) & self.eos, -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForceAt:
    """Only the given tokens come as one of the new tokens.

    Args:
        tokens: bool [V].
        step: which; 0 is the first, -1 the last there may be.
    """

    tokens: Numbers
    step: Numbers

    def __call__(self, logits: Array, state: State) -> Array:
        at = jnp.where(jnp.asarray(self.step) < 0, state.limit + self.step, self.step)
        forced = jnp.where(self.tokens, 0.0, -jnp.inf)
        return jnp.where(state.step == at, forced, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExponentialDecay:
    """The end gets exponentially more likely with length.

    Args:
        start: new tokens before it begins.
        factor: of each token after.
        eos: bool [V], the end tokens.
    """

    start: Numbers
    factor: Numbers
    eos: Numbers

    def __call__(self, logits: Array, state: State) -> Array:
        over = state.step - self.start
        rise = jnp.abs(logits) * (jnp.asarray(self.factor, jnp.float32) ** over - 1)
        now = (over > 0) & self.eos & jnp.isfinite(logits)
        return jnp.where(now, logits + rise, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RemoveInvalid:
    """nan becomes 0, infinities the largest finite numbers."""

    def __call__(self, logits: Array, state: State) -> Array:
        return jnp.nan_to_num(logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normalize:
    """Logits become log-probabilities."""

    def __call__(self, logits: Array, state: State) -> Array:
        return jax.nn.log_softmax(logits, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TimestampRules:
    """Whisper's grammar of times (Radford et al. 2022, arXiv:2212.04356, section 2.3): a text opens
    and closes with times, which come in pairs between texts and never run back; and a time comes
    where all times together are likelier than any one token of text.

    Args:
        begin: the token of time 0; those after it are later times, those before it text.
        none: the token that says that a text has no times, which cannot come.
        eos: the first token that is no text; those from it to `begin` may follow a closing time.
        first: how many steps after 0 the first time may be; at least the vocabulary's size for no
            limit.
    """

    begin: Numbers
    none: Numbers
    eos: Numbers
    first: Numbers

    def __call__(self, logits: Array, state: State) -> Array:
        token = jnp.arange(logits.shape[1])[None]  # [1, V]
        is_time = token >= self.begin

        def new_column(back: int) -> Array:  # [B, 1]
            column = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - back, 1, axis=1)
            return column >= self.begin

        last = (state.step >= 1) & new_column(1)
        before = (state.step < 2) | new_column(2)
        columns = jnp.arange(state.tokens.shape[1])
        new = (columns >= state.length - state.step) & (columns < state.length)
        latest = jnp.max(
            jnp.where(new & (state.tokens >= self.begin), state.tokens, -1), axis=1, keepdims=True
        )  # [B, 1]; times never run back
        # A time that closes a text may open the next one, nothing else may repeat it.
        least = jnp.where(last & ~before, latest, latest + 1)
        banned = (token == self.none) | (is_time & (latest >= 0) & (token < least))
        banned |= last & jnp.where(before, is_time, token < self.eos)
        opening = ~is_time | (token > self.begin + self.first)
        banned |= (state.step == 0) & opening
        logits = jnp.where(banned, -jnp.inf, logits)
        times = jax.nn.logsumexp(jnp.where(is_time, logits, -jnp.inf), axis=1, keepdims=True)
        text = jnp.max(jnp.where(is_time, -jnp.inf, logits), axis=1, keepdims=True)
        return jnp.where((times > text) & ~is_time, -jnp.inf, logits)
