"""The Flax msgpack reader against flax.serialization, and against hostile files."""

import struct
import tracemalloc

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmjax.weights.flax_file import has_flax_names, open_flax, to_torch_names
from fmjax.weights.tensor import MappedFile, Tensor

DTYPES = [
    *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.complex64, np.bool_),
    *(np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8),
]
LEAVES = st.tuples(
    st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 1000)
)
KEYS = st.text("abcß01_", min_size=1, max_size=40)
TREES = st.recursive(
    LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=20), max_leaves=20
).filter(lambda tree: isinstance(tree, dict))


def build(tree):
    """Arrays for a drawn tree."""
    if isinstance(tree, dict):
        return {key: build(value) for key, value in tree.items()}
    dtype, shape, seed = tree
    rng = np.random.default_rng(seed)
    return np.asarray(rng.integers(-100, 100, shape)).astype(dtype)


def flatten(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*path, key))
        else:
            yield "/".join((*path, key)), value


def load_bytes(folder, data):
    (folder / "x.msgpack").write_bytes(data)
    with MappedFile(folder / "x.msgpack") as file:
        tensors = open_flax(file)
        read = {name: np.array(tensor.read()) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            assert (tensor.shape, tensor.dtype) == (read[name].shape, read[name].dtype)
            tensor.release()
        return read


def check(read, expected):
    assert set(read) == set(expected)
    for name, array in expected.items():
        assert read[name].dtype == array.dtype
        assert read[name].shape == array.shape
        assert read[name].tobytes() == array.tobytes()


@given(TREES)
def test_reads_what_flax_writes(tmp_path_factory, tree):
    arrays = build(tree)
    read = load_bytes(tmp_path_factory.mktemp("fx"), flax.serialization.msgpack_serialize(arrays))
    check(read, dict(flatten(arrays)))


@given(TREES, st.integers(1, 64))
def test_reads_chunked_arrays(tmp_path_factory, tree, chunk_size):
    arrays = build(tree)
    before = flax.serialization.MAX_CHUNK_SIZE
    flax.serialization.MAX_CHUNK_SIZE = chunk_size
    try:
        data = flax.serialization.msgpack_serialize(arrays)
    finally:
        flax.serialization.MAX_CHUNK_SIZE = before
    check(load_bytes(tmp_path_factory.mktemp("fx"), data), dict(flatten(arrays)))


def test_reads_scalars_and_large_leaves(tmp_path):
    arrays = {"a": np.float32(3.5), "b": np.arange(70_000, dtype=np.int16), "c": np.zeros(300)}
    read = load_bytes(tmp_path, flax.serialization.msgpack_serialize(arrays))
    assert read["a"].shape == ()
    assert read["a"] == np.float32(3.5)
    check(read, {name: np.asarray(array) for name, array in arrays.items()})


def test_a_leaf_is_not_copied(tmp_path):
    (tmp_path / "x").write_bytes(flax.serialization.msgpack_serialize({"w": np.ones((2, 3))}))
    with MappedFile(tmp_path / "x") as file:
        array = open_flax(file)["w"].read()
        assert not array.flags.owndata
        assert not array.flags.writeable


def small_file():
    return flax.serialization.msgpack_serialize(
        {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": np.arange(3)}
    )


def test_truncated_anywhere_is_refused(tmp_path):
    data = small_file()
    for length in range(len(data)):
        with pytest.raises(ValueError, match="x"):
            load_bytes(tmp_path, data[:length])
    with pytest.raises(ValueError, match="after the end"):
        load_bytes(tmp_path, data + b"\0")


def test_flipped_bytes_are_refused_or_harmless(tmp_path):
    data = small_file()
    rng = np.random.default_rng(0)
    for position in range(len(data)):
        for mask in (1, 128, int(rng.integers(1, 256))):
            changed = bytearray(data)
            changed[position] ^= mask
            try:
                arrays = load_bytes(tmp_path, bytes(changed))
            except ValueError:
                continue
            assert sum(array.nbytes for array in arrays.values()) < len(data)


def packed(shape=(2,), dtype="float32", data=bytes(8), code=1):
    """An ext item as flax writes it, with any claim."""

    def number(value):
        return b"\xd3" + struct.pack(">q", value) if value < 2**63 else b"\xcf" + b"\xff" * 8

    inner = b"\x93" + bytes([0x90 | len(shape)]) + b"".join(number(size) for size in shape)
    inner += bytes([0xA0 | len(dtype)]) + dtype.encode() + b"\xc4" + bytes([len(data)]) + data
    return b"\xc7" + bytes([len(inner), code]) + inner


def one(value):
    return b"\x81\xa1w" + value


def chunked(shape=b"\x81\xa10\x02", chunks=b"\x81\xa10", leaf=None, flag=b"\xc3"):
    key = b"\xb9__msgpack_chunked_array__"
    leaf = packed() if leaf is None else leaf
    return one(b"\x83" + key + flag + b"\xa5shape" + shape + b"\xa6chunks" + chunks + leaf)


def test_the_handmade_files_are_files(tmp_path):
    check(load_bytes(tmp_path, one(packed())), {"w": np.zeros(2, np.float32)})
    check(load_bytes(tmp_path, chunked()), {"w": np.zeros(2, np.float32)})


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (one(packed(shape=(3,))), "12 bytes, but has 8"),
        (one(packed(shape=(-2,))), "axis of its shape"),
        (one(packed(shape=(2**64 - 1,))), "axis of its shape"),
        (one(packed(shape=(2**40, 2**40))), "larger than memory"),
        (one(packed(shape=(0, 2**62, 2**62), data=b"")), "larger than memory"),
        (one(packed(dtype="object")), "a dtype that is none"),
        (one(packed(dtype="O,O")), "a dtype that is none"),
        (one(packed(code=2)), "ext type 2"),
        (one(b"\xc7\x00\x01"), "truncated"),
        (one(b"\xc7\x01\x01\x90"), "is not \\(shape"),
        (one(b"\x01"), "of type int, not an array"),
        (one(b"\xc0"), "of type nil, not an array"),
        (one(b"\xcb" + bytes(8)), "of type float, not an array"),
        (b"\x81\x01" + packed(), "expected a string"),
        (b"\x81\xa1\xff" + packed(), "no UTF-8"),
        (b"\x82\xa1w" + packed() + b"\xa1w" + packed(), "twice"),
        (b"\x82\xa1a\x81\xa1b" + packed() + b"\xa3a/b" + packed(), "two leaves"),
        (b"\x90", "of type array; expected map"),
        (b"\xc1", "no msgpack"),
        (b"\x81\xa1w" * 100 + packed(), "deeper than 64"),
        (b"\x81\xa1w" * 100_000, "deeper than 64"),
        (one(b"\x91" * 100_000), "of type array, not an array"),
        (b"\xdf\xff\xff\xff\xff", "truncated"),
        (one(b"\xc9\xff\xff\xff\xff\x01"), "truncated"),
        (one(b"\xc7\x06\x01\x93\xdd\xff\xff\xff\xff"), "truncated"),
        (b"\x81\xdb\xff\xff\xff\xff", "truncated"),
        (chunked(flag=b"\xc2"), "is not \\(__msgpack"),
        (chunked(shape=b"\x81\xa10\x03"), "takes 12 bytes, its chunks 8"),
        (chunked(shape=b"\x81\xa11\x02"), "shape out of order"),
        (chunked(chunks=b"\x81\xa11"), "chunks out of order"),
        (chunked(chunks=b"\x80", leaf=b""), "no chunks"),
        (chunked(chunks=b"\x82\xa10", leaf=packed() + b"\xa11" + packed(dtype="int32")), "several"),
    ],
)
def test_false_files_are_refused_at_no_cost(tmp_path, data, match):
    (tmp_path / "x.msgpack").write_bytes(data)
    tracemalloc.start()
    try:
        with MappedFile(tmp_path / "x.msgpack") as file, pytest.raises(ValueError, match=match):
            open_flax(file)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def tensors_of(arrays):
    def tensor(name, array):
        return Tensor(name, array.shape, array.dtype, lambda: array)

    return {name: tensor(name, np.asarray(array)) for name, array in arrays.items()}


