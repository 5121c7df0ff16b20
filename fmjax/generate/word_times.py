"""When words are said: by where a decoder looks while it writes them down.

Some heads of its attention to the sound follow it in time. Their weights, smoothed, are aligned
with the tokens by dynamic time warping (Radford et al. 2022's program, "word-level timestamps";
Sakoe & Chiba 1978, "Dynamic programming algorithm optimization for spoken word recognition").
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.generate.speech_config import SECONDS
from fmjax.types import Variables

BEFORE = "\"'“¡¿([{-"
"""Signs that belong to the word behind them."""
BEHIND = "\"'.\u3002,\uff0c!\uff01?\uff1f:\uff1a”)]}\u3001"  # the wide ones, too
"""Signs that belong to the word before them."""
WITHOUT_SPACES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
"""Languages whose words have no spaces between them: each character is one."""


@partial(jax.jit, static_argnames=("model", "heads"))
def _looks(
    model: Any,
    variables: Variables,
    states: Array,
    ids: Array | np.ndarray,
    heads: tuple[tuple[int, int], ...],
) -> Array:
    """Weights float32 [B, A, T, S] of some heads' attention to the encoder's states."""
    out = model.apply(
        variables, encoder_outputs=states, decoder_input_ids=ids, output_attentions=True,
        output_logits=False,
    )  # fmt: skip
    return jnp.stack([out.cross_attentions[layer][:, head] for layer, head in heads], axis=1)


def attention_to_sound(
    model: Any,
    variables: Variables,
    states: Array,
    prompt: Sequence[int],
    tokens: Sequence[int],
    heads: tuple[tuple[int, int], ...],
) -> np.ndarray:
    """Weights float32 [A, N, S] of each of N tokens behind a prompt.

    Args:
        model: an encoder-decoder.
        variables: its variables.
        states: [1, S, D], the encoder's.
        prompt: what the text begins with.
        tokens: N, the text.
        heads: A pairs of a layer and a head.
    """
    ids = [*prompt, *tokens]
    # A causal decoder's weights do not depend on what follows: few lengths are compiled.
    room = min(-(-len(ids) // 16) * 16, model.side_positions[1])
    padded = np.array([ids + ids[-1:] * (room - len(ids))], np.int32)
    weights = np.asarray(_looks(model, variables, states, padded, heads))
    return weights[0, :, len(prompt) : len(ids)]


def median_filtered(values: np.ndarray, width: int) -> np.ndarray:
    """The median of so many neighbours along the last axis, mirrored at its ends; as they are
    where there are fewer."""
    half = width // 2
    if values.shape[-1] <= half:
        return values
    around = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(half, half)], mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(around, width, axis=-1), axis=-1)


def warped(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest way through costs [N, S] from the first corner to the last, a step along one
    axis or both at a time: (the rows, the columns) that it passes.

    Of equal ways to a place the one along the row is taken, then along the column.
    """
    rows, columns = costs.shape
    total = np.full((rows + 1, columns + 1), np.inf, np.float32)
    total[0, 0] = 0
    taken = np.full((rows + 1, columns + 1), 2, np.int8)  # 0: both, 1: a row, 2: a column
    taken[:, 0] = 1
    for diagonal in range(2, rows + columns + 1):  # whose places do not depend on each other
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        both, row, column = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        step = np.where((both < row) & (both < column), 0, 2)
        step = np.where((row < both) & (row < column), 1, step)
        least = np.choose(step, [both, row, column])
        total[i, j], taken[i, j] = costs[i - 1, j - 1] + least, step
    i, j, path = rows, columns, []
    while i > 0 or j > 0:
        path.append((i - 1, j - 1))
        step = taken[i, j]
        i, j = i - (step != 2), j - (step != 1)
    found = np.array(path[::-1])
    return found[:, 0], found[:, 1]


def token_times(weights: np.ndarray, width: int) -> np.ndarray:
    """When each token ends, float64 [N] seconds from the window's start.

    Args:
        weights: float32 [A, N, S] of heads that follow the sound, S steps of 0.02 s each.
        width: of the median filter.
    """
    if not weights.shape[1]:
        return np.zeros(0)
    mean, spread = weights.mean(axis=1, keepdims=True), weights.std(axis=1, keepdims=True)
    even = (weights - mean) / np.where(spread > 0, spread, 1)
    matrix = median_filtered(even, width).mean(axis=0)
    rows, columns = warped(-matrix.astype(np.float64))
    first = np.concatenate([[True], rows[1:] != rows[:-1]])
    return columns[first] * SECONDS


class Word(NamedTuple):
    """Some tokens that are a word.

    Args:
        text: with the space before it.
        first, last: the numbers of its first and its last token.
    """

    text: str
    first: int
    last: int


def words_of(
    tokens: Sequence[int], decode: Callable[[list[int]], str], *, spaces: bool = True
) -> list[Word]:
    """Tokens of a text as words: they begin with a space, and have their punctuation.

    Args:
        tokens: of text alone.
        decode: tokens to text, spaces as they are.
        spaces: whether the language has spaces between words; if not, each character is one.
    """
    words: list[Word] = []
    for piece in _characters(tokens, decode):
        joins = not (
            not spaces or piece.text.startswith(" ") or piece.text.strip() in string.punctuation
        )
        if words and joins:
            words[-1] = Word(words[-1].text + piece.text, words[-1].first, piece.last)
        else:
            words.append(piece)
    return _with_signs(words)


def _characters(tokens: Sequence[int], decode: Callable[[list[int]], str]) -> list[Word]:
    """The fewest tokens that are whole characters each time."""
    broken = "\ufffd"
    whole = decode([*tokens])
    pieces, first, before = [], 0, 0
    for last in range(len(tokens)):
        text = decode([*tokens[first : last + 1]])
        place = text.find(broken)
        # A sign for what is broken may be one that the text has.
        if place < 0 or whole[before + place : before + place + 1] == broken:
            pieces.append(Word(text, first, last))
            first, before = last + 1, before + len(text)
    return pieces


def _with_signs(words: list[Word]) -> list[Word]:
    """Signs joined to the words they belong to."""
    behind: list[Word] = []
    for word in reversed(words):
        if behind and word.text.startswith(" ") and word.text.strip() in BEFORE:
            behind[-1] = Word(word.text + behind[-1].text, word.first, behind[-1].last)
        else:
            behind.append(word)
    result: list[Word] = []
    for word in reversed(behind):
        if result and not result[-1].text.endswith(" ") and word.text in BEHIND:
            result[-1] = Word(result[-1].text + word.text, result[-1].first, word.last)
        else:
            result.append(word)
    return result
