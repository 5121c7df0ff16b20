"""Stop strings: the automaton against a plain search, and against transformers on tokens."""

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import torch_twin
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

import fmjax
from fmjax.generate.forward import Prompt
from fmjax.generate.stop_strings import automaton, make_table, stop_states, stop_table, token_bytes
from fmjax.models import gpt2

TEXT = [
    "User: how do I stop? System: you stop at a stop string, User: übermäßig schön",
    "Human: stop stopping. Assistant: stops and tops, tip top\n\nHuman: naïve café",
] * 3


def byte_level():
    base = tokenizers.Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    base.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=base)


def sentence_piece():
    base = tokenizers.Tokenizer(models.Unigram())
    base.pre_tokenizer = pre_tokenizers.Metaspace()
    base.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, unk_token="<unk>", special_tokens=["<unk>"])
    base.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<unk>")


def word_piece():
    base = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    base.decoder = decoders.WordPiece()
    base.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=base, unk_token="[UNK]")


LETTERS = st.text("ab", min_size=1, max_size=4)


@given(st.lists(LETTERS, min_size=1, max_size=4), st.text("abc", max_size=30))
def test_automaton(patterns, text):
    """It is in an end state exactly where a pattern ends."""
    step, ends = automaton([pattern.encode() for pattern in patterns])
    state = 0
    for i, byte in enumerate(text.encode(), 1):
        state = step[state, byte]
        assert ends[state] == any(text[:i].endswith(pattern) for pattern in patterns)


@given(
    st.lists(LETTERS, min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=4), min_size=1, max_size=6, unique=True),
    st.lists(st.integers(0, 10), max_size=12),
)
def test_table(patterns, words, tokens):
    """A token stops where a pattern ends inside it, wherever the pattern began."""
    table = make_table(patterns, [word.encode() for word in words]).next
    state, text = 0, ""
    for token in tokens:
        word = words[token % len(words)]
        state = table[state, token % len(words)]
        hit = state < 0
        state = -1 - state if hit else state
        before, text = len(text), text + word
        ends = {at + len(p) for p in patterns for at in range(len(text)) if text.startswith(p, at)}
        assert hit == any(before < end for end in ends)


@pytest.mark.parametrize("make", [byte_level, sentence_piece, word_piece])
def test_tokens_add_up_to_the_text(make):
    tokenizer = make()
    words = token_bytes(tokenizer, len(tokenizer))
    ids = tokenizer(TEXT[0])["input_ids"]
    text = b"".join(words[i] for i in ids).decode()
    assert text.strip() == tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()


@pytest.mark.parametrize("make", [byte_level, sentence_piece, word_piece])
def test_stops_where_transformers_does(make):
    """On random tokens and on real text, token after token."""
    tokenizer = make()
    stops = ("stop", "top\n", "User:", "ön", " t", "ops and")
    table = stop_table(stops, tokenizer, len(tokenizer)).next
    theirs = StopStringCriteria(tokenizer, list(stops))
    rng = np.random.default_rng(0)
    ids = np.concatenate(
        [np.array(tokenizer(TEXT[i])["input_ids"][:28]) for i in range(2)]
        + [rng.integers(0, len(tokenizer), 40) for _ in range(3)]
    )
    state, hits = 0, 0
    for i in range(1, len(ids)):
        state = table[state, ids[i - 1]]
        hit = state < 0
        state = -1 - state if hit else state
        expected = bool(theirs(torch.tensor(ids[None, :i]), None))
        assert hit == expected, (i, tokenizer.convert_ids_to_tokens(ids[:i].tolist()))
        hits += hit
    assert 3 <= hits < len(ids) / 2


def test_generation_stops(tmp_path):
    """At the token that completes a string, which may begin in the prompt; row by row."""
    tokenizer = byte_level()
    config = gpt2.Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2
    )  # fmt: skip
    twin = torch_twin(gpt2, config, "causal_lm", spread=0.3)
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    words = token_bytes(tokenizer, len(tokenizer))
    letters = [i for i, word in enumerate(words) if word.isalpha()]
    others = [i for i in range(len(words)) if i not in letters]
    ids = np.random.default_rng(0).choice(letters, (2, 6))
    options = {"max_new_tokens": 16, "suppress_tokens": others, "pad_token_id": 7}
    free = fmjax.generate(model, variables, ids, **options)

    def text(tokens):
        return b"".join(words[i] for i in tokens).decode()

    # The prompt's last letter and the first token; and two tokens from within the other row.
    stops = [text(ids[0])[-1:] + text(free.tokens[0, :1]), text(free.tokens[1, 5:7])]
    # Only where there is an end token does PyTorch pad rows that have stopped.
    options |= {"stop_strings": stops, "tokenizer": tokenizer, "eos_token_id": others[0]}
    out = fmjax.generate(model, variables, ids, **options)
    assert out.lengths[0] == 1
    assert 1 < out.lengths[1] <= 7
    assert any(stop in text(out.tokens[1, : out.lengths[1]]) for stop in stops)
    for num_beams in (1, 2):
        out = fmjax.generate(model, variables, ids, num_beams=num_beams, **options)
        expected = twin.generate(torch.tensor(ids), num_beams=num_beams, **options)
        np.testing.assert_array_equal(out.sequences, expected.numpy())


def test_prompts_leave_the_automaton_where_they_end():
    table = make_table(["abc", "c"], [b"a", b"b", b"c", b"ab"])
    prompt = Prompt(np.array([[3, 0, 3], [2, 2, 2]]), np.array([1, 0]))
    state = stop_states(table, prompt)
    assert table.next[state[0], 2] < 0
    step, _ = automaton([b"abc", b"c"])
    assert state[0] == step[step[0, ord("a")], ord("b")]