def test_names_and_orientation_become_those_of_pytorch():
    rng = np.random.default_rng(0)
    flax_tree = {
        "params/a/0/dense/kernel": rng.normal(size=(2, 3)),
        "params/a/0/dense/bias": rng.normal(size=3),
        "params/conv1/kernel": rng.normal(size=(2, 3, 4)),
        "params/conv2/kernel": rng.normal(size=(2, 3, 4, 5)),
        "params/norm/scale": rng.normal(size=3),
        "params/rms/weight": rng.normal(size=3),
        "params/words/embedding": rng.normal(size=(5, 3)),
        "params/class_embedding": rng.normal(size=3),
        "params/logit_scale": rng.normal(size=()),
        "params/mean": rng.normal(size=()),
        "batch_stats/norm/mean": rng.normal(size=3),
        "batch_stats/norm/var": rng.normal(size=3),
    }
    expected = {
        "a.0.dense.weight": flax_tree["params/a/0/dense/kernel"].T,
        "a.0.dense.bias": flax_tree["params/a/0/dense/bias"],
        "conv1.weight": np.einsum("xio->oix", flax_tree["params/conv1/kernel"]),
        "conv2.weight": np.einsum("xyio->oixy", flax_tree["params/conv2/kernel"]),
        "norm.weight": flax_tree["params/norm/scale"],
        "rms.weight": flax_tree["params/rms/weight"],
        "words.weight": flax_tree["params/words/embedding"],
        "class_embedding": flax_tree["params/class_embedding"],
        "logit_scale": flax_tree["params/logit_scale"],
        "mean": flax_tree["params/mean"],
        "norm.running_mean": flax_tree["batch_stats/norm/mean"],
        "norm.running_var": flax_tree["batch_stats/norm/var"],
    }
    for separator in "/.":
        given_tree = {name.replace("/", separator): value for name, value in flax_tree.items()}
        translated = to_torch_names(tensors_of(given_tree))
        assert set(translated) == set(expected)
        for name, tensor in translated.items():
            assert tensor.name == name
            assert tensor.shape == expected[name].shape
            np.testing.assert_array_equal(tensor.read(), expected[name])


