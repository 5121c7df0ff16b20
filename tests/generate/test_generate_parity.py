"""Token for token what PyTorch's `generate` returns, on fixtures and on random models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from parity import assert_near, torch_twin

import fmjax
from fmjax.models import gpt2

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
CONFIG = gpt2.Config(vocab_size=53, n_positions=40, n_embd=24, n_layer=2, n_head=3)


def pair(family, config, head, folder, seed=0):
    """(PyTorch's model, ours) of the same random weights."""
    twin = torch_twin(family, config, head, seed, spread=0.3)
    twin.save_pretrained(folder)
    return twin, fmjax.load(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return pair(gpt2, CONFIG, "causal_lm", tmp_path_factory.mktemp("decoder"))


def prompts(vocab_size, rows=3, width=7, seed=0):
    """Ids and a mask with padding on the left of the second row."""
    ids = np.random.default_rng(seed).integers(3, vocab_size, (rows, width))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    return np.where(mask == 1, ids, 0), mask


def check(twin, ours, inputs, *, beams=False, **options):
    """Both sides' texts, lengths and beam scores."""
    defaults = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    options = defaults | options
    theirs = twin.generate(
        **{name: torch.tensor(value) for name, value in inputs.items()},
        **options, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    out = fmjax.generate(*ours, **inputs, **options)
    expected = theirs.sequences.numpy()
    width = expected.shape[1] - out.sequences.shape[1]
    assert width == 0, (expected, out.sequences)
    new = expected.shape[1] - out.tokens.shape[1]
    for row, length in enumerate(out.lengths):
        # transformers fills up beams with the end token where the padding token is 0.
        end = out.sequences.shape[1] - (out.lengths.max() - length)
        np.testing.assert_array_equal(out.sequences[row, :end], expected[row, :end], str(row))
        assert (out.sequences[row, end:] == 0).all()
    assert new <= expected.shape[1]
    if beams:
        assert_near(out.scores, theirs.sequences_scores.numpy(), "scores", 1e-5)
    return out


def test_fixture_decoder():
    model, variables = fmjax.load(FIXTURES / "gpt2-lm")
    io = np.load(FIXTURES / "gpt2-lm" / "io.npz")
    ids = io["in.input_ids"]
    options = {"max_new_tokens": 10, "pad_token_id": 0}
    whole = {"attention_mask": np.ones_like(ids)}
    out = fmjax.generate(model, variables, ids, **whole, **options)
    np.testing.assert_array_equal(out.sequences, io["pt.generate"])
    out = fmjax.generate(model, variables, ids, **whole, **options, eos_token_id=30)
    np.testing.assert_array_equal(out.sequences, io["pt.generate_eos"])
    np.testing.assert_array_equal(out.lengths, [4, 7])
    out = fmjax.generate(model, variables, ids, **whole, **options, num_beams=3)
    np.testing.assert_array_equal(out.sequences, io["pt.generate_beam3"])
    padded, mask = io["in.leftpad_input_ids"], io["in.leftpad_attention_mask"]
    out = fmjax.generate(model, variables, padded, attention_mask=mask, **options)
    np.testing.assert_array_equal(out.sequences, io["pt.generate_leftpad"])


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2, "eos_token_id": 9},
        {"min_length": 11, "eos_token_id": [31, 40, 5, 22], "forced_eos_token_id": 7},
        {
            "min_new_tokens": 3,
            "eos_token_id": [31, 40, 5, 22],
            "suppress_tokens": [9, 33],
            "begin_suppress_tokens": [15, 16, 17],
            "bad_words_ids": [[4], [20, 21], [31]],
            "sequence_bias": {(8,): 1.5, (45, 46): -20.0},
            "exponential_decay_length_penalty": (2, 1.05),
            "remove_invalid_values": True,
            "renormalize_logits": True,
        },
    ],
    ids=lambda options: ",".join(options)[:40],
)
def test_greedy(decoder, options):
    twin, ours = decoder
    ids, mask = prompts(CONFIG.vocab_size)
    check(twin, ours, {"input_ids": ids, "attention_mask": mask}, **options)


def test_beams(decoder):
    twin, ours = decoder
    ids, mask = prompts(CONFIG.vocab_size)
    inputs = {"input_ids": ids, "attention_mask": mask}
    for options in (
        {"num_return_sequences": 2},
        {"early_stopping": True, "length_penalty": 0.3},
        {"length_penalty": -1.0, "num_return_sequences": 3},
        {"early_stopping": "never", "length_penalty": -0.5},
        {"early_stopping": "never", "length_penalty": 2.0},
    ):
        common = {"num_beams": 3, "max_new_tokens": 10, "eos_token_id": [27, 13, 5]}
        out = check(twin, ours, inputs, beams=True, **common, **options)
        assert out.lengths.min() < 10 or options["length_penalty"] > 1  # some end


def test_beams_with_processors(decoder):
    twin, ours = decoder
    ids, mask = prompts(CONFIG.vocab_size)
    inputs = {"input_ids": ids, "attention_mask": mask}
    options = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_length": 9}
    check(
        twin, ours, inputs, beams=True, num_beams=4, max_new_tokens=10, eos_token_id=27,
        forced_eos_token_id=5, **options,
    )  # fmt: skip
