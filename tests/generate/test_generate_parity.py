"""Token for token what PyTorch's `generate` returns, on fixtures and on random models.

One model of each kind here: a cache alone, grouped heads with rotary positions, biases from the
mask, and encoder-decoders with learned and with relative positions.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from parity import assert_near, torch_twin

import fmjax
from fmjax.models import bart, bloom, gpt2, llama, t5, vision_encoder_decoder

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
    assert out.sequences.shape == expected.shape
    for row, length in enumerate(out.lengths):
        end = out.sequences.shape[1] - (out.lengths.max() - length)
        np.testing.assert_array_equal(out.sequences[row, :end], expected[row, :end], str(row))
        # transformers fills beams up with the end token where the padding token is 0.
        assert (out.sequences[row, end:] == 0).all()
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


def test_fixture_encoder_decoder():
    model, variables = fmjax.load(FIXTURES / "t5-cond")
    config = fmjax.load_generation_config(FIXTURES / "t5-cond")
    io = np.load(FIXTURES / "t5-cond" / "io.npz")
    inputs = {"input_ids": io["in.input_ids"], "attention_mask": io["in.attention_mask"]}
    options = {"max_new_tokens": 10, "generation_config": config}
    for name, others in (
        ("generate", {"eos_token_id": None}),
        ("generate_eos", {"eos_token_id": 65}),
        ("generate_beam3", {"eos_token_id": None, "num_beams": 3}),
    ):
        out = fmjax.generate(model, variables, **inputs, **options, **others)
        np.testing.assert_array_equal(out.sequences, io[f"pt.{name}"], name)


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


LLAMA = llama.Config(
    vocab_size=53, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
BLOOM = bloom.Config(vocab_size=53, hidden_size=24, n_layer=2, n_head=3)
BART = bart.Config(
    vocab_size=53, d_model=24, encoder_layers=1, decoder_layers=2, encoder_attention_heads=3,
    decoder_attention_heads=3, encoder_ffn_dim=32, decoder_ffn_dim=32,
    max_position_embeddings=24,
)  # fmt: skip
T5 = t5.Config(
    vocab_size=53, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=3
)


@pytest.mark.parametrize(
    ("family", "config"), [(llama, LLAMA), (bloom, BLOOM)], ids=["llama", "bloom"]
)
def test_other_decoders(family, config, tmp_path):
    twin, ours = pair(family, config, "causal_lm", tmp_path)
    ids, mask = prompts(config.vocab_size)
    inputs = {"input_ids": ids, "attention_mask": mask}
    out = check(twin, ours, inputs)
    check(twin, ours, inputs, eos_token_id=[int(out.tokens[0, 3])])  # the first row ends
    check(twin, ours, inputs, beams=True, num_beams=2, eos_token_id=int(out.tokens[1, 1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config"),
    [pytest.param(bart, BART, marks=pytest.mark.slow), (t5, T5)],
    ids=["bart", "t5"],
)
def test_encoder_decoders(family, config, tmp_path):
    twin, ours = pair(family, config, "seq2seq_lm", tmp_path)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, config.vocab_size, (3, 9))
    mask = np.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    options = {"decoder_start_token_id": 2, "eos_token_id": None, "forced_eos_token_id": None}
    out = check(twin, ours, inputs, **options)
    options |= {"eos_token_id": int(out.tokens[0, 3]), "encoder_no_repeat_ngram_size": 1}
    options |= {"forced_bos_token_id": 7, "begin_suppress_tokens": [8], "no_repeat_ngram_size": 3}
    options |= {"encoder_repetition_penalty": 1.5, "forced_eos_token_id": 5}
    check(twin, ours, inputs, **options)
    check(twin, ours, inputs, beams=True, num_beams=3, num_return_sequences=2, **options)
    prefix = {"decoder_input_ids": rng.integers(3, config.vocab_size, (3, 3))}
    prefix["decoder_input_ids"][:, 0] = 2
    check(twin, ours, inputs | prefix, decoder_start_token_id=2, forced_eos_token_id=None)
    states = ours[0].apply(ours[1], **inputs, method="encode").last_hidden_state
    again = fmjax.generate(
        *ours, encoder_outputs=states, attention_mask=mask, max_new_tokens=12,
        decoder_start_token_id=2,
    )  # fmt: skip
    np.testing.assert_array_equal(again.tokens, out.tokens)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"num_beams": 3}, marks=pytest.mark.slow)], ids=["greedy", "beams"]
)
def test_captions(options, tmp_path):
    """A vision encoder-decoder, from pixels and from its encoder's states."""
    config = vision_encoder_decoder.Config(
        vision_encoder_decoder.VARIANTS["tiny"].encoder,
        gpt2.Config(
            vocab_size=53, n_positions=40, n_embd=24, n_layer=2, n_head=3, add_cross_attention=True
        ),
    )
    twin, ours = pair(vision_encoder_decoder, config, "seq2seq_lm", tmp_path)
    pixels = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    options = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 7, **options}
    theirs = twin.generate(
        pixel_values=torch.tensor(pixels).movedim(-1, 1), decoder_start_token_id=1, **options
    ).numpy()
    options |= {"decoder_start_token_id": 1}
    out = fmjax.generate(*ours, pixel_values=pixels, **options)
    width = theirs.shape[1]
    for row, length in enumerate(out.lengths):
        end = min(1 + length, width)
        np.testing.assert_array_equal(out.sequences[row, :end], theirs[row, :end], str(row))
    model, variables = ours
    states = model.apply(variables, pixels, method="encode").last_hidden_state
    again = fmjax.generate(*ours, encoder_outputs=states, **options)
    np.testing.assert_array_equal(again.sequences, out.sequences)


def test_sources_that_the_encoder_does_not_read_are_refused():
    config = vision_encoder_decoder.VARIANTS["tiny"]
    model = vision_encoder_decoder.Model(config, head="seq2seq_lm")
    pixels, ids = np.zeros((1, 8, 8, 3), np.float32), np.ones((1, 4), np.int32)
    for inputs, message in (
        ({"input_ids": ids}, "give exactly one of pixel_values and encoder_outputs; got"),
        ({"pixel_values": pixels[0]}, r"has shape \(8, 8, 3\); it must be \[B, X, Y, C\]"),
        ({"pixel_values": pixels + np.nan}, r"not finite in the rows \[0\]"),
        ({"pixel_values": pixels, "attention_mask": ids}, "takes no attention_mask"),
    ):
        with pytest.raises(ValueError, match=message):
            fmjax.generate(model, {}, **inputs, decoder_start_token_id=1)
    decoder = gpt2.Model(CONFIG, head="causal_lm")
    with pytest.raises(ValueError, match="pixel_values and encoder_outputs are for encoder-dec"):
        fmjax.generate(decoder, {}, ids, pixel_values=pixels)
