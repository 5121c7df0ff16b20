"""Pairs of responses to a prompt, one preferred, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fmjax.data.columns import IGNORED_LABEL, Columns, Ragged
from fmjax.data.files import raise_problems
from fmjax.data.language import plain_tokens
from fmjax.data.tokens import padding_id, special_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("chosen", "rejected")


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
    counts = {name: len(rows) for name, rows in texts.items()}
    if len(set(counts.values())) > 1 or not counts["prompt"]:
        raise ValueError(f"encode_preferences: {counts}; give as many of each, at least one")
    tokens = {name: plain_tokens(tokenizer, rows) for name, rows in texts.items()}
    before = [] if bos_id is None else [bos_id]
    after = [special_id(tokenizer, "eos", eos_id)] if end else []
    room = max_length - len(before) - len(after)
    problems = []
    for n in range(counts["prompt"]):
        problems += [
            f"example {n}: the {name} text {texts[name][n]!r} has no token"
            for name in texts
            if not len(tokens[name][n]) and (name != "prompt" or not before)
        ]
        longest = max(len(tokens[kind][n]) for kind in KINDS)
        if longest + (not before) > room:
            problems.append(
                f"example {n}: a response of {longest} tokens leaves no room for the prompt in "
                f"max_length={max_length}"
            )
        if np.array_equal(tokens["chosen"][n], tokens["rejected"][n]):
            problems.append(f"example {n}: both responses are {texts['chosen'][n]!r}")
        ids = np.concatenate([tokens[name][n] for name in texts])
        if vocab_size is not None and len(ids) and ids.max() >= vocab_size:
            problems.append(
                f"example {n}: token {ids.max()} is outside the vocabulary of {vocab_size}"
            )
    raise_problems("encode_preferences", problems)
    rows: dict[str, dict[str, list[np.ndarray]]] = {
        kind: {f"{kind}_input_ids": [], f"{kind}_labels": []} for kind in KINDS
    }
    for prompt, *responses in zip(*tokens.values(), strict=True):
        kept = max(0, room - max(map(len, responses)))
        prompt = np.concatenate([before, prompt[max(0, len(prompt) - kept) :]])
        for kind, response in zip(KINDS, responses, strict=True):
            answer = np.concatenate([response, after])
            ignored = np.full(len(prompt), IGNORED_LABEL)
            rows[kind][f"{kind}_input_ids"].append(np.concatenate([prompt, answer]))
            rows[kind][f"{kind}_labels"].append(np.concatenate([ignored, answer]))
    fill = padding_id(tokenizer)
    return Columns(
        tuple(
            Ragged.of(
                rows[kind],
                max_length=max_length,
                fill={f"{kind}_labels": IGNORED_LABEL, f"{kind}_input_ids": fill},
                mask=f"{kind}_attention_mask",
            )
            for kind in KINDS
        )
    )