def test_names_without_collections():
    translated = to_torch_names(tensors_of({"params": np.ones(2), "bert/mean": np.ones(2)}))
    assert set(translated) == {"params", "bert.mean"}


def test_untranslatable_trees_are_refused():
    with pytest.raises(ValueError, match="a kernel has 2, 3 or 4"):
        to_torch_names(tensors_of({"a/kernel": np.ones(3)}))
    with pytest.raises(ValueError, match=r"two leaves become 'a\.weight'"):
        to_torch_names(tensors_of({"a/kernel": np.ones((2, 2)), "a/scale": np.ones(2)}))


@pytest.mark.parametrize(
    ("arrays", "metadata", "answer"),
    [
        ({"a.kernel": np.ones((2, 2))}, {}, True),
        ({"a.kernel": np.ones((2, 2)), "norm.weight": np.ones(2)}, {}, True),
        ({"a.kernel": np.ones((2, 2))}, {"format": "pt"}, False),
        ({"a.weight": np.ones((2, 2))}, {"format": "flax"}, True),
        ({"a.weight": np.ones((2, 2))}, {}, False),
        ({"a.weight": np.ones((2, 2)), "blur.kernel": np.ones((3, 3))}, {}, False),
        ({"a.weight": np.ones((2, 2)), "codebook.embedding": np.ones((3, 3))}, {}, False),
        ({"codebook.embedding": np.ones((3, 3)), "a.scale": np.ones(3)}, {}, False),
        ({}, {}, False),
    ],
)
def test_flax_names_are_told_apart(arrays, metadata, answer):
    assert has_flax_names(tensors_of(arrays).values(), metadata) is answer
