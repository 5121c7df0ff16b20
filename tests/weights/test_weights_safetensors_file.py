"""The safetensors reader and writer against the safetensors library, and against hostile files."""

import json
import struct
import tracemalloc

import ml_dtypes  # noqa: F401  (registers bfloat16 with the safetensors library)
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmjax.weights.safetensors_file import DTYPES, open_safetensors, write_safetensors
from fmjax.weights.tensor import MappedFile, Tensor

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def drawn_bytes(dtype_name, shape, seed):
    """Random bits of a dtype: every NaN and subnormal included."""
    dtype = DTYPES[dtype_name]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return (raw % 2 if dtype_name == "BOOL" else raw).tobytes()


def as_torch(dtype_name, shape, data):
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
    return (
        flat.view(TORCH[dtype_name]).reshape(shape)
        if data
        else torch.empty(shape, dtype=TORCH[dtype_name])
    )


def as_tensor(name, array):
    return Tensor(name, array.shape, array.dtype, lambda: array)


def load(path):
    with MappedFile(path) as file:
        tensors, metadata = open_safetensors(file)
        return {name: np.array(t.read()) for name, t in tensors.items()}, metadata


ENTRIES = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES, st.integers(0, 1000)),
    max_size=5,
)


@given(ENTRIES)
def test_reads_what_the_library_writes(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    data = {name: drawn_bytes(*entry) for name, entry in entries.items()}
    safetensors.torch.save_file(
        {name: as_torch(dtype, shape, data[name]) for name, (dtype, shape, _) in entries.items()},
        path,
    )
    read, metadata = load(path)
    assert metadata == {}
    assert set(read) == set(entries)
    for name, (dtype, shape, _) in entries.items():
        assert read[name].dtype == DTYPES[dtype]
        assert read[name].shape == shape
        assert read[name].tobytes() == data[name]


@given(ENTRIES)
def test_the_library_reads_what_we_write(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    data = {name: drawn_bytes(*entry) for name, entry in entries.items()}
    arrays = {
        name: np.frombuffer(data[name], DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape, _) in entries.items()
    }
    tensors = [as_tensor(name, array) for name, array in arrays.items()]
    write_safetensors(path, tensors, metadata={"format": "pt"})
    read = safetensors.torch.load_file(path)
    assert set(read) == set(entries)
    for name, (dtype, shape, _) in entries.items():
        assert read[name].dtype == TORCH[dtype]
        assert tuple(read[name].shape) == shape
        flat = read[name].reshape(-1)
        assert (flat.view(torch.uint8).numpy().tobytes() if data[name] else b"") == data[name]
    ours, metadata = load(path)
    assert metadata == {"format": "pt"}
    assert {name: array.tobytes() for name, array in ours.items()} == data


def test_the_bytes_are_those_of_the_library(tmp_path):
    arrays = {"b": np.arange(3, dtype=np.int16), "a": np.ones((2, 2)), "c": np.zeros((), "u1")}
    write_safetensors(
        tmp_path / "ours", [as_tensor(*item) for item in arrays.items()], metadata={"k": "v"}
    )
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", metadata={"k": "v"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_transposed_arrays_are_written_in_order(tmp_path):
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    write_safetensors(tmp_path / "x", [as_tensor("w", array)], metadata={})
    np.testing.assert_array_equal(load(tmp_path / "x")[0]["w"], array)


def test_writer_refuses_what_it_cannot_say(tmp_path):
    one = as_tensor("w", np.ones(2))
    with pytest.raises(ValueError, match="distinct"):
        write_safetensors(tmp_path / "x", [one, one], metadata={})
    with pytest.raises(ValueError, match="complex128"):
        write_safetensors(tmp_path / "x", [as_tensor("w", np.ones(2, complex))], metadata={})
    liar = Tensor("w", (3,), np.dtype(np.float64), lambda: np.ones(2))
    with pytest.raises(ValueError, match=r"float64\[3\].*float64\[2\]"):
        write_safetensors(tmp_path / "x", [liar], metadata={})


def small_file():
    return safetensors.torch.save(
        {"a": torch.arange(3, dtype=torch.int16), "b": torch.ones(2, 2)}, {"format": "pt"}
    )


def test_truncated_anywhere_is_refused(tmp_path):
    data = small_file()
    for length in range(len(data)):
        (tmp_path / "x").write_bytes(data[:length])
        with pytest.raises(ValueError, match="x"):
            load(tmp_path / "x")
    (tmp_path / "x").write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="not all of it"):
        load(tmp_path / "x")


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_are_refused_or_harmless(tmp_path_factory, flips):
    data = bytearray(small_file())
    for position, mask in flips:
        data[position % len(data)] ^= mask
    path = tmp_path_factory.mktemp("st") / "x"
    path.write_bytes(data)
    try:
        arrays, _ = load(path)
    except ValueError:
        return
    assert sum(array.nbytes for array in arrays.values()) < len(data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": entry(offsets=(0, 9))}, "takes 8 bytes"),
        ({"a": entry(offsets=(8, 0))}, "begin <= end"),
        ({"a": entry(offsets=(-8, 0))}, "begin <= end"),
        ({"a": entry(offsets=(0.0, 8))}, "two integers"),
        ({"a": entry(offsets=(False, 8))}, "two integers"),
        ({"a": entry(offsets=(0, 8, 8))}, "two integers"),
        ({"a": entry(offsets=(8, 16))}, "hole"),
        ({"a": entry(), "b": entry()}, "overlaps"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "overlaps"),
        ({"a": entry(), "b": entry(offsets=(16, 24))}, "hole"),
        ({"a": entry(), "b": entry(offsets=(8, 16))}, "truncated"),
        ({"a": entry(shape=(2**40, 2**40))}, "larger than memory"),
        ({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, "larger than memory"),
        ({"a": entry(shape=(10**10,), offsets=(0, 4 * 10**10))}, "truncated"),
        ({"a": entry(shape=(-2, -1))}, "axis of its shape"),
        ({"a": entry(shape=(True, 2))}, "axis of its shape"),
        ({"a": entry(shape=(1,) * 65)}, "65 axes"),
        ({"a": entry(dtype="F4")}, "none of F64"),
        ({"a": entry(dtype=["F32"])}, "none of F64"),
        ({"a": {**entry(), "more": 1}}, "exactly dtype"),
        ({"a": 1}, "exactly dtype"),
        ({"__metadata__": {"a": 1}}, "strings to strings"),
        ({"__metadata__": []}, "strings to strings"),
        ([], "no object"),
    ],
)
def test_false_headers_are_refused(tmp_path, header, match):
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=match):
        load(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b'{"a":1,"a":1}', "more than once"),
        (b"[" * 10**5, "no valid JSON"),
        (b'{"a":' * 10**5, "no valid JSON"),
        (b"\xff\xfe", "no valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b"", "no valid JSON"),
    ],
)
def test_false_json_is_refused(tmp_path, text, match):
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match=match):
        load(tmp_path / "x")


@pytest.mark.parametrize("length", [2**64 - 1, 100_000_001, 1000])
def test_wrong_header_length_costs_nothing(tmp_path, length):
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b"{}" * 100)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="header of"):
            load(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_only_whole_regular_files_are_mapped(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="is empty"):
        MappedFile(tmp_path / "empty")
    with pytest.raises(ValueError, match="regular file"):
        MappedFile(tmp_path)
    with pytest.raises(FileNotFoundError):
        MappedFile(tmp_path / "none")


def test_views_outlive_the_file_and_nothing_is_read_after_it(tmp_path):
    (tmp_path / "x").write_bytes(small_file())
    file = MappedFile(tmp_path / "x")
    tensors, _ = open_safetensors(file)
    view = tensors["b"].read()
    assert not view.flags.writeable
    tensors["b"].release()
    file.close()
    np.testing.assert_array_equal(view, np.ones((2, 2)))
    del view
    file.close()
    tensors["b"].release()
    with pytest.raises(ValueError, match="closed"):
        tensors["b"].read()
