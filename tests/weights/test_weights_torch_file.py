"""The reader of PyTorch files against torch.save, and against hostile pickles and zips."""

import io
import pickle
import struct
import sys
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmjax.weights.tensor import MappedFile
from fmjax.weights.torch_file import open_torch

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64),
]
VIEWS = {
    "whole": lambda x: x,
    "transposed": lambda x: x.permute(tuple(reversed(range(x.ndim)))),
    "sliced": lambda x: x[1:, ::2] if x.ndim >= 2 else x,
    "row": lambda x: x[-1] if x.ndim >= 1 and len(x) else x,
    "expanded": lambda x: x[:1].expand(2, *x.shape[1:]) if x.ndim >= 1 and len(x) else x,
    "parameter": lambda x: (
        torch.nn.Parameter(x) if x.is_floating_point() and x.element_size() > 1 else x
    ),
}


def saved(state, *, legacy=False):
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def load(path):
    with MappedFile(path) as file:
        return {name: np.array(tensor.read()) for name, tensor in open_torch(file).items()}


def load_bytes(folder, data):
    (folder / "x.bin").write_bytes(data)
    return load(folder / "x.bin")


def bits(tensor):
    tensor = tensor.detach().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def check(read, state):
    assert list(read) == list(state)
    for name, tensor in state.items():
        assert read[name].shape == tuple(tensor.shape)
        assert str(read[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        assert read[name].tobytes() == bits(tensor)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(DTYPES),
            st.lists(st.integers(0, 4), max_size=3),
            st.sampled_from(sorted(VIEWS)),
        ),
        max_size=4,
    ),
    st.booleans(),
)
def test_reads_what_torch_saves(tmp_path_factory, drawn, legacy):
    state = {}
    for index, (dtype, shape, view) in enumerate(drawn):
        base = (
            torch.testing.make_tensor(*shape, dtype=dtype, device="cpu")
            if (dtype not in (torch.uint16, torch.uint32, torch.uint64))
            else torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)
        )
        state[f"t.{index}"] = VIEWS[view](base)
        state[f"t.{index}.shared"] = base  # the same storage twice
    check(load_bytes(tmp_path_factory.mktemp("pt"), saved(state, legacy=legacy)), state)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_modules_and_training_checkpoints(tmp_path, legacy, key):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = module.state_dict()  # an OrderedDict with _metadata
    wrapped = state if key is None else {"epoch": 3, key: state, "args": {"lr": 0.1, "b": [1, 2]}}
    check(load_bytes(tmp_path, saved(wrapped, legacy=legacy)), dict(state))


def test_a_storage_is_not_copied(tmp_path):
    (tmp_path / "x").write_bytes(saved({"w": torch.arange(12.0).reshape(3, 4).t()}))
    with MappedFile(tmp_path / "x") as file:
        array = open_torch(file)["w"].read()
        assert not array.flags.owndata
        assert not array.flags.writeable
        assert array.strides == (4, 16)


def test_big_endian(tmp_path):
    state = {
        "a": torch.arange(3.0),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "c": torch.tensor([1 + 2j]),
    }
    source = zipfile.ZipFile(io.BytesIO(saved(state)))
    widths = [4, 2, 4]
    with zipfile.ZipFile(tmp_path / "x", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("/byteorder"):
                data = b"big"
            elif "/data/" in name:
                width = widths.pop(0)
                data = np.frombuffer(data, f"u{width}").byteswap().tobytes()
            target.writestr(name, data)
    check(load(tmp_path / "x"), state)


def test_python_2_pickles(tmp_path):
    """They pickle an OrderedDict as a call with a list of pairs."""
    data = pickle_of_storage()
    whole = b"\x80\x02ccollections\nOrderedDict\n]](" + text("w") + data + b"ea\x85R."
    read = load_zip(tmp_path, whole, {"0": np.arange(2, dtype=np.float32).tobytes()})
    np.testing.assert_array_equal(read["w"], [0, 1])


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value):
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True) if value else b""
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values):
    return b"(" + b"".join(integer(value) for value in values) + b"t"


