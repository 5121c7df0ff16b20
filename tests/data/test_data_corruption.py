import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fmjax.data.corruption import (
    Denoising,
    SpanCorruption,
    delete_tokens,
    infill,
    permute_sentences,
    restore_spans,
)

SENTINELS = tuple(range(32099, 31999, -1))
EOS, PAD, MASK, BOS = 1, 0, 5, 2


def spans(**settings):
    return SpanCorruption(sentinels=SENTINELS, eos_id=EOS, pad_id=PAD, **settings)


@settings(max_examples=100)
@given(st.integers(1, 250), st.floats(0.05, 0.9), st.floats(1, 10), st.integers(0, 9))
def test_span_corruption_inverts_and_its_lengths_are_known(length, density, mean_span, seed):
    tokens = np.arange(100, 100 + length, dtype=np.int32)
    corruption = SpanCorruption(
        sentinels=tuple(range(32099, 31799, -1)),
        eos_id=EOS,
        pad_id=PAD,
        density=density,
        mean_span=mean_span,
    )
    inputs, targets = corruption(np.random.default_rng(seed), tokens)
    assert (len(inputs), len(targets)) == corruption.lengths(length)
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs[-1] == targets[-1] == EOS
    restored = restore_spans(inputs, targets, corruption.sentinels, EOS)
    np.testing.assert_array_equal(restored, tokens)
    noise, count = corruption.counts(length)
    used = [token for token in inputs if token >= 31800]
    assert used == list(range(32099, 32099 - count, -1)), "descending, each once"
    assert used == [token for token in targets if token >= 31800]
    assert sum(token < 31800 for token in targets) - 1 == noise
    # A text begins with a token of its own, and no two spans touch.
    assert length == 1 or (
        inputs[0] < 31800 and (np.diff(np.flatnonzero(inputs >= 31800)) > 1).all()
    )
    longer = corruption.lengths(length + 1)
    assert longer[0] >= len(inputs)
    assert longer[1] >= len(targets)


def test_span_corruption_has_the_published_lengths():
    # Raffel et al. 2020 train on 512 inputs; their code makes these of 568 tokens, and 114 targets.
    assert spans().raw_length(512) == 568
    assert spans().lengths(568) == (512, 114)
    assert spans().counts(568) == (85, 28)
    with pytest.raises(ValueError, match="inputs=2 leave no room; 3 is the least"):
        spans().raw_length(2)


def test_span_corruption_draws_every_place_alike():
    rng, corruption = np.random.default_rng(0), spans()
    tokens = np.arange(100, 140, dtype=np.int32)
    hidden = np.zeros(40)
    for _ in range(1000):
        inputs, _ = corruption(rng, tokens)
        hidden += ~np.isin(tokens, inputs)
    share = hidden / 1000
    assert share[0] == 0, "a gap comes first"
    assert abs(share.mean() - 6 / 40) < 1e-9
    assert share[-1] == 1, "and a span last"
    middle = share[5:31]
    assert middle.min() > 0.05
    assert middle.max() < 0.13


def test_restoring_from_predictions_that_lack_a_sentinel():
    first, second = SENTINELS[:2]
    inputs = np.array([10, first, 11, second, EOS, 99])
    assert restore_spans(inputs, np.array([first, 7, EOS, second, 8]), SENTINELS, EOS).tolist() == [
        10, 7, 11,
    ]  # fmt: skip


@settings(max_examples=60)
@given(st.integers(1, 80), st.floats(0, 1), st.floats(0.5, 6), st.integers(0, 9))
def test_infilling_masks_the_share_in_separate_spans(length, share, mean_span, seed):
    tokens = np.arange(100, 100 + length, dtype=np.int32)
    found = infill(np.random.default_rng(seed), tokens, MASK, share=share, mean_span=mean_span)
    kept = found[found != MASK]
    assert len(kept) == length - max(round(length * share), 1)
    assert (np.diff(kept) > 0).all()
    assert (np.diff(np.flatnonzero(found == MASK)) > 1).all()
    assert 1 <= (found == MASK).sum() <= length - len(kept)
    assert len(found) <= length


