import itertools
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fmjax.data.batches import batches
from fmjax.data.buckets import choose_buckets
from fmjax.data.encoding import EncodedText, encode
from fmjax.data.text import TextExamples

PAD = 7


def encoded_text(lengths, *, types=True, labels="single"):
    """Examples whose tokens say which example and which place they are: 1000 n + place."""
    ids = [1000 * (n + 1) + np.arange(length) for n, length in enumerate(lengths)]
    tokens = np.concatenate([np.zeros(0), *ids]).astype(np.int32)
    count = len(lengths)
    kinds = {
        "single": np.arange(count, dtype=np.int32) % 3 + 1,
        "multi": np.ones((count, 4), np.float32),
        "none": None,
    }
    return EncodedText(
        tokens=tokens,
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        max_length=200,
        token_type_ids=tokens % 2 if types else None,
        labels=kinds[labels],
    )


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, values in left.items():
        assert values.dtype == right[key].dtype
        np.testing.assert_array_equal(values, right[key], err_msg=key)


def check_batch(batch, data):
    """Every row is a whole example of `data`, or padding."""
    for row, n in enumerate(batch["index"]):
        ids, mask = batch["input_ids"][row], batch["attention_mask"][row]
        if n < 0:
            assert batch["weight"][row] == 0
            assert (ids == PAD).all()
            assert mask.tolist() == [1] + [0] * (len(mask) - 1)
            assert not batch["token_type_ids"][row].any()
            some = batch["index"] >= 0
            assert any((batch["labels"][row] == label).all() for label in batch["labels"][some])
            continue
        length = data.lengths[n]
        assert batch["weight"][row] == 1
        np.testing.assert_array_equal(mask, np.arange(len(mask)) < length)
        expected = data.tokens[data.offsets[n] : data.offsets[n + 1]]
        np.testing.assert_array_equal(ids[:length], expected)
        assert (ids[length:] == PAD).all()
        np.testing.assert_array_equal(batch["token_type_ids"][row, :length], expected % 2)
        np.testing.assert_array_equal(batch["labels"][row], data.labels[n])


some_lengths = st.lists(st.integers(1, 200), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(some_lengths, st.integers(1, 9), st.booleans(), st.integers(0, 5))
def test_every_example_once_an_epoch_whole_and_with_weight_one(lengths, batch_size, shuffle, seed):
    data = encoded_text(lengths)
    stream = batches(
        data,
        batch_size=batch_size,
        pad_id=PAD,
        seed=seed,
        shuffle=shuffle,
        epochs=2,
        prefetch=0,
    )
    everything = list(stream)
    assert stream.batches_per_epoch == -(-len(lengths) // batch_size)
    assert len(everything) == 2 * stream.batches_per_epoch
    for epoch in (0, 1):
        start = epoch * stream.batches_per_epoch
        part = everything[start : start + stream.batches_per_epoch]
        index = np.concatenate([batch["index"] for batch in part])
        assert sorted(index[index >= 0]) == list(range(len(lengths)))
        assert sum(batch["weight"].sum() for batch in part) == len(lengths)
        assert sum((batch["weight"] == 0).any() for batch in part) <= 1
        assert {batch["input_ids"].shape for batch in part} == set(stream.shapes)
        for batch in part:
            check_batch(batch, data)
            assert {key: values.dtype.name for key, values in batch.items()} == {
                "input_ids": "int32",
                "attention_mask": "int32",
                "token_type_ids": "int32",
                "labels": "int32",
                "weight": "float32",
                "index": "int32",
            }
    assert len(stream.shapes) <= 4


@settings(max_examples=25, deadline=None)
@given(some_lengths, st.integers(1, 9), st.data())
def test_restart_anywhere_continues_bitwise(lengths, batch_size, data):
    encoded = encoded_text(lengths)

    def stream():
        return batches(encoded, batch_size=batch_size, pad_id=PAD, seed=3, prefetch=0)

    whole = stream()
    count = 3 * whole.batches_per_epoch
    stop = data.draw(st.integers(0, count))
    expected = [next(whole) for _ in range(count)]
    first = stream()
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = stream()
    second.set_state(state)
    assert second.get_state() == state
    for batch in expected[stop:]:
        assert_same(next(second), batch)


@settings(max_examples=25, deadline=None)
@given(some_lengths, st.integers(1, 4), st.integers(1, 3))
def test_process_shards_make_up_the_global_batch(lengths, rows, processes):
    data = encoded_text(lengths)

    def stream(**process):
        return batches(
            data,
            batch_size=rows * processes,
            pad_id=PAD,
            epochs=1,
            prefetch=0,
            **process,
        )

    shards = [stream(process_index=p, process_count=processes) for p in range(processes)]
    for whole in stream():
        parts = [next(shard) for shard in shards]
        rebuilt = {
            # [rows, P, ...] -> [rows * P, ...]: row r P + p is row r of process p
            key: np.stack([part[key] for part in parts], axis=1).reshape(values.shape)
            for key, values in whole.items()
        }
        assert_same(rebuilt, whole)
    assert shards[0].shapes == [(rows, length) for _, length in stream().shapes]


def test_seeds_and_epochs_order_the_data():
    data = encoded_text([5] * 40)

    def order(seed):
        stream = batches(data, batch_size=4, pad_id=PAD, seed=seed, epochs=2, prefetch=0)
        return np.concatenate([batch["index"] for batch in stream])

    np.testing.assert_array_equal(order(1), order(1))
    assert (order(1) != order(2)).any()
    assert (order(1)[:40] != order(1)[40:]).any()


def test_batches_of_different_lengths_are_mixed():
    data = encoded_text([5] * 80 + [100] * 80)
    stream = batches(data, batch_size=4, pad_id=PAD, epochs=1)
    lengths = [batch["input_ids"].shape[1] for batch in stream]
    assert lengths.count(8) == lengths.count(104) == 20
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))


