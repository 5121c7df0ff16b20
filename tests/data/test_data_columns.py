import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax.data.batches import batches, shared_buckets
from fmjax.data.buckets import assign, by_cost, choose_shapes, next_holder
from fmjax.data.columns import Columns, Ragged, repeated


def ragged(lengths, name, *, fill=0, group=None, mask="attention_mask"):
    """Sequences whose values say which and where they are: 1000 (s + 1) + place."""
    rows = [1000 * (s + 1) + np.arange(length) for s, length in enumerate(lengths)]
    return Ragged.of({name: rows}, max_length=99, fill={name: fill}, group=group, mask=mask)


def translations(pairs):
    """Examples of two lengths and a fixed value."""
    return Columns(
        (
            ragged([s for s, _ in pairs], "input_ids", fill=7),
            ragged([t for _, t in pairs], "labels", fill=-100, mask=None),
        ),
        {"language": np.arange(len(pairs), dtype=np.int32) + 1},
    )


def unpad(row, fill):
    return row[row != fill].tolist()


lengths_of_two = st.lists(
    st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=50
)


@settings(max_examples=40)
@given(lengths_of_two, st.integers(1, 7), st.booleans(), st.integers(0, 3))
def test_two_lengths_every_example_once_and_one_padded_batch(pairs, batch_size, shuffle, seed):
    data = translations(pairs)
    stream = batches(data, batch_size=batch_size, seed=seed, shuffle=shuffle, epochs=2, prefetch=0)
    everything = list(stream)
    assert stream.batches_per_epoch == -(-len(pairs) // batch_size)
    shapes = []
    for epoch in (0, 1):
        part = everything[epoch * stream.batches_per_epoch :][: stream.batches_per_epoch]
        index = np.concatenate([batch["index"] for batch in part])
        assert sorted(index[index >= 0]) == list(range(len(pairs)))
        assert sum((batch["weight"] == 0).any() for batch in part) <= 1
        shapes.append(sorted((b["input_ids"].shape[1], b["labels"].shape[1]) for b in part))
        for batch in part:
            for row, n in enumerate(batch["index"]):
                source, target = (
                    unpad(batch["input_ids"][row], 7),
                    unpad(batch["labels"][row], -100),
                )
                if n < 0:
                    assert source == target == []
                    assert batch["language"][row] - 1 in batch["index"]
                    assert batch["attention_mask"][row].sum() == 1
                    continue
                assert source == data.ragged[0].rows("input_ids")[n].tolist()
                assert target == data.ragged[1].rows("labels")[n].tolist()
                assert batch["language"][row] == n + 1
                assert batch["attention_mask"][row].sum() == len(source)
    assert shapes[0] == shapes[1], "as many batches of each shape in every epoch"
    assert {(batch_size, *shape) for shape in shapes[0]} == set(stream.shapes)


@settings(max_examples=15)
@given(lengths_of_two, st.integers(1, 4), st.integers(1, 3), st.data())
def test_two_lengths_resume_bitwise_and_shards_partition(pairs, rows, processes, data):
    columns = translations(pairs)

    def stream(**process):
        return batches(columns, batch_size=rows * processes, seed=5, prefetch=0, **process)

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
    for batch in expected[stop:]:
        parts = [next(shard) for shard in shards]
        for name, values in batch.items():
            rebuilt = np.stack([part[name] for part in parts], axis=1).reshape(values.shape)
            np.testing.assert_array_equal(rebuilt, values, err_msg=name)


@given(lengths_of_two, st.integers(1, 6))
def test_shapes_hold_everything_and_pad_less_than_fewer_do(pairs, count):
    lengths = np.array(pairs).clip(max=(90, 99))
    shapes = choose_shapes(lengths, max_lengths=(90, 99), count=count)
    assert shapes == sorted(set(shapes), key=by_cost)
    assert len(shapes) <= count
    assert (assign(lengths, shapes) >= 0).all()
    assert next_holder(shapes)[:-1].count(-1) == 0, "what is left over always has a place"
    assert (np.array(shapes[-1]) >= np.max(shapes, axis=0)).all()
    one = choose_shapes(lengths, max_lengths=(90, 99), count=1)
    assert np.sum(shapes, axis=1)[assign(lengths, shapes)].sum() <= sum(one[0]) * len(pairs)


def test_shapes_of_a_translation_pad_little():
    draw = np.random.default_rng(0)
    source = np.minimum(draw.geometric(0.05, 3000) + 4, 120)
    target = np.clip((source * draw.uniform(0.8, 1.4, 3000)).astype(int), 1, 160)
    lengths = np.stack([source, target], axis=1)

    def padded(shapes):
        return np.sum(shapes, axis=1)[assign(lengths, shapes)].sum() / lengths.sum()

    shapes = choose_shapes(lengths, max_lengths=(120, 160))
    assert len(shapes) == 6
    assert padded(shapes) < 1.4  # 1.38; lengths rounded up to multiples of 8 alone pad to 1.13
    assert padded([(120, 160)]) > 4
    # A grid with three ends along each axis would compile nine shapes.
    ends = [choose_shapes(lengths[:, i : i + 1], max_lengths=(160,), count=3) for i in (0, 1)]
    grid = sorted(((a, b) for (a,), (b,) in itertools.product(*ends)), key=by_cost)
    assert padded(shapes) < padded(grid)


def test_groups_of_sequences_have_an_axis_of_their_own():
    lengths = [3, 5, 2, 9, 1, 1]
    data = Columns(
        (ragged(lengths, "input_ids", group=2, fill=-1),),
        {"labels": np.array([1, 0, 1], np.int32)},
    )
    assert len(data) == 3
    assert data.lengths.tolist() == [[5], [9], [1]]
    batch = next(batches(data, batch_size=4, shuffle=False, buckets=[10]))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 2, 10)
    assert batch["labels"].tolist() == [1, 0, 1, 1]
    assert batch["attention_mask"].sum(axis=2).tolist() == [[3, 5], [2, 9], [1, 1], [1, 1]]
    for row, n in itertools.product(range(3), range(2)):
        expected = data.ragged[0].rows("input_ids")[2 * row + n].tolist()
        assert unpad(batch["input_ids"][row, n], -1) == expected