def test_infilling_draws_poisson_spans():
    rng = np.random.default_rng(0)
    tokens = np.arange(100, 1100, dtype=np.int32)
    masks = [int((infill(rng, tokens, MASK) == MASK).sum()) for _ in range(50)]
    # 300 tokens in spans of 3, those of no tokens included.
    assert 95 < np.mean(masks) < 105
    found = infill(rng, tokens, MASK)
    places = np.flatnonzero(found == MASK)
    before = found[places[1:-1] - 1]
    after = found[places[1:-1] + 1]
    assert (after - before == 1).any(), "a mask where nothing is missing"


def test_sentences_are_permuted_whole():
    tokens = np.array([1, 2, 9, 3, 9, 4, 5])
    seen = set()
    for seed in range(30):
        found = permute_sentences(np.random.default_rng(seed), tokens, (9,))
        seen.add(tuple(found.tolist()))
        text = " ".join(map(str, found))
        assert all(part in text for part in ("1 2 9", "3 9", "4 5"))
        assert len(found) == 7
    assert len(seen) == 6
    assert permute_sentences(np.random.default_rng(0), tokens[:0], (9,)).tolist() == []


def test_deleting_keeps_order_and_the_exact_share():
    tokens = np.arange(20)
    found = delete_tokens(np.random.default_rng(0), tokens, 0.25)
    assert len(found) == 15
    assert (np.diff(found) > 0).all()


def denoising(**settings):
    return Denoising(mask_id=MASK, bos_id=BOS, eos_id=EOS, pad_id=PAD, **settings)


@settings(max_examples=40)
@given(
    st.integers(0, 60), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.2]),
    st.sampled_from([0.0, 1.0]), st.integers(0, 5),
)  # fmt: skip
def test_denoising_targets_are_the_text(length, infill_share, delete, rotate, seed):
    tokens = np.arange(100, 100 + length, dtype=np.int32)
    noise = denoising(
        infill=infill_share, delete=delete, rotate=rotate, sentence_ends=(110, 120, 121)
    )
    inputs, targets = noise(np.random.default_rng(seed), tokens)
    assert targets.tolist() == [BOS, *tokens, EOS]
    assert inputs[0] == BOS
    assert inputs[-1] == EOS
    assert set(inputs) <= {BOS, EOS, MASK, *tokens}
    assert len(inputs) <= noise.lengths(length)[0]
    if not infill_share and not delete:
        assert sorted(inputs) == sorted(targets)
    again = noise(np.random.default_rng(seed), tokens)
    np.testing.assert_array_equal(again[0], inputs)


def test_rotation_alone_begins_elsewhere():
    inputs, _ = denoising(infill=0.0, rotate=1.0)(np.random.default_rng(1), np.arange(100, 106))
    text = inputs[1:-1].tolist()
    assert text != list(range(100, 106))
    at = text.index(100)
    assert text[at:] + text[:at] == list(range(100, 106))


def test_ids_come_from_the_tokenizer():
    words = ["<pad>", "</s>", "<s>", "<mask>", ".", "Ġ!", "a", "<extra_id_1>", "<extra_id_0>"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "a")),
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        mask_token="<mask>",
    )
    assert SpanCorruption.of(fast, density=0.2) == SpanCorruption(
        sentinels=(8, 7), eos_id=1, pad_id=0, density=0.2
    )
    assert Denoising.of(fast, rotate=0.5) == Denoising(
        mask_id=3, bos_id=2, eos_id=1, pad_id=0, sentence_ends=(4, 5), rotate=0.5
    )
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a")), eos_token="</s>"
    )
    with pytest.raises(ValueError, match="has no <extra_id_0>; add such tokens"):
        SpanCorruption.of(bare)
    with pytest.raises(ValueError, match="has no mask token"):
        Denoising.of(bare)


def test_bad_settings_are_listed():
    with pytest.raises(ValueError, match=r"density=1.*mean_span=0.*sentinels=\(\)"):
        SpanCorruption(sentinels=(), eos_id=EOS, pad_id=PAD, density=1, mean_span=0)
    with pytest.raises(ValueError, match=r"infill=2.*\[0, 1\].*delete=1.*\[0, 1\).*mean_span=0"):
        denoising(infill=2, delete=1, mean_span=0)
    with pytest.raises(ValueError, match="700 tokens have 35 spans and there are 3 sentinels"):
        SpanCorruption(sentinels=(9, 8, 7), eos_id=EOS, pad_id=PAD).lengths(700)