def test_remainders_move_up_and_at_most_one_batch_is_padded():
    # 5 short, 6 middle, 2 long in batches of 4: 4 short; 1 + 6 = 4 middle, 3 left; 3 + 2 = 4, 1.
    data = encoded_text([10] * 5 + [50] * 6 + [120] * 2)
    stream = batches(data, batch_size=4, pad_id=PAD, epochs=1, buckets=[32, 64, 128])
    found = sorted((batch["input_ids"].shape[1], int(batch["weight"].sum())) for batch in stream)
    assert found == [(32, 4), (64, 4), (128, 1), (128, 4)]
    assert stream.shapes == [(4, 32), (4, 64), (4, 128)]


def test_shapes_with_no_batch_are_not_promised():
    # One short example moves up, so nothing of length 32 is ever compiled.
    stream = batches(encoded_text([10] + [60] * 3), batch_size=2, pad_id=PAD)
    assert stream.shapes == [(2, 64)]
    # Buckets longer than every example are left out.
    stream = batches(encoded_text([10] * 3), batch_size=2, pad_id=PAD, buckets=[16, 64, 128])
    assert stream.shapes == [(2, 16)]


def test_without_shuffling_the_order_is_by_bucket_then_by_data():
    data = encoded_text([100, 10, 40, 12, 120, 11])
    stream = batches(data, batch_size=2, pad_id=PAD, shuffle=False, epochs=1)
    index = [batch["index"].tolist() for batch in stream]
    assert index == [[1, 3], [5, 2], [0, 4]]
    again = batches(data, batch_size=2, pad_id=PAD, shuffle=False, epochs=2)
    assert [batch["index"].tolist() for batch in again] == index * 2


