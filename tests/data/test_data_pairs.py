import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fmjax.data.batches import batches
from fmjax.data.pairs import (
    SentenceDocuments,
    encode_sentences,
    next_sentence_pairs,
    sentence_order_pairs,
)

PAD, CLS, SEP = 0, 1, 2
FIRST = 10  # the id of the first token


def made(shape):
    """Documents of sentences of the given lengths; their tokens are numbered through."""
    lengths = [length for document in shape for length in document]
    total = sum(lengths)
    return SentenceDocuments(
        tokens=np.arange(FIRST, FIRST + total, dtype=np.int32),
        word_ids=np.arange(total, dtype=np.int32) // 2,
        sentences=np.cumsum([0, *lengths], dtype=np.int64),
        documents=np.cumsum([0, *map(len, shape)], dtype=np.int64),
        cls_id=CLS,
        sep_id=SEP,
        pad_id=PAD,
    )


def segments(columns):
    """(first, second) of each pair, its frame checked."""
    part = columns.ragged[0]
    found = []
    for ids, types, special in zip(
        *(part.rows(name) for name in ("input_ids", "token_type_ids", "special_tokens_mask")),
        strict=True,
    ):
        split = int(np.flatnonzero(ids == SEP)[0])
        assert ids[0] == CLS
        assert ids[-1] == SEP
        np.testing.assert_array_equal(special, np.isin(ids, (CLS, SEP)))
        np.testing.assert_array_equal(types, np.arange(len(ids)) > split)
        first, second = ids[1:split], ids[split + 1 : -1]
        for segment in (first, second):
            assert len(segment) > 0
            assert (np.diff(segment) == 1).all(), "a segment is text in a row"
        found.append((first, second))
    return found


def document_of(data, token):
    sentence = np.searchsorted(data.sentences, token - FIRST, side="right") - 1
    return int(np.searchsorted(data.documents, sentence, side="right") - 1)


shapes = st.lists(
    st.lists(st.integers(1, 12), min_size=1, max_size=8), min_size=2, max_size=6
)  # fmt: skip


@settings(max_examples=60)
@given(shapes, st.integers(5, 40), st.integers(0, 4), st.sampled_from([0.0, 0.1, 1.0]))
def test_next_sentences_follow_or_are_of_another_document(shape, max_length, seed, short):
    data = made(shape)
    columns = next_sentence_pairs(data, max_length=max_length, seed=seed, short=short)
    seen = set()
    for (first, second), label in zip(
        segments(columns), columns.fixed["next_sentence_label"], strict=True
    ):
        assert len(first) + len(second) <= max_length - 3
        own, other = document_of(data, first[0]), document_of(data, second[0])
        assert document_of(data, first[-1]) == own
        assert document_of(data, second[-1]) == other
        assert (own != other) == (label == 1)
        if label == 0:
            assert second[0] > first[-1]
        seen.add(own)
    assert seen == set(range(len(shape))), "every document begins some pair"


@settings(max_examples=60)
@given(shapes, st.integers(5, 40), st.integers(0, 4))
def test_sentence_order_is_kept_or_swapped(shape, max_length, seed):
    data = made(shape)
    if all(len(document) < 2 for document in shape):
        with pytest.raises(ValueError, match="no document has two sentences"):
            sentence_order_pairs(data, max_length=max_length)
        return
    columns = sentence_order_pairs(data, max_length=max_length, seed=seed, short=0.0)
    begun = []
    for pair, label in zip(segments(columns), columns.fixed["sentence_order_label"], strict=True):
        earlier, later = pair if label == 0 else reversed(pair)
        assert later[0] > earlier[-1]
        assert document_of(data, earlier[0]) == document_of(data, later[-1])
        begun.append(document_of(data, earlier[0]))
    assert begun == sorted(begun)
    assert set(begun) == {n for n, document in enumerate(shape) if len(document) > 1}


def test_untruncated_neighbours_touch_and_fill_the_row():
    data = made([[4] * 24] * 3)
    columns = sentence_order_pairs(data, max_length=35, seed=1, short=0.0)
    for pair, label in zip(segments(columns), columns.fixed["sentence_order_label"], strict=True):
        earlier, later = pair if label == 0 else reversed(pair)
        assert later[0] == earlier[-1] + 1
        assert len(earlier) + len(later) == 32, "8 sentences of 4 tokens"


def test_labels_are_balanced_and_drawn_by_seed_and_epoch():
    data = made([[5] * 300, [5] * 300])

    def pairs(build, **options):
        columns = build(data, max_length=43, **options)
        return columns.fingerprint, next(iter(columns.fixed.values())).mean()

    for build in (next_sentence_pairs, sentence_order_pairs):
        fingerprint, share = pairs(build, seed=1, copies=5)
        assert 0.42 < share < 0.58
        assert fingerprint == pairs(build, seed=1, copies=5)[0]
        assert len({pairs(build, seed=s, epoch=e)[0] for s in (0, 1) for e in (0, 1)}) == 4
    one, two = (len(next_sentence_pairs(data, max_length=43, copies=n)) for n in (1, 2))
    second = len(next_sentence_pairs(data, max_length=43, epoch=1))
    assert two == one + second


def test_truncation_takes_from_both_ends():
    data = made([[30, 30], [30, 30]])
    heads = tails = 0
    for epoch in range(10):
        for earlier, later in segments(
            sentence_order_pairs(data, max_length=23, epoch=epoch, short=0.0)
        ):
            assert len(earlier) == len(later) == 10
            place = (earlier[0] - FIRST) % 30
            heads, tails = heads + (place > 0), tails + (place < 20)
    assert heads > 15
    assert tails > 15


def test_word_numbers_do_not_join_the_segments():
    data = made([[4, 4], [4, 4]])
    columns = sentence_order_pairs(data, max_length=32, short=0.0)
    for words in columns.ragged[0].rows("word_ids"):
        assert words.tolist() == [-1, 0, 0, 1, 1, -1, 2, 2, 3, 3, -1]
    batch = next(batches(columns, batch_size=2, shuffle=False))
    assert batch["word_ids"].shape == (2, 16)
    assert batch["special_tokens_mask"][:, 11:].all()
    assert batch["sentence_order_label"].tolist() == list(columns.fixed["sentence_order_label"])


def tokenizer():
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "##b"]
    fast = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def test_documents_are_encoded_by_sentence():
    data = encode_sentences(tokenizer(), [["a abb", "", "b"], [" "], ["a a"]])
    assert data.tokens.tolist() == [4, 4, 6, 6, 5, 4, 4]
    assert data.word_ids.tolist() == [0, 1, 1, 1, 2, 3, 4]
    assert data.sentences.tolist() == [0, 4, 5, 7]
    assert data.documents.tolist() == [0, 2, 3]
    assert (data.cls_id, data.sep_id, data.pad_id) == (1, 2, 0)
    with pytest.raises(ValueError, match="none of 2 sentences has a token"):
        encode_sentences(tokenizer(), [[""], [" "]])
    with pytest.raises(ValueError, match=r"token id 6 \(example 0: 'abb'\)"):
        encode_sentences(tokenizer(), [["", "abb"]], vocab_size=6)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"max_length=4.*copies=0.*short=2.*1 documents"):
        next_sentence_pairs(made([[3, 3]]), max_length=4, copies=0, short=2)