def test_padding_repeats_the_batchs_examples():
    """So that statistics of a batch are of examples, in a process of its own too."""
    rows = np.array([5, -1, 7, -1, -1])
    assert repeated(rows).tolist() == [5, 5, 7, 7, 5]
    assert rows.tolist() == [5, -1, 7, -1, -1]
    data = Columns((), {"pixel_values": np.arange(10, 20, dtype=np.uint8)})
    zeros = data.assemble(rows, ())
    assert zeros["pixel_values"].tolist() == [15, 0, 17, 0, 0]
    stream = batches(data, batch_size=8, shuffle=False)
    assert next(stream)["weight"].all()
    last = next(stream)
    assert last["pixel_values"].tolist() == [18, 19] * 4
    assert last["weight"].tolist() == [1, 1] + [0] * 6
    assert last["index"].tolist() == [8, 9] + [-1] * 6


def test_values_per_token_may_have_axes():
    boxes = np.arange(20).reshape(5, 4)
    part = Ragged({"bbox": boxes}, np.array([0, 2, 5]), max_length=4, mask=None)
    batch = Columns((part,)).assemble(np.array([1, -1]), (4,))
    assert batch["bbox"].shape == (2, 4, 4)
    np.testing.assert_array_equal(batch["bbox"][0, :3], boxes[2:])
    assert not batch["bbox"][0, 3:].any()
    assert not batch["bbox"][1].any()


def test_select_takes_rows_in_order():
    data = Columns(
        (ragged([1, 2, 3, 4, 5, 6], "input_ids", group=2),), {"labels": np.array([5, 6, 7])}
    )
    chosen = data.select([2, 0])
    assert [row.tolist() for row in chosen.ragged[0].rows("input_ids")] == [
        data.ragged[0].rows("input_ids")[s].tolist() for s in (4, 5, 0, 1)
    ]
    assert chosen.fixed["labels"].tolist() == [7, 5]
    assert len(data.select([])) == 0


