"""Stop strings, found on the device: an automaton over bytes, stepped once a token.

The automaton of Aho & Corasick (1975) reads all stop strings at once. Its states after each byte
of a token, for every state and every token of the vocabulary, are one table int32 [M, V]; a step of
generation is one look-up. A string may begin in the prompt and end inside a token, as in
transformers; tokens are never cut.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fmjax.generate.forward import Prompt
from fmjax.generate.state import StopTable


@lru_cache(maxsize=8)
def stop_table(stop_strings: tuple[str, ...], tokenizer: Any, vocab_size: int) -> StopTable:
    """The table of some stop strings over a tokenizer's vocabulary.

    Args:
        stop_strings: none empty.
        tokenizer: of transformers.
        vocab_size: V; tokens that the tokenizer does not have say nothing.
    """
    return make_table(stop_strings, token_bytes(tokenizer, vocab_size))


def make_table(stop_strings: Sequence[str], words: Sequence[bytes]) -> StopTable:
    """The table over a vocabulary of byte strings."""
    step, ends = automaton([text.encode() for text in stop_strings])
    longest = max((len(word) for word in words), default=0)
    letters = np.zeros((len(words), max(longest, 1)), np.uint8)
    lengths = np.array([len(word) for word in words])
    for row, word in zip(letters, words, strict=True):
        row[: len(word)] = np.frombuffer(word, np.uint8)
    count = len(step)
    state = np.repeat(np.arange(count)[:, None], len(words), axis=1)  # [M, V]
    hit = np.zeros(state.shape, bool)
    for place in range(longest):
        there = np.flatnonzero(lengths > place)
        after = step[state[:, there], letters[there, place]]
        state[:, there] = after
        hit[:, there] |= ends[after]
    return StopTable(np.where(hit, -1 - state, state).astype(np.int32))


def automaton(patterns: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(the state after each byte int [M, 256], whether a pattern ends in a state bool [M])."""
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for pattern in patterns:
        node = 0
        for byte in pattern:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                ends.append(False)
            node = children[node][byte]
        ends[node] = True
    step = np.zeros((len(children), 256), np.int64)
    back = [0] * len(children)  # the longest proper suffix that is a prefix of a pattern
    for byte, child in children[0].items():
        step[0, byte] = child
    queue = deque(children[0].values())
    while queue:
        node = queue.popleft()
        step[node] = step[back[node]]
        ends[node] |= ends[back[node]]
        for byte, child in children[node].items():
            back[child] = int(step[back[node], byte])
            step[node, byte] = child
            queue.append(child)
    return step, np.array(ends)


def stop_states(stop: StopTable | None, prompt: Prompt) -> np.ndarray:
    """int32 [B]: the automaton's states after the prompts; what they hold already stops nothing."""
    batch, width = prompt.tokens.shape
    state = np.zeros(batch, np.int32)
    if stop is None:
        return state
    table = np.asarray(stop.next)
    for column in range(width):
        after = table[state, np.asarray(prompt.tokens)[:, column]]
        after = np.where(after < 0, -1 - after, after)
        state = np.where(column >= np.asarray(prompt.padding), after, state).astype(np.int32)
    return state


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """What each token adds to a text, in UTF-8; special tokens add what they are written as."""
    kinds = _decoder_kinds(tokenizer)
    alphabet = _byte_alphabet() if "ByteLevel" in kinds else {}
    # Decoders treat the first token of a text differently: here none is the first.
    before = tokenizer.tokenize("a")
    start = tokenizer.convert_tokens_to_string(before)
    words = [b""] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        if index >= vocab_size:
            continue
        if alphabet and all(letter in alphabet for letter in token):
            words[index] = bytes(alphabet[letter] for letter in token)
        elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x"):
            words[index] = bytes([int(token[3:5], 16)])
        else:
            text = tokenizer.convert_tokens_to_string([*before, token])
            words[index] = text.removeprefix(start).encode()
    return words


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """The kinds of decoder in a fast tokenizer's tokenizer.json; none of a slow one."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return set()
    found: set[str] = set()
    queue = [json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}]
    while queue:
        part = queue.pop()
        found.add(part.get("type", ""))
        queue += part.get("decoders", [])
    return found


def _byte_alphabet() -> dict[str, int]:
    """The characters that GPT-2's byte-level vocabularies write bytes as (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}
