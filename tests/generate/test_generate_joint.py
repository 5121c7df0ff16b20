"""Decoding by CTC and attention together, against every text that there is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmjax
from fmjax.generate.joint import ended, extended, joint_beam, no_prefix
from fmjax.models import speech_transformer
from fmjax.tasks import ctc, joint_transcription

BLANK, START, END = 0, 1, 2
CONFIG = speech_transformer.Config(
    vocab_size=6, num_mel_bins=4, conv_channels=2, max_position_embeddings=16, d_model=8,
    encoder_layers=1, encoder_ffn_dim=12, encoder_attention_heads=2, decoder_layers=1,
    decoder_ffn_dim=12, decoder_attention_heads=2, pad_token_id=BLANK,
    eos_token_id=END, decoder_start_token_id=START,
)  # fmt: skip


def nats(log_probabilities, texts):
    """Of each text by CTC, over all alignments."""
    width = max(map(len, texts))
    labels = np.full((len(texts), max(width, 1)), -100)
    for row, text in zip(labels, texts, strict=True):
        row[: len(text)] = text
    rows = jnp.broadcast_to(log_probabilities, (len(texts), *log_probabilities.shape))
    frames = jnp.full(len(texts), len(log_probabilities))
    values, _, _ = ctc.losses(rows, frames, jnp.asarray(labels), blank=BLANK)
    return -np.asarray(values)


def test_prefixes_are_all_texts_that_begin_so():
    draw = np.random.default_rng(0)
    frames = np.log(draw.dirichlet(np.ones(3), 5))
    texts = [t for n in range(6) for t in itertools.product((1, 2), repeat=n)]
    each = dict(zip(texts, np.exp(nats(jnp.asarray(frames), texts)), strict=True))
    assert sum(each.values()) == pytest.approx(1, rel=1e-4)
    prefixes, level = no_prefix(frames, BLANK), [()]
    for _ in range(4):
        np.testing.assert_allclose(
            np.exp(ended(prefixes)), [each[text] for text in level], rtol=1e-3, atol=1e-7
        )
        scores, prefixes = extended(frames, prefixes, np.array([1, 2]), BLANK)
        level = [(*text, symbol) for text in level for symbol in (1, 2)]
        sums = [sum(p for t, p in each.items() if t[: len(text)] == text) for text in level]
        np.testing.assert_allclose(np.exp(scores).reshape(-1), sums, rtol=1e-3, atol=1e-7)


@pytest.fixture(scope="module")
def hears():
    model, variables = fmjax.create(
        "speech_transformer", CONFIG, head="seq2seq_ctc", rng=jax.random.key(2)
    )
    features = np.random.default_rng(1).normal(size=(2, 16, 4)).astype(np.float32)
    mask = np.ones((2, 16), np.int32)
    mask[1, 12:] = 0
    return model, variables, {"input_features": features * mask[..., None], "attention_mask": mask}


@pytest.mark.parametrize("weight", [0.4, pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_the_best_texts_are_those_of_all(hears, weight):
    model, variables, inputs = hears
    texts = [t for n in range(4) for t in itertools.product((3, 4, 5), repeat=n)]
    read = np.full((len(texts), 4), END)
    for row, text in zip(read, texts, strict=True):
        row[: len(text)] = text
    lengths = np.array([len(text) for text in texts])
    found = joint_beam(
        model, variables, inputs, ctc_weight=weight, beams=27, max_new_tokens=3, results=5
    )
    narrow = joint_beam(model, variables, inputs, ctc_weight=weight, beams=3, max_new_tokens=3)
    for row in range(2):
        own = {name: np.repeat(x[row : row + 1], len(texts), 0) for name, x in inputs.items()}
        before = np.concatenate([np.full((len(texts), 1), START), read[:, :-1]], axis=1)
        out = model.apply(variables, **own, decoder_input_ids=before)
        each = np.take_along_axis(jax.nn.log_softmax(out.logits), read[..., None], 2)[..., 0]
        attention = np.where(np.arange(4) <= lengths[:, None], each, 0).sum(axis=1)
        frames = jax.nn.log_softmax(out.ctc_logits[0, : int(out.logit_lengths[0])])
        sound = nats(frames, texts)
        with np.errstate(invalid="ignore"):
            joint = np.where(weight == 0, 0, weight * sound) + (1 - weight) * attention
        best = np.argsort(-joint)[:5]
        assert [one.tokens for one in found[row]] == [texts[i] for i in best]
        np.testing.assert_allclose([one.score for one in found[row]], joint[best], atol=1e-3)
        np.testing.assert_allclose(
            [one.attention for one in found[row]], attention[best], atol=1e-3
        )
        assert narrow[row][0].score <= found[row][0].score + 1e-4


@pytest.mark.slow
def test_a_longer_text_is_worth_its_bonus(hears):
    model, variables, inputs = hears
    plain, longer = (
        joint_beam(model, variables, inputs, beams=4, bonus=bonus, tried=2) for bonus in (0.0, 30.0)
    )
    for one, other in zip(plain, longer, strict=True):
        assert len(one[0].tokens) < len(other[0].tokens)


def test_a_set_is_transcribed(hears):
    model, variables, inputs = hears
    best = [found[0].tokens for found in joint_beam(model, variables, inputs, beams=4)]
    labels = np.full((2, 8), -100)
    for row, tokens in zip(labels, best, strict=True):
        row[: len(tokens) + 1] = [*tokens, END]
    batch = {**inputs, "labels": labels, "index": np.arange(2), "weight": np.ones(2)}
    found = joint_transcription.evaluate(
        model, variables, [batch], size=2, text=lambda ids: " ".join(map(str, ids)), beams=4
    )
    assert found.metrics == {"wer": 0.0, "cer": 0.0}
    assert found.predictions == [" ".join(map(str, tokens)) for tokens in best]


def test_bad_settings_are_named(hears):
    model, variables, inputs = hears
    with pytest.raises(ValueError, match="ctc_weight=2") as error:
        joint_beam(
            model.clone(head="seq2seq_lm"), variables, inputs, ctc_weight=2, beams=0, results=3
        )
    for said in ("beams=0", "results=3", "seq2seq_ctc"):
        assert said in str(error.value)


def test_a_plain_search_does_not_hear_padding(hears):
    model, variables, inputs = hears
    model = model.clone(head="seq2seq_lm")
    options = {"max_new_tokens": 4, "eos_token_id": None, "decoder_start_token_id": START}
    both = fmjax.generate(model, variables, **inputs, **options)
    alone = {name: x[1:, :12] for name, x in inputs.items()}
    one = fmjax.generate(model, variables, **alone, **options)
    np.testing.assert_array_equal(both.tokens[1], one.tokens[0])