def test_fingerprint_sees_everything():
    def columns(**changes):
        options = {"name": "input_ids", "fill": 0, "group": None, "mask": "attention_mask"}
        fixed = changes.pop("fixed", {"labels": np.arange(2)})
        lengths = changes.pop("lengths", [2, 3])
        return Columns((ragged(lengths, **{**options, **changes}),), fixed).fingerprint

    assert columns() == columns()
    others = [
        columns(lengths=[3, 2]),
        columns(name="other"),
        columns(fill=1),
        columns(mask=None),
        columns(fixed={"labels": np.arange(2) + 1}),
        columns(fixed={"other": np.arange(2)}),
        columns(fixed={}),
        columns(lengths=[1, 1, 1, 2], group=2),
    ]
    assert len({columns(), *others}) == 9


def test_wrong_columns_are_refused_with_all_that_is_wrong():
    with pytest.raises(
        ValueError, match=r"'a' has 3 values.*fill names 'b'.*1 sequences are empty"
    ):
        Ragged({"a": np.zeros(3)}, np.array([0, 0, 4]), max_length=9, fill={"b": 1})
    with pytest.raises(ValueError, match=r"longer than max_length=3.*number 1 with 4 tokens"):
        Ragged({"a": np.zeros(6)}, np.array([0, 2, 6]), max_length=3)
    with pytest.raises(ValueError, match="3 sequences do not make groups of 2"):
        ragged([1, 1, 1], "a", group=2)
    with pytest.raises(ValueError, match="mask 'a' is also the name of a value"):
        ragged([1], "a", mask="a")
    with pytest.raises(ValueError, match="'b' are not as long as those of 'a'"):
        Ragged.of({"a": [[1], [2]], "b": [[1], [2, 3]]}, max_length=9)
    with pytest.raises(ValueError, match=r"'attention_mask' comes twice.*\[2, 2, 3\] examples"):
        Columns((ragged([1, 1], "a"), ragged([1, 1], "b")), {"c": np.zeros(3)})
    with pytest.raises(ValueError, match=r"'weight' comes twice.*\[3, 2\] examples"):
        Columns((), {"weight": np.zeros(3), "other": np.zeros(2)})
    with pytest.raises(ValueError, match="there are no columns"):
        Columns(())


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([8, 16], r"buckets \[8, 16\] must have 2 lengths"),
        ([(8, 8), (8, 8)], "must be increasing"),
        ([(8, 40), (40, 16)], "must end with one that holds all the others"),
        ([(8, 8), (9, 9)], r"end before the longest example of \[10, 30\] tokens"),
    ],
)
def test_bad_buckets_of_two_lengths(buckets, message):
    with pytest.raises(ValueError, match=message):
        batches(translations([(10, 5), (3, 30)]), batch_size=2, buckets=buckets)


def test_buckets_that_nothing_needs_are_left_out():
    data = translations([(3, 8), (10, 30)] * 2)
    buckets = [(4, 40), (16, 32), (64, 64)]
    stream = batches(data, batch_size=2, buckets=buckets, prefetch=0)
    assert stream.shapes == [(2, 16, 32)]
    assert stream.get_state()["stream"]["buckets"] == [[16, 32]]


def test_padding_is_said_by_columns_or_by_pad_id():
    with pytest.raises(ValueError, match=r"pad_id=3 is for EncodedText"):
        batches(translations([(1, 1)]), batch_size=1, pad_id=3)


def test_splits_share_buckets():
    train, val = translations([(3, 8), (30, 20)]), translations([(60, 5)])
    buckets = shared_buckets(train, val)
    assert isinstance(buckets, list)
    assert buckets[-1] == (64, 24)
    for split in (train, val):
        batches(split, batch_size=1, buckets=buckets)
    one = Columns((ragged([3, 30], "input_ids"),))
    assert shared_buckets(one, Columns((ragged([60], "input_ids"),))) == [8, 32, 64]