@pytest.mark.parametrize("labels", ["multi", "none"])
def test_labels_and_types_are_as_in_the_data(labels):
    data = encoded_text([3, 4, 5], types=False, labels=labels)
    batch = next(batches(data, batch_size=4, pad_id=PAD, shuffle=False))
    assert "token_type_ids" not in batch
    if labels == "none":
        assert "labels" not in batch
    else:
        np.testing.assert_array_equal(batch["labels"], np.ones((4, 4)))
        np.testing.assert_array_equal(batch["weight"], [1, 1, 1, 0])
        assert data.labels is not None
        assert data.labels.all(), "the data itself must stay as it is"


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 4))
def test_buckets_pad_as_little_as_any_choice(lengths, count):
    """Against every choice of `count` multiples of 8."""
    lengths = np.array(lengths)
    buckets = choose_buckets(lengths, max_length=60, count=count)
    assert buckets == sorted(set(buckets))
    assert len(buckets) <= count
    assert buckets[-1] == min(-(-lengths.max() // 8) * 8, 60)

    def padded(ends):
        return np.array(ends)[np.searchsorted(ends, lengths)].sum()

    ends = sorted({min(8 * i, 60) for i in range(1, 9)})
    last = ends.index(buckets[-1])
    for others in itertools.combinations(ends[:last], min(count - 1, last)):
        assert padded(buckets) <= padded([*others, buckets[-1]])


def test_buckets_of_nothing_are_one():
    assert choose_buckets(np.zeros(0, np.int64), max_length=50) == [50]


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def no_thread_is_left():
    deadline = time.monotonic() + 10
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return prefetch_threads() == []


def test_prefetching_changes_nothing_and_leaves_no_thread():
    data = encoded_text(list(range(1, 60)))

    def stream(prefetch):
        return batches(data, batch_size=4, pad_id=PAD, seed=1, prefetch=prefetch)

    assert no_thread_is_left()
    ahead, plain = stream(6), stream(0)
    for _ in range(20):
        assert_same(next(ahead), next(plain))
    assert len(prefetch_threads()) == 1
    # Restoring while batches of the old position are being prepared.
    state = stream(0).get_state()
    ahead.set_state(state)
    plain.set_state(state)
    for _ in range(20):
        assert_same(next(ahead), next(plain))
    ahead.close()
    assert no_thread_is_left()
    dropped = stream(3)
    next(dropped)
    assert len(prefetch_threads()) == 1
    del dropped
    assert no_thread_is_left()


def test_a_program_that_stops_half_way_ends():
    program = """
import numpy as np
from fmjax.data import EncodedText
from fmjax.data.batches import batches
data = EncodedText(np.ones(900, np.int32), np.arange(901), 32)
stream = batches(data, batch_size=4, pad_id=0)
print(next(stream)["weight"].sum())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.split() == ["4.0"]
    assert run.stderr == ""


def test_state_of_another_stream_is_refused():
    data = encoded_text([5, 50, 100])
    state = batches(data, batch_size=2, pad_id=PAD).get_state()
    others = {
        "data": batches(encoded_text([5, 50, 101]), batch_size=2, pad_id=PAD),
        "batch_size": batches(data, batch_size=1, pad_id=PAD),
        "seed": batches(data, batch_size=2, pad_id=PAD, seed=1),
        "shuffle": batches(data, batch_size=2, pad_id=PAD, shuffle=False),
        "buckets": batches(data, batch_size=2, pad_id=PAD, buckets=[100]),
        "pad_id": batches(data, batch_size=2, pad_id=0),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=rf"another stream(.|\n)*  {name}: "):
            other.set_state(state)
    with pytest.raises(ValueError, match="not the state of a batch stream"):
        batches(data, batch_size=2, pad_id=PAD).set_state({"step": 3})


def test_position_is_shared_by_processes_and_bounded_by_epochs():
    data = encoded_text([5] * 10)
    one = batches(data, batch_size=4, pad_id=PAD)
    for _ in range(4):
        next(one)
    half = batches(data, batch_size=4, pad_id=PAD, process_index=1, process_count=2)
    half.set_state(one.get_state())
    np.testing.assert_array_equal(next(half)["index"], next(one)["index"][1::2])
    with pytest.raises(ValueError, match="batch 5, this stream ends at 3; give it more epochs"):
        batches(data, batch_size=4, pad_id=PAD, epochs=1).set_state(one.get_state())
    done = batches(data, batch_size=4, pad_id=PAD, epochs=1)
    list(done)
    assert list(done) == []
    resumed = batches(data, batch_size=4, pad_id=PAD, epochs=2)
    resumed.set_state(done.get_state())
    assert len(list(resumed)) == 3


def test_fingerprint_sees_every_array():
    base = encoded_text([3, 4])
    same = encoded_text([3, 4])
    assert base.fingerprint == same.fingerprint
    others = [
        encoded_text([4, 3]),
        encoded_text([3, 4], types=False),
        encoded_text([3, 4], labels="none"),
        encoded_text([3, 4], labels="multi"),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1"),
        ({"epochs": 0}, "epochs=0"),
        ({"prefetch": -1}, "prefetch=-1"),
        (
            {"batch_size": 6, "process_count": 4},
            "batch_size=6 does not divide by process_count=4",
        ),
        ({"process_index": 2, "process_count": 2}, "process_index=2 is not one of 2"),
        ({"process_count": 0}, "process_count=0"),
        ({"buckets": [64, 32]}, "must be increasing"),
        ({"buckets": []}, "must be increasing"),
        ({"buckets": [4, 8]}, "longest example of 9 tokens"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        batches(encoded_text([5, 9]), **{"batch_size": 2, "pad_id": PAD, **options})


def test_all_bad_options_at_once_and_no_examples():
    with pytest.raises(ValueError, match=r"batch_size=0.*seed=-2.*there are no examples"):
        batches(encoded_text([]), batch_size=0, pad_id=PAD, seed=-2)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "very"]


def tokenizer(special=True):
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def rows(encoded, values):
    return [part.tolist() for part in np.split(values, encoded.offsets[1:-1])]


def test_encode_adds_special_tokens_cuts_and_keeps_labels():
    labels = np.array([1, 0], np.int32)
    examples = TextExamples(["a good film", "very bad bad bad film"], labels, ("neg", "pos"))
    encoded = encode(tokenizer(), examples, max_length=5, vocab_size=len(WORDS))
    assert rows(encoded, encoded.tokens) == [[2, 4, 5, 7, 3], [2, 8, 6, 6, 3]]
    assert encoded.tokens.dtype == np.int32
    assert encoded.token_type_ids is not None
    assert encoded.token_type_ids.tolist() == [0] * 10
    assert encoded.labels is labels
    assert encoded.lengths.tolist() == [5, 5]
    assert len(encoded) == 2


def test_encode_pairs_mark_the_second_text():
    examples = TextExamples(["a film"], None, (), text_pairs=["very bad very bad"])
    encoded = encode(tokenizer(), examples, max_length=8)
    assert rows(encoded, encoded.tokens) == [[2, 4, 7, 3, 8, 6, 8, 3]]
    assert encoded.token_type_ids is not None
    assert encoded.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="max_length=3 leaves no room for text beside 3"):
        encode(tokenizer(), examples, max_length=3)


def test_encode_in_parts_is_the_same(monkeypatch):
    texts = ["a " * n + "film" for n in range(10)]
    examples = TextExamples(texts, None, ())
    whole = encode(tokenizer(), examples, max_length=9)
    monkeypatch.setattr("fmjax.data.tokens.TOKENIZED_AT_ONCE", 3)
    parts = encode(tokenizer(), examples, max_length=9)
    assert parts.fingerprint == whole.fingerprint


def test_encode_names_a_foreign_token_and_an_empty_text():
    with pytest.raises(ValueError, match="texts: one text was given"):
        TextExamples("a film", None, ())
    examples = TextExamples(["a film", "very good"], None, ())
    with pytest.raises(ValueError, match=r"token id 8 \(example 1: 'very good'\).*vocabulary of 8"):
        encode(tokenizer(), examples, max_length=8, vocab_size=8)
    with pytest.raises(ValueError, match=r"1 texts have no tokens, the first is example 1: ' '"):
        encode(tokenizer(special=False), TextExamples(["a", " "], None, ()), max_length=8)


def test_encoded_text_becomes_batches():
    examples = TextExamples(["a good film", "bad"], np.array([1, 0], np.int32), ("neg", "pos"))
    encoded = encode(tokenizer(), examples, max_length=16)
    batch = next(batches(encoded, batch_size=2, pad_id=0, shuffle=False))
    assert batch["input_ids"].shape == (2, 8)
    assert batch["input_ids"][1].tolist() == [2, 6, 3] + [0] * 5
    assert batch["attention_mask"].sum(axis=1).tolist() == [5, 3]
    assert batch["labels"].tolist() == [1, 0]
