"""One search by two scores: a decoder's, and that of CTC on the same encoder (Watanabe et al. 2017,
"Hybrid CTC/attention architecture for end-to-end speech recognition", section IV.C).

A beginning of a text has the probability of all alignments of all texts that begin so: what
strays from the order of the sound, or leaves out some of it, is given up at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.generate.forward import Context, Prompt, forward, prefill, take_rows, unembed
from fmjax.types import PyTree, Variables


class Prefixes(NamedTuple):
    """Beginnings of texts, by their alignments with the first frames.

    Args:
        in_symbol, in_blank: nats [G, T]; of the alignments of frames 0 to t that end in the last
            symbol, or in a blank (gamma there).
        last: int [G], the last symbols; -1 for none.
    """

    in_symbol: np.ndarray
    in_blank: np.ndarray
    last: np.ndarray


def no_prefix(log_probabilities: np.ndarray, blank: int) -> Prefixes:
    """The empty beginning: blanks alone.

    Args:
        log_probabilities: [T, V], nats.
        blank: the number of the blank.
    """
    blanks = np.cumsum(log_probabilities[:, blank], dtype=np.float64)[None]
    return Prefixes(np.full_like(blanks, -np.inf), blanks, np.full(1, -1))


def ended(prefixes: Prefixes) -> np.ndarray:
    """Nats [G]: the texts are these and no more (algorithm 2, lines 2 and 3)."""
    return np.logaddexp(prefixes.in_symbol[:, -1], prefixes.in_blank[:, -1])


def extended(
    log_probabilities: np.ndarray, prefixes: Prefixes, symbols: np.ndarray, blank: int
) -> tuple[np.ndarray, Prefixes]:
    """Every beginning with every one of some symbols behind it (algorithm 2, lines 5 to 14).

    Args:
        log_probabilities: [T, V], nats.
        prefixes: G of them.
        symbols: int [K], none of them the blank.
        blank: the number of the blank.

    Returns:
        (nats [G, K] of all texts that begin so, the G * K longer beginnings).
    """
    scores = np.asarray(log_probabilities, np.float64)
    count, choices = len(prefixes.last), len(symbols)
    of_symbols, of_blank = scores[:, symbols], scores[:, blank]  # [T, K], [T]
    same = prefixes.last[:, None] == symbols  # [G, K]
    both = np.logaddexp(prefixes.in_symbol, prefixes.in_blank)  # [G, T]
    # What the new symbol comes behind: of an equal one a blank lies between.
    before = np.where(same[..., None], prefixes.in_blank[:, None], both[:, None])  # [G, K, T]
    in_symbol = np.full((len(scores), count, choices), -np.inf)
    in_blank = in_symbol.copy()
    in_symbol[0] = np.where(prefixes.last[:, None] < 0, of_symbols[0], -np.inf)
    total = in_symbol[0]
    for time in range(1, len(scores)):
        begun = before[..., time - 1]
        in_symbol[time] = np.logaddexp(in_symbol[time - 1], begun) + of_symbols[time]
        in_blank[time] = np.logaddexp(in_blank[time - 1], in_symbol[time - 1]) + of_blank[time]
        total = np.logaddexp(total, begun + of_symbols[time])
    symbol_rows, blank_rows = (x.reshape(len(scores), -1).T for x in (in_symbol, in_blank))
    return total, Prefixes(symbol_rows, blank_rows, np.tile(symbols, count))


class Hypothesis(NamedTuple):
    """A text that was found.

    Args:
        tokens: without the start and the end.
        score: what it was chosen by.
        ctc, attention: nats of either.
    """

    tokens: tuple[int, ...]
    score: float
    ctc: float
    attention: float


@partial(jax.jit, static_argnames="model")
def _encode(
    model: Any, variables: Variables, inputs: Mapping[str, Array | np.ndarray], start: Array
) -> tuple[Array, Array | None, Array, Array]:
    """(states [B, S, D], their mask, nats of CTC [B, S, V], frames int [B])."""
    out = model.apply(variables, **inputs, decoder_input_ids=start)
    mask = None if out.state_mask is None else out.state_mask.astype(jnp.int32)
    return (
        out.encoder_last_hidden_state,
        mask,
        jax.nn.log_softmax(out.ctc_logits),
        out.logit_lengths,
    )


@partial(jax.jit, static_argnames=("model", "capacity"))
def _begin(
    model: Any, variables: Variables, prompt: Prompt, *, capacity: int
) -> tuple[Array, PyTree, Context]:
    hidden, cache, context = prefill(
        model, variables, prompt, jnp.int32(capacity), capacity=capacity
    )
    return jax.nn.log_softmax(unembed(model, variables, hidden)), cache, context


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _go_on(
    model: Any, variables: Variables, tokens: Array, rows: Array, cache: PyTree, context: Context
) -> tuple[Array, PyTree]:
    cache = take_rows(cache, rows)
    hidden, cache = forward(model, variables, tokens[:, None], cache, context)
    return jax.nn.log_softmax(unembed(model, variables, hidden[:, -1])), cache


def joint_beam(
    model: Any,
    variables: Variables,
    inputs: Mapping[str, Array | np.ndarray],
    *,
    ctc_weight: float = 0.3,
    beams: int = 8,
    max_new_tokens: int | None = None,
    bonus: float = 0.0,
    tried: int | None = None,
    results: int = 1,
) -> list[list[Hypothesis]]:
    """The texts of sounds that are best by both scores, in one pass (equations 41 to 44 there).

    ``ctc_weight`` times CTC's nats and the rest times the decoder's, plus `bonus` for each token.
    With no bonus neither score rises as a text grows, so that the search ends as soon as nothing
    that has not ended can become better.

    Args:
        model: an encoder-decoder whose output has ``ctc_logits``: the head "seq2seq_ctc".
        variables: its variables.
        inputs: of its encoder, B rows: ``input_features`` and perhaps ``attention_mask``.
        ctc_weight: lambda, from 0 to 1.
        beams: beginnings that are kept.
        max_new_tokens: the longest text; None is as many as there are frames, or positions.
        bonus: nats of a token, against too short texts.
        tried: how many tokens are tried behind a beginning, the decoder's likeliest; None is all.
        results: texts of each sound, the best first; there may be fewer.

    Raises:
        ValueError: values out of range, another head, or a config without a blank, start or end.
    """
    config = model.config
    blank, end, start = config.pad_token_id, config.eos_token_id, config.decoder_start_token_id
    problems = []
    if model.head != "seq2seq_ctc":
        problems.append(f"the head is {model.head!r}; it must be 'seq2seq_ctc'")
    if not 0 <= ctc_weight <= 1:
        problems.append(f"ctc_weight={ctc_weight} must be from 0 to 1")
    for name, value in (("beams", beams), ("max_new_tokens", max_new_tokens), ("tried", tried)):
        if value is not None and value < 1:
            problems.append(f"{name}={value} must be at least 1")
    if not 1 <= results <= beams:
        problems.append(f"results={results} must be from 1 to beams={beams}")
    if not bonus >= 0:
        problems.append(f"bonus={bonus} must be at least 0")
    if None in (blank, end, start):
        problems.append(
            f"the config needs pad_token_id (the blank), eos_token_id and decoder_start_token_id; "
            f"they are {blank}, {end} and {start}"
        )
    if problems:
        raise ValueError("joint_beam: " + "; ".join(problems))
    rows = len(next(iter(inputs.values())))
    first = jnp.full((rows, 1), start, jnp.int32)
    encoded = _encode(model, variables, dict(inputs), first)
    states, mask = encoded[:2]
    frames, lengths = np.asarray(encoded[2]), np.asarray(encoded[3])
    # The cache is of the decoder alone, which the other head's is.
    decoder = model.clone(head="seq2seq_lm")
    symbols = np.array([v for v in range(config.vocab_size) if v not in (blank, end, start)])
    search = partial(
        _search, decoder, variables, symbols=symbols, blank=int(blank), end=int(end),
        start=int(start), weight=ctc_weight, beams=beams, most=max_new_tokens, bonus=bonus,
        tried=tried, results=results,
    )  # fmt: skip
    return [
        search(
            states[row : row + 1],
            None if mask is None else mask[row : row + 1],
            frames[row, : lengths[row]],
        )
        for row in range(rows)
    ]


def _search(
    model: Any,
    variables: Variables,
    states: Array,
    mask: Array | None,
    frames: np.ndarray,
    *,
    symbols: np.ndarray,
    blank: int,
    end: int,
    start: int,
    weight: float,
    beams: int,
    most: int | None,
    bonus: float,
    tried: int | None,
    results: int,
) -> list[Hypothesis]:
    """The same of one sound."""
    room = model.side_positions[1] - 1
    limit = min(room, len(frames) if most is None else most)
    prompt = Prompt(
        np.full((beams, 1), start, np.int32),
        np.zeros(beams, np.int32),
        encoder_states=jnp.repeat(states, beams, axis=0),
        encoder_mask=None if mask is None else jnp.repeat(mask, beams, axis=0),
    )
    # Whole multiples, so that few lengths are compiled.
    capacity = min(-(-(limit + 1) // 16) * 16, room + 1)
    decoded, cache, context = _begin(model, variables, prompt, capacity=capacity)
    prefixes = no_prefix(frames, blank)
    texts: list[tuple[int, ...]] = [()]
    by_text, by_sound = np.zeros(1), np.zeros(1)  # nats of what there is
    finished: list[Hypothesis] = []

    def joined(sound: np.ndarray, text: np.ndarray, length: int) -> np.ndarray:
        # 0 times minus infinity is no number.
        return weight * np.where(weight > 0, sound, 0) + (1 - weight) * text + bonus * length

    for length in range(limit + 1):
        scores = np.asarray(decoded, np.float64)[: len(texts)]
        whole, closed = ended(prefixes), by_text + scores[:, end]
        for text, sound, said, score in zip(
            texts, whole, closed, joined(whole, closed, length), strict=True
        ):
            if score > -np.inf:
                finished.append(Hypothesis(text, float(score), float(sound), float(said)))
        finished = sorted(finished, key=lambda found: -found.score)[:results]
        best = joined(by_sound, by_text, length).max() + bonus * (limit - length)
        if length == limit or (len(finished) == results and finished[-1].score >= best):
            break
        chosen = symbols
        if tried is not None and tried < len(symbols):  # by any of the beginnings
            chosen = np.unique(symbols[np.argsort(-scores[:, symbols], axis=1)[:, :tried]])
        sound, longer = extended(frames, prefixes, chosen, blank)
        said = by_text[:, None] + scores[:, chosen]
        total = joined(sound, said, length + 1).reshape(-1)
        kept = np.argsort(-total, kind="stable")[:beams]
        kept = kept[total[kept] > -np.inf]
        if not len(kept):
            break
        parents = kept // len(chosen)
        texts = [
            (*texts[parent], int(chosen[place % len(chosen)]))
            for parent, place in zip(parents, kept, strict=True)
        ]
        by_text, by_sound = said.reshape(-1)[kept], sound.reshape(-1)[kept]
        prefixes = Prefixes(*(part[kept] for part in longer))
        filled = np.zeros((2, beams), np.int32)  # rows beyond those that are kept are computed, too
        filled[:, : len(kept)] = [text[-1] for text in texts], parents
        decoded, cache = _go_on(model, variables, filled[0], filled[1], cache, context)
    return finished
