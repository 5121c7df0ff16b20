import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fmjax.data.batches import batches
from fmjax.data.corruption import SpanCorruption
from fmjax.data.language import TokenDocuments, encode_documents, language_batches
from fmjax.data.packing import best_fit, concatenated, cut

PAD = 0


def documents(lengths):
    """Tokens that are all different, from 1 on."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return TokenDocuments(np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets, 0)


def stream_of(data, **options):
    return language_batches(
        data, **{"length": 8, "batch_size": 3, "pad_id": PAD, "prefetch": 0, **options}
    )


def document_of(data, tokens):
    """The number of the document of each token."""
    return np.searchsorted(data.offsets, np.asarray(tokens) - 1, side="right") - 1


some_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@settings(max_examples=40)
@given(
    some_lengths,
    st.integers(2, 12),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["documents", "concatenated"]),
)
def test_every_token_once_an_epoch_and_segments_never_mix(
    lengths, length, batch_size, shuffle, packing
):
    data = documents(lengths)
    stream = stream_of(
        data, length=length, batch_size=batch_size, shuffle=shuffle, packing=packing, epochs=2
    )
    everything = list(stream)
    assert len(everything) == 2 * stream.batches_per_epoch
    assert stream.shapes == [(batch_size, length)]
    for epoch in (0, 1):
        part = everything[epoch * stream.batches_per_epoch :][: stream.batches_per_epoch]
        ids = np.concatenate([batch["input_ids"] for batch in part])
        name = "segment_ids" if packing == "documents" else "attention_mask"
        segments = np.concatenate([batch[name] * batch["weight"][:, None] for batch in part])
        segments = segments.astype(int)
        mask = np.concatenate([batch["attention_mask"] for batch in part])
        weight = np.concatenate([batch["weight"] for batch in part])
        index = np.concatenate([batch["index"] for batch in part])
        assert sorted(ids[ids != PAD]) == data.tokens.tolist()
        np.testing.assert_array_equal(segments > 0, ids != PAD)
        np.testing.assert_array_equal(weight > 0, index >= 0)
        np.testing.assert_array_equal(index[index >= 0], np.arange(int(weight.sum())))
        np.testing.assert_array_equal(mask[weight > 0], segments[weight > 0] > 0)
        assert (mask[weight == 0].sum(axis=1) == 1).all()
        assert sum((batch["weight"] == 0).any() for batch in part) <= 1
        for row, numbers in zip(ids, segments, strict=True):
            if packing == "concatenated":
                continue
            assert set(numbers) - {0} == set(range(1, numbers.max() + 1))
            for number in range(1, numbers.max() + 1):
                piece = row[numbers == number]
                assert (np.diff(piece) == 1).all()
                assert len(set(document_of(data, piece))) == 1
                whole = lengths[document_of(data, piece[:1])[0]]
                # Whole documents, or pieces of those that are longer than a row.
                assert len(piece) == whole or (whole > length and len(piece) <= length)


def test_concatenated_rows_are_full_and_in_order():
    data = documents([3, 5, 9, 2])
    batch = next(stream_of(data, packing="concatenated", shuffle=False, length=8))
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [9, 10, 11, 12, 13, 14, 15, 16],
        [17, 18, 19, PAD, PAD, PAD, PAD, PAD],
    ]
    assert batch["attention_mask"][2].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert "segment_ids" not in batch, "one text: nothing to keep apart"


def test_shuffled_concatenation_keeps_documents_whole_across_rows():
    data = documents([3, 5, 9, 2, 7, 7])
    layout = concatenated(data.offsets, 4, np.random.default_rng(0))
    assert sorted(layout.sizes.tolist(), reverse=True)[0] <= 4
    rows = [np.concatenate(layout.pieces(data.tokens, row)) for row in range(len(layout))]
    assert sorted(len(row) for row in rows) == [1, *[4] * 8]
    jumps = sum((np.diff(row) != 1).sum() for row in rows)
    assert jumps <= 5, "only where a document follows another"


@settings(max_examples=15)
@given(
    some_lengths,
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["documents", "concatenated", "corrupted"]),
    st.data(),
)
def test_resume_bitwise_and_shards_partition(lengths, rows, processes, kind, data):
    tokens = documents(lengths)
    options = {"packing": "concatenated" if kind == "corrupted" else kind}
    if kind == "corrupted":
        options["corruption"] = SpanCorruption(
            sentinels=tuple(range(2000, 1990, -1)), eos_id=1999, pad_id=PAD
        )

    def stream(**process):
        return stream_of(tokens, batch_size=rows * processes, seed=7, **options, **process)

    whole = stream()
    count = 2 * whole.batches_per_epoch
    expected = [next(whole) for _ in range(count)]
    stop = data.draw(st.integers(0, count))
    first = stream()
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    shards = [stream(process_index=p, process_count=processes) for p in range(processes)]
    for shard in shards:
        shard.set_state(state)
        assert shard.get_state() == state
    for batch in expected[stop:]:
        parts = [next(shard) for shard in shards]
        for name, values in batch.items():
            rebuilt = np.stack([part[name] for part in parts], axis=1).reshape(values.shape)
            np.testing.assert_array_equal(rebuilt, values, err_msg=name)
            assert all(part[name].dtype == values.dtype for part in parts)


def test_epochs_and_seeds_draw_other_rows():
    data = documents([3, 5, 2, 4, 1, 6] * 5)

    def rows(seed, epoch):
        stream = stream_of(data, seed=seed, batch_size=1, epochs=2)
        ids = np.concatenate([batch["input_ids"] for batch in stream])
        return ids[epoch * len(ids) // 2 :][: len(ids) // 2]

    np.testing.assert_array_equal(rows(0, 0), rows(0, 0))
    assert (rows(0, 0) != rows(0, 1)).any()
    assert (rows(0, 0) != rows(1, 0)).any()
    # Not only the order of rows: which documents share one.
    together = [
        {frozenset(document_of(data, row[row != PAD])) for row in rows(0, e)} for e in (0, 1)
    ]
    assert together[0] != together[1]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_packing_fills_rows(sizes):
    sizes = np.sort(sizes)[::-1]
    row_of = best_fit(sizes, 40)
    used = np.bincount(row_of, weights=sizes)
    assert (used <= 40).all()
    assert (used > 0).all()
    # No two rows could be one, which bounds the waste.
    least = np.sort(used)
    assert len(used) < 2 or least[0] + least[1] > 40


def test_packing_wastes_little():
    sizes = np.sort(np.random.default_rng(0).geometric(0.02, 3000).clip(max=256))[::-1]
    rows = best_fit(sizes, 256).max() + 1
    assert sizes.sum() / (rows * 256) > 0.995


def test_cutting_documents_into_examples():
    data = documents([3, 10, 4])
    starts, sizes = cut(data.offsets, 4)
    assert starts.tolist() == [0, 3, 7, 11, 13]
    assert sizes.tolist() == [3, 4, 4, 2, 4]
    columns = data.cut(4, PAD)
    assert [row.tolist() for row in columns.ragged[0].rows("input_ids")][3] == [12, 13]
    corruption = SpanCorruption(sentinels=(99, 98), eos_id=97, pad_id=PAD)
    stream = batches(columns, batch_size=2, corruption=corruption, buckets=[4], epochs=1)
    assert stream.shapes == [(2, 5, 3)]
    first = next(stream)
    assert first["input_ids"].shape == (2, 5)
    assert first["labels"].shape == (2, 3)
    with pytest.raises(ValueError, match="corruption is for Columns with nothing but input_ids"):
        batches(stream_columns_with_labels(), batch_size=2, corruption=corruption)


def stream_columns_with_labels():
    from fmjax.data.columns import Columns

    columns = documents([3]).cut(4, PAD)
    return Columns(columns.ragged, {"labels": np.zeros(1, np.int32)})


def tokenizer():
    words = {"<eos>": 0, "<bos>": 1, "a": 2, "b": 3, "c": 4}
    fast = Tokenizer(models.WordLevel(words, "a"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", bos_token="<bos>")


def test_documents_are_encoded_whole_and_empty_ones_left_out():
    texts = ["a b", "", "c " * 3000, "  ", "bé"]
    found = encode_documents(tokenizer(), texts)
    assert len(found) == 3
    assert np.diff(found.offsets).tolist() == [3, 3001, 2]
    assert found.tokens[:3].tolist() == [2, 3, 0]
    assert found.num_bytes == 3 + 6000 + 3
    both = encode_documents(tokenizer(), texts, bos_id=1, end=False)
    assert both.tokens[:3].tolist() == [1, 2, 3]
    assert both.fingerprint != found.fingerprint
    with pytest.raises(ValueError, match="texts: one text was given"):
        encode_documents(tokenizer(), "a b")
    with pytest.raises(ValueError, match="none of 2 documents has a token"):
        encode_documents(tokenizer(), ["", " \n"])
    with pytest.raises(ValueError, match=r"token id 4 \(example 1: 'c c c .*vocabulary of 4"):
        encode_documents(tokenizer(), texts, vocab_size=4)


def test_state_of_another_stream_is_refused():
    data = documents([5, 3, 8])
    state = stream_of(data).get_state()
    others = {
        "data": stream_of(documents([5, 3, 9])),
        "length": stream_of(data, length=9),
        "packing": stream_of(data, packing="concatenated"),
        "corruption": stream_of(
            data, corruption=SpanCorruption(sentinels=(99, 98), eos_id=97, pad_id=PAD)
        ),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=rf"another stream(.|\n)*  {name}: "):
            other.set_state(state)


def test_everything_wrong_at_once():
    with pytest.raises(
        ValueError, match=r"batch_size=0.*packing='x'.*length=1.*there are no documents"
    ):
        stream_of(documents([]), batch_size=0, packing="x", length=1)
    corruption = SpanCorruption(sentinels=(99,), eos_id=97, pad_id=PAD)
    with pytest.raises(ValueError, match="100 tokens have 5 spans and there are 1 sentinels"):
        stream_of(documents([5]), length=100, corruption=corruption)
