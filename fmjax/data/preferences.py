"""Responses to prompts, in pairs of which one is preferred or each good or bad, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fmjax.data.columns import IGNORED_LABEL, Columns, Ragged
from fmjax.data.files import raise_problems
from fmjax.data.language import plain_tokens
from fmjax.data.tokens import padding_id, special_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_preferences(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str],
    *,
    max_length: int,
    bos_id: int | None = None,
    eos_id: int | None = None,
    end: bool = True,
    vocab_size: int | None = None,
) -> Columns:
    """Tokenizes prompts and the two responses to each, for preference learning.

    A batch has, for "chosen" and "rejected" each, ``*_input_ids`` and ``*_attention_mask`` int32
    [B, T] (prompt and response) and ``*_labels`` int32 [B, T], -100 outside the response. A prompt
    that is too long loses its beginning: of both sequences as much, so that they stay answers to
    the same prompt.

    Args:
      tokenizer: of `transformers`.
      prompts, chosen, rejected: N texts each; a response follows its prompt as it is, with the
        space between them.
      max_length: tokens of prompt and response.
      bos_id: put before each prompt, if given.
      eos_id: put after each response, by default the tokenizer's end token.
      end: whether anything is put there.
      vocab_size: of the model that is to read them.

    Raises:
      ValueError: numbers that differ, an empty prompt or response, a response that leaves no room
        for a token of the prompt, responses that are the same, or ids outside the vocabulary.
    """
    texts = {"prompt": prompts, "chosen": chosen, "rejected": rejected}
    _check_counts("encode_preferences", texts)
    ends = _ends(tokenizer, bos_id, eos_id, end)
    where = "encode_preferences"
    return Columns(
        _encoded(where, tokenizer, texts, ends, max_length, vocab_size, [], distinct=True)
    )


def encode_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    desirable: Sequence[bool],
    *,
    max_length: int,
    bos_id: int | None = None,
    eos_id: int | None = None,
    end: bool = True,
    vocab_size: int | None = None,
) -> Columns:
    """Tokenizes prompts and one response to each, good or bad, for `fmjax.methods.kto`.

    A batch has, for "completion" and "mismatched" each, what `encode_preferences` gives of "chosen"
    and "rejected", and ``desirable`` int32 [B]. A mismatched sequence is the prompt with the
    response of the next example that has another prompt.

    Args:
      tokenizer: of `transformers`.
      prompts, completions: N texts each; a response follows its prompt as it is.
      desirable: N times, whether the response is good.
      max_length, bos_id, eos_id, end, vocab_size: see `encode_preferences`.

    Raises:
      ValueError: as `encode_preferences`; only one prompt; or what is not true or false.
    """
    texts = {"prompt": prompts, "completion": completions}
    _check_counts("encode_completions", {**texts, "desirable": desirable})
    problems = [
        f"example {n}: desirable is {value!r}, not true or false"
        for n, value in enumerate(desirable)
        if value not in (True, False)
    ]
    others = _next_of_another(prompts)
    if others is None:
        problems.append(
            f"all {len(prompts)} prompts are {prompts[0]!r}; mismatched pairs need at least two"
        )
        others = range(len(prompts))
    texts["mismatched"] = [completions[other] for other in others]
    ends = _ends(tokenizer, bos_id, eos_id, end)
    where = "encode_completions"
    parts = _encoded(where, tokenizer, texts, ends, max_length, vocab_size, problems)
    return Columns(parts, {"desirable": np.asarray(desirable, np.int32)})


def _next_of_another(prompts: Sequence[str]) -> list[int] | None:
    """For each prompt the next place, round the end, of another one; None if all are the same."""
    count = len(prompts)
    start = next((n for n in range(count) if prompts[n] != prompts[n - 1]), None)
    if start is None:
        return None
    found = [0] * count
    following = start
    # Backwards from where a run of the same prompt begins: a run shares its successor.
    for back in range(1, count + 1):
        n = (start - back) % count
        found[n] = following
        if prompts[n] != prompts[n - 1]:
            following = n
    return found


def _check_counts(where: str, rows: Mapping[str, Sequence[object]]) -> None:
    counts = {name: len(values) for name, values in rows.items()}
    if len(set(counts.values())) > 1 or not counts["prompt"]:
        raise ValueError(f"{where}: {counts}; give as many of each, at least one")


def _ends(
    tokenizer: PreTrainedTokenizerBase, bos_id: int | None, eos_id: int | None, end: bool
) -> tuple[list[int], list[int]]:
    """What comes before prompts and after responses."""
    before = [] if bos_id is None else [bos_id]
    return before, [special_id(tokenizer, "eos", eos_id)] if end else []


def _encoded(
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    ends: tuple[list[int], list[int]],
    max_length: int,
    vocab_size: int | None,
    problems: list[str],
    distinct: bool = False,
) -> tuple[Ragged, ...]:
    """The sequences of each kind of response to "prompt"; `problems` and more are raised at once.

    `distinct` are two kinds that must not be the same tokens.
    """
    kinds = [name for name in texts if name != "prompt"]
    before, after = ends
    tokens = {name: plain_tokens(tokenizer, rows) for name, rows in texts.items()}
    room = max_length - len(before) - len(after)
    for n in range(len(texts["prompt"])):
        problems += [
            f"example {n}: the {name} text {texts[name][n]!r} has no token"
            for name in texts
            if not len(tokens[name][n]) and (name != "prompt" or not before)
        ]
        longest = max(len(tokens[kind][n]) for kind in kinds)
        if longest + (not before) > room:
            problems.append(
                f"example {n}: a response of {longest} tokens leaves no room for the prompt in "
                f"max_length={max_length}"
            )
        if distinct and np.array_equal(tokens[kinds[0]][n], tokens[kinds[1]][n]):
            problems.append(f"example {n}: both responses are {texts[kinds[0]][n]!r}")
        ids = np.concatenate([tokens[name][n] for name in texts])
        if vocab_size is not None and len(ids) and ids.max() >= vocab_size:
            problems.append(
                f"example {n}: token {ids.max()} is outside the vocabulary of {vocab_size}"
            )
    raise_problems(where, problems)
    rows: dict[str, dict[str, list[np.ndarray]]] = {
        kind: {f"{kind}_input_ids": [], f"{kind}_labels": []} for kind in kinds
    }
    for prompt, *responses in zip(*tokens.values(), strict=True):
        kept = max(0, room - max(map(len, responses)))
        prompt = np.concatenate([before, prompt[max(0, len(prompt) - kept) :]])
        for kind, response in zip(kinds, responses, strict=True):
            answer = np.concatenate([response, after])
            ignored = np.full(len(prompt), IGNORED_LABEL)
            rows[kind][f"{kind}_input_ids"].append(np.concatenate([prompt, answer]))
            rows[kind][f"{kind}_labels"].append(np.concatenate([ignored, answer]))
    fill = padding_id(tokenizer)
    return tuple(
        Ragged.of(
            rows[kind],
            max_length=max_length,
            fill={f"{kind}_labels": IGNORED_LABEL, f"{kind}_input_ids": fill},
            mask=f"{kind}_attention_mask",
        )
        for kind in kinds
    )