def pickle_of_storage(count=2, shape=(2,), strides=(1,), offset=0, kind="torch\nFloatStorage"):
    """Opcodes that make one tensor of storage "0"."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage")
        + f"c{kind}\n".encode()
        + text("0")
        + text("cpu")
        + integer(count)
        + b"tQ"
        + integer(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def state_pickle(**kwargs):
    return b"\x80\x02}" + text("w") + pickle_of_storage(**kwargs) + b"s."


def load_zip(folder, data, storages, **kwargs):
    with zipfile.ZipFile(folder / "x.bin", "w", **kwargs) as archive:
        archive.writestr("x/data.pkl", data)
        for key, value in storages.items():
            archive.writestr(f"x/data/{key}", value)
    return load(folder / "x.bin")


EIGHT = {"0": np.arange(2, dtype=np.float32).tobytes()}


def test_the_handmade_pickle_is_one(tmp_path):
    np.testing.assert_array_equal(load_zip(tmp_path, state_pickle(), EIGHT)["w"], [0, 1])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"shape": (3,)}, "beyond its storage"),
        ({"shape": (2,), "strides": (2,)}, "beyond its storage"),
        ({"shape": (2,), "offset": 1}, "beyond its storage"),
        ({"shape": (2,), "strides": (-1,), "offset": 1}, "other types"),
        ({"offset": -1}, "other types"),
        ({"shape": (-2,)}, "axis of its shape"),
        ({"shape": (2, 1), "strides": (1,)}, "other types"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, "larger than memory"),
        ({"shape": (10**10,), "strides": (0,)}, "would take 40000000000 bytes"),
        ({"count": 10**10, "shape": (10**10,)}, "takes 40000000000 bytes"),
        ({"count": -1}, "no storage"),
        ({"kind": "torch\nQInt8Storage"}, "torch.QInt8Storage"),
        ({"kind": "collections\nOrderedDict"}, "no storage"),
        ({"kind": "torch\nuint16"}, "no storage"),
    ],
)
def test_false_tensors_are_refused(tmp_path, kwargs, match):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match):
            load_zip(tmp_path, state_pickle(**kwargs), EIGHT)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_strides_of_axes_of_one_mean_nothing(tmp_path):
    data = state_pickle(shape=(1, 2), strides=(2**70, 1))
    np.testing.assert_array_equal(load_zip(tmp_path, data, EIGHT)["w"], [[0, 1]])


class Shell:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_calls_the_shell_is_refused_by_name(tmp_path, legacy, protocol):
    marker = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save(
        {"w": torch.ones(2), "x": Shell(marker)},
        buffer,
        _use_new_zipfile_serialization=not legacy,
        pickle_protocol=protocol,
    )
    with pytest.raises(ValueError, match=r"posix\.system"):
        load_bytes(tmp_path, buffer.getvalue())
    assert not marker.exists()
    pickle.loads(pickle.dumps(Shell(marker)))  # the attack itself works
    assert marker.exists()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"cthis_module_would_print\nboom\n.", "this_module_would_print.boom"),
        (text("this") + text("boom") + b"\x93.", "this.boom"),
        (b"(ios\nsystem\n.", "INST 'os system'"),
        (b"(ctorch\nFloatStorage\no.", "OBJ"),
        (b"ctorch\nFloatStorage\n)\x81.", "NEWOBJ"),
        (b"ctorch\nFloatStorage\n)R.", "arguments of other types"),
        (b"ctorch\nFloatStorage\n}b.", "fills something that is no dict"),
        (b"\x82\x01.", "EXT1"),
        (b"P0\n.", "PERSID"),
        (b"K\x01Q.", "no storage"),
        (b"K\x01)R.", "no function"),
        (b"q\x00.", "not there"),
        (b"h\x05.", "never set"),
        (b"0.", "POP"),
        (b".", "empty stack"),
        (b"u.", "empty stack"),
        (b"}(K\x01u.", "without a value"),
        (b"}K\x01K\x01s.", "no tensors"),
        (b"})K\x01s.", "dict key of type tuple"),
        (b"]K\x01a.", "holds a list"),
        (b"K\x01.", "holds a int"),
        (b"}" + text("a") + b"]s.", "no tensors"),
        (b"\xff.", "refused"),
        (b"", "refused"),
    ],
)
def test_false_pickles_are_refused(tmp_path, data, match):
    before = set(sys.modules)
    with pytest.raises(ValueError, match=match):
        load_zip(tmp_path, b"\x80\x02" + data, EIGHT)
    assert "this" not in set(sys.modules) - before


@pytest.mark.parametrize(
    "data",
    [
        b"]r\xff\xff\xff\x7f.",  # LONG_BINPUT: a memo of 2**31 entries
        b"X\xff\xff\xff\x7fabc.",  # BINUNICODE of 2 GiB
        b"\x8d" + struct.pack("<Q", 10**10) + b".",  # BINUNICODE8 of 10 GB
        b"\x8e" + struct.pack("<Q", 10**10) + b".",  # BINBYTES8
        b"\x96" + struct.pack("<Q", 10**10) + b".",  # BYTEARRAY8
        b"\x8b\xff\xff\xff\x7f.",  # LONG4 of 2 GiB
        b"T\xff\xff\xff\x7f.",  # BINSTRING
        b"\x95" + struct.pack("<Q", 10**10) + b"K\x01.",  # FRAME
        b"L" + b"9" * 10**5 + b"L\n.",  # a decimal of 100,000 digits takes quadratic time
        # A list of 1000 pairs, copied 1000 times.
        b"ccollections\nOrderedDict\nq\x00]q\x01("
        + (text("k") + b"K\x01\x86") * 1000
        + b"e0"
        + b"](h\x00h\x01\x85R" * 1000
        + b".",
    ],
)
def test_claims_of_gigabytes_cost_nothing(tmp_path, data):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"x\.bin"):
            load_zip(tmp_path, b"\x80\x04" + data, EIGHT)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_copies_of_one_list_do_not_multiply(tmp_path):
    pairs = b"".join(text(f"{i:03}") + b"K\x01\x86" for i in range(300))
    data = (
        (b"\x80\x02]q\x01(" + pairs + b"e\x85q\x02ccollections\nOrderedDict\nq\x00h\x02R")
        + b"h\x00h\x02R" * 3000
        + b"."
    )
    with pytest.raises(ValueError, match="more dict entries"):
        load_zip(tmp_path, data, EIGHT)


@pytest.mark.parametrize(
    "data",
    [b")" + b"\x85" * 10**5, b"]" * 10**5 + b"a" * (10**5 - 1)],
    ids=["tuples", "lists"],
)
def test_deep_nesting_does_not_overflow(tmp_path, data):
    with pytest.raises(ValueError, match="holds a"):
        load_zip(tmp_path, b"\x80\x02" + data + b".", EIGHT)
    with pytest.raises(ValueError, match="dict key of type"):
        load_zip(tmp_path, b"\x80\x02}" + data + b"K\x01s.", EIGHT)


def small_file(legacy):
    return saved({"a": torch.arange(3.0), "b": torch.ones(2, 2).t()}, legacy=legacy)


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_anywhere_is_refused(tmp_path, legacy):
    data = small_file(legacy)
    for length in range(len(data)):
        with pytest.raises(ValueError, match="x"):
            load_bytes(tmp_path, data[:length])


@pytest.mark.parametrize("legacy", [False, True])
def test_flipped_bytes_are_refused_or_harmless(tmp_path, legacy):
    data = small_file(legacy)
    rng = np.random.default_rng(0)
    accepted = 0
    for position in range(0, len(data), 2):
        changed = bytearray(data)
        changed[position] ^= rng.integers(1, 256)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            arrays = load_bytes(tmp_path, bytes(changed))
        except ValueError:
            continue
        accepted += 1
        assert sum(array.nbytes for array in arrays.values()) <= 2 * len(data)
    assert accepted  # flips in the data itself are not seen


def test_compressed_zips_are_refused(tmp_path):
    with pytest.raises(ValueError, match="compressed"):
        load_zip(tmp_path, state_pickle(), {"0": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"x/other": b""}, "without one NAME/data.pkl"),
        ({"x/data.pkl": b"", "y/data.pkl": b""}, "without one NAME/data.pkl"),
        ({"x/data.pkl": state_pickle()}, "storage '0' is not in it"),
        ({"x/data.pkl": state_pickle(), "x/data/0": bytes(9)}, "has 9"),
        ({"x/data.pkl": state_pickle(), "x/byteorder": b"middle"}, "neither little nor big"),
    ],
)
def test_false_zips_are_refused(tmp_path, members, match):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match=match):
        load(tmp_path / "x")


def test_a_storage_has_one_type(tmp_path):
    two = (
        b"\x80\x02}("
        + text("v")
        + pickle_of_storage()
        + text("w")
        + pickle_of_storage(kind="torch\nIntStorage")
        + b"u."
    )
    with pytest.raises(ValueError, match="two types"):
        load_zip(tmp_path, two, EIGHT)


def legacy_file(structure, keys=("0",), storages=((2, EIGHT["0"]),)):
    parts = [
        pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    ]
    parts += [structure, pickle.dumps(list(keys), 2)]
    parts += [struct.pack("<q", count) + data for count, data in storages]
    return b"".join(parts)


def test_false_streams_are_refused(tmp_path):
    good = legacy_file(state_pickle())
    np.testing.assert_array_equal(load_bytes(tmp_path, good)["w"], [0, 1])
    for data, match in [
        (good + b"\0", "after the last"),
        (legacy_file(state_pickle(), keys=("1",)), "unknown"),
        (legacy_file(state_pickle(), keys=()), "no data"),
        (legacy_file(state_pickle(), keys=("0", "0")), "twice"),
        (legacy_file(state_pickle(), storages=((10**9, b""),)), "two lengths"),
        (legacy_file(state_pickle(count=10**9), storages=((10**9, b""),)), "inside storage"),
        (good.replace(b"\xe9\x03", b"\xea\x03"), "unknown version"),
        (pickle.dumps({"a": 1}, 2), "no PyTorch file"),
        (b"not a checkpoint", "no PyTorch file"),
    ]:
        with pytest.raises(ValueError, match=match):
            load_bytes(tmp_path, data)


def test_views_of_storages_in_old_streams(tmp_path):
    storage = (
        b"((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + integer(4)
    )
    part = b"(" + text("view") + integer(1) + integer(2) + b"t"
    structure = (
        b"\x80\x02}"
        + text("w")
        + b"ctorch._utils\n_rebuild_tensor_v2\n"
        + storage
        + part
        + b"tQ"
        + integer(0)
        + numbers((2,))
        + numbers((1,))
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )
    data = legacy_file(structure, storages=((4, np.arange(4, dtype=np.float32).tobytes()),))
    np.testing.assert_array_equal(load_bytes(tmp_path, data)["w"], [1, 2])


def test_ordered_dicts_keep_their_order(tmp_path):
    state = OrderedDict((name, torch.ones(1)) for name in "zebra")
    assert list(load_bytes(tmp_path, saved(state))) == list(state)
