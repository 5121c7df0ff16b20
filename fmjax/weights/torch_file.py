"""Reading PyTorch's .bin, .pt and .pth without PyTorch, and without running what they pickle.

Since version 1.6 `torch.save` writes a zip: NAME/data.pkl, a pickle of the structure, and
NAME/data/KEY, one uncompressed member per storage. Before, it wrote a stream: three pickles of
magic number, version and machine, one of the structure, one of the storages' keys, then for each
its length and bytes (torch/serialization.py).
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from fmjax.weights.pickled import MAX_PICKLE, Global, load_pickle
from fmjax.weights.tensor import MappedFile, Shape, Span, Tensor, check_shape
from fmjax.weights.zip_file import stored_members

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
NESTED = ("state_dict", "model")  # keys under which training scripts put the state dict

STORAGES: dict[str, np.dtype] = {
    name: np.dtype(scalar)
    for name, scalar in {
        "DoubleStorage": np.float64,
        "FloatStorage": np.float32,
        "HalfStorage": np.float16,
        "BFloat16Storage": ml_dtypes.bfloat16,
        "LongStorage": np.int64,
        "IntStorage": np.int32,
        "ShortStorage": np.int16,
        "CharStorage": np.int8,
        "ByteStorage": np.uint8,
        "BoolStorage": np.bool_,
        "ComplexFloatStorage": np.complex64,
        "ComplexDoubleStorage": np.complex128,
    }.items()
}
# Types without a storage class of their own are untyped bytes and named beside the tensor.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(scalar)
    for name, scalar in {
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "uint16": np.uint16,
        "uint32": np.uint32,
        "uint64": np.uint64,
    }.items()
}
ORDERED_DICT = Global("collections", "OrderedDict")
PARAMETER = Global("torch._utils", "_rebuild_parameter")
TENSOR_V1, TENSOR_V2, TENSOR_V3 = (
    Global("torch._utils", f"_rebuild_tensor{version}") for version in ("", "_v2", "_v3")
)
UNTYPED = Global("torch.storage", "UntypedStorage")
ALLOWED = frozenset(
    {ORDERED_DICT, PARAMETER, TENSOR_V1, TENSOR_V2, TENSOR_V3, UNTYPED}
    | {Global("torch", name) for name in (*STORAGES, *DTYPES)}
)


@dataclass(frozen=True)
class _Storage:
    """What the pickle says of a storage: its bytes are elsewhere in the file."""

    key: str
    dtype: np.dtype  # uint8 where it is untyped
    count: int
    offset: int = 0  # in elements: old files have views of storages


@dataclass(frozen=True)
class _View:
    """A tensor: a strided view of a storage. Offset and strides count elements of `dtype`."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: Shape
    strides: tuple[int, ...]


def open_torch(file: MappedFile) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, unread: a state dict, or one under "state_dict" or "model".

    Args:
        file: the mapped file; the tensors read from it.

    Raises:
        ValueError: it is no such file, asks for a global that weights do not need, or claims what
            its bytes do not hold.
    """
    if file.bytes(0, 4) == b"PK\x03\x04":
        return _open_zip(file)
    return _open_stream(file)


def _open_zip(file: MappedFile) -> dict[str, Tensor]:
    members = stored_members(file)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{file.path} is a zip without one NAME/data.pkl: not from torch.save")
    root = pickles[0].removesuffix("data.pkl")
    place = members[pickles[0]]
    if place.stop - place.start > MAX_PICKLE:
        raise ValueError(f"{file.path}: data.pkl is larger than {MAX_PICKLE} bytes")
    order = "little"
    if f"{root}byteorder" in members:
        where = members[f"{root}byteorder"]
        order = file.bytes(where.start, min(where.stop, where.start + 16)).decode("latin-1")
        if order not in ("little", "big"):
            raise ValueError(f"{file.path}: byteorder is neither little nor big")
    storages: dict[str, _Storage] = {}
    structure = _structure(file, io.BytesIO(file.bytes(place.start, place.stop)), storages)
    places: dict[str, Span] = {}
    for key, storage in storages.items():
        found = members.get(f"{root}data/{key}")
        if found is None:
            raise ValueError(f"{file.path}: storage {key[:100]!r} is not in it: truncated?")
        _check_size(file, storage, found)
        places[key] = found
    return _tensors(file, structure, places, swapped=order == "big")


def _open_stream(file: MappedFile) -> dict[str, Tensor]:
    """The format before 1.6; its storages are looked up once the pickles are read."""

    def plain() -> object:
        return load_pickle(
            file.data,
            allowed=frozenset(),
            call=_no_call,
            persistent=_no_persistent,
            where=str(file.path),
        )

    file.data.seek(0)
    # Every pickle since protocol 2 begins with this byte; text would only give a stranger error.
    if file.bytes(0, 1) != b"\x80" or plain() != MAGIC:
        raise ValueError(f"{file.path} is no PyTorch file: neither a zip nor the older stream")
    if plain() != PROTOCOL:
        raise ValueError(f"{file.path}: an unknown version of the older stream")
    machine = plain()
    if not isinstance(machine, dict) or not isinstance(machine.get("little_endian"), bool):
        raise ValueError(f"{file.path} does not say which byte order it has")
    storages: dict[str, _Storage] = {}
    structure = _structure(file, file.data, storages)
    keys = plain()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{file.path}: the list of storages is no list of strings")
    places: dict[str, Span] = {}
    position = file.data.tell()
    for key in keys:
        if key not in storages or key in places:
            raise ValueError(f"{file.path}: storage {key[:100]!r} is unknown, or there twice")
        if position + 8 > file.size:
            raise ValueError(f"{file.path} ends before storage {key[:100]!r}: truncated?")
        (count,) = struct.unpack("<q", file.bytes(position, position + 8))
        storage = storages[key]
        position += 8
        if count != storage.count:
            raise ValueError(f"{file.path}: storage {key!r} has two lengths")
        stop = position + count * storage.dtype.itemsize
        if stop > file.size:
            raise ValueError(f"{file.path} ends inside storage {key[:100]!r}: truncated?")
        places[key] = Span(position, stop)
        position = stop
    if missing := sorted(set(storages) - set(places)):
        raise ValueError(f"{file.path} has no data for the storages {missing[:10]}")
    if position != file.size:
        raise ValueError(f"{file.path}: {file.size - position} bytes after the last storage")
    return _tensors(file, structure, places, swapped=not machine["little_endian"])


def _no_call(function: Global, arguments: tuple) -> object:
    raise ValueError(f"it calls {function}")


def _no_persistent(argument: object) -> object:
    raise ValueError("it has a persistent id outside the structure")


def _structure(file: MappedFile, stream: Any, storages: dict[str, _Storage]) -> object:
    """The pickled structure with _View for tensors; fills `storages` by key."""
    budget = [0]

    def persistent(argument: object) -> _Storage:
        storage, view = _storage(argument)
        known = storages.setdefault(storage.key, storage)
        if known != storage:
            raise ValueError(f"storage {storage.key[:100]!r} has two types or lengths")
        return view

    def call(function: Global, arguments: tuple) -> object:
        if function == ORDERED_DICT:
            return _ordered_dict(arguments, file.size, budget)
        if function == PARAMETER and len(arguments) == 3 and isinstance(arguments[0], _View):
            return arguments[0]
        if function in (TENSOR_V1, TENSOR_V2, TENSOR_V3):
            return _view(function, arguments)
        raise ValueError(f"it calls {function} with arguments of other types or number")

    return load_pickle(
        stream, allowed=ALLOWED, call=call, persistent=persistent, where=str(file.path)
    )


def _ordered_dict(arguments: tuple, size: int, budget: list[int]) -> dict:
    """OrderedDict(), or OrderedDict([[key, value], ...]) as Python 2 pickled it."""
    if not arguments:
        return {}
    pairs = arguments[0]
    if len(arguments) > 1 or not isinstance(pairs, list):
        raise ValueError("it calls OrderedDict with something that is no list of pairs")
    # One list may be the argument of many calls: without a limit the copies multiply.
    budget[0] += len(pairs)
    if budget[0] > size:
        raise ValueError("it makes more dict entries than the file has bytes")
    result: dict = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[0]) is not str:
            raise ValueError("it calls OrderedDict with something that is no list of pairs")
        result[pair[0]] = pair[1]
    return result


def _storage(argument: object) -> tuple[_Storage, _Storage]:
    """The whole storage and the view of it that a persistent id describes.

    ("storage", type, key, device, number of elements) and, in the old format, None or (key of the
    view, offset, number of elements).
    """
    fault = "it has a persistent id that is no storage"
    if not isinstance(argument, tuple) or len(argument) not in (5, 6) or argument[0] != "storage":
        raise ValueError(fault)
    kind, key, _, count = argument[1:5]
    if not isinstance(kind, Global) or type(key) is not str or type(count) is not int or count < 0:
        raise ValueError(fault)
    if kind != UNTYPED and kind.name not in STORAGES:
        raise ValueError(fault)
    dtype = np.dtype(np.uint8) if kind == UNTYPED else STORAGES[kind.name]
    whole = _Storage(key, dtype, count)
    part = argument[5] if len(argument) == 6 else None
    if part is None:
        return whole, whole
    if not isinstance(part, tuple) or len(part) != 3:
        raise ValueError(fault)
    _, offset, part_count = part
    if type(offset) is not int or type(part_count) is not int:
        raise ValueError(fault)
    if not 0 <= offset <= offset + part_count <= count:
        raise ValueError("it views a storage beyond its end")
    return whole, _Storage(key, dtype, part_count, offset)


def _view(function: Global, arguments: tuple) -> _View:
    """The arguments of _rebuild_tensor: (storage, offset, shape, strides, ...)."""
    fault = f"it calls {function} with arguments of other types or number"
    lengths = {TENSOR_V1: (4,), TENSOR_V2: (6, 7), TENSOR_V3: (7, 8)}[function]
    if len(arguments) not in lengths:
        raise ValueError(fault)
    storage, offset, shape, strides = arguments[:4]
    if not (
        isinstance(storage, _Storage)
        and type(offset) is int
        and isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and len(shape) == len(strides)
        and all(type(stride) is int and stride >= 0 for stride in strides)
        and offset >= 0
    ):
        raise ValueError(fault)
    dtype, count = storage.dtype, storage.count
    if function == TENSOR_V3:
        name = arguments[6]
        if not isinstance(name, Global) or name.module != "torch" or name.name not in DTYPES:
            raise ValueError(fault)
        if storage.dtype != np.uint8 or storage.offset:
            raise ValueError("it reads a typed storage as another type")
        dtype = DTYPES[name.name]
        count //= dtype.itemsize
    sizes, _ = check_shape("a tensor", shape, dtype.itemsize)
    # The stride of an axis of one element means nothing, and may be too large for numpy.
    strides = tuple(stride if size > 1 else 1 for size, stride in zip(sizes, strides, strict=True))
    # An empty tensor touches nothing, wherever PyTorch says that it begins.
    offset = 0 if 0 in sizes else offset
    last = offset + sum(
        (size - 1) * stride for size, stride in zip(sizes, strides, strict=True) if size
    )
    if last >= count and 0 not in sizes:
        raise ValueError(
            f"a tensor of shape {sizes}, strides {strides} and offset {offset} reaches beyond its "
            f"storage of {count}"
        )
    return _View(storage, dtype, storage.offset + offset, sizes, strides)


def _check_size(file: MappedFile, storage: _Storage, place: Span) -> None:
    nbytes = storage.count * storage.dtype.itemsize
    if place.stop - place.start != nbytes:
        raise ValueError(
            f"{file.path}: storage {storage.key[:100]!r} takes {nbytes} bytes, its member has "
            f"{place.stop - place.start}"
        )


def _tensors(
    file: MappedFile, structure: object, places: dict[str, Span], *, swapped: bool
) -> dict[str, Tensor]:
    """The structure's state dict as tensors."""
    for key in NESTED:
        if (
            isinstance(structure, dict)
            and isinstance(structure.get(key), dict)
            and not any(isinstance(value, _View) for value in structure.values())
        ):
            structure = structure[key]
    if not isinstance(structure, dict):
        raise ValueError(f"{file.path} holds a {type(structure).__name__}, not a state dict")
    others = [str(name)[:100] for name, value in structure.items() if not isinstance(value, _View)]
    if others:
        raise ValueError(
            f"{file.path} is no state dict: {others[:10]} are no tensors. A state dict maps names "
            f"to tensors; it may be under one of the keys {NESTED}"
        )
    result: dict[str, Tensor] = {}
    for name, view in structure.items():
        if not isinstance(name, str):
            raise ValueError(f"{file.path}: a tensor has the name {name!r}; names are strings")
        place = places[view.storage.key]
        nbytes = math.prod(view.shape) * view.dtype.itemsize
        # Expanded views (stride 0) make a large array of few bytes.
        if nbytes > file.size:
            raise ValueError(
                f"{file.path}: tensor {name!r} of shape {view.shape} would take {nbytes} bytes, "
                f"out of a file of {file.size}"
            )
        read = partial(_read, file, view, place, swapped)
        result[name] = Tensor(name, view.shape, view.dtype, read, _releaser(file, view, place))
    return result


def _extent(view: _View) -> int:
    """How many elements of the storage, from the view's offset on, it spans."""
    if 0 in view.shape:
        return 0
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)
    )


def _releaser(file: MappedFile, view: _View, place: Span) -> Callable[[], None]:
    start = place.start + view.offset * view.dtype.itemsize
    return partial(file.release, start, start + _extent(view) * view.dtype.itemsize)


def _read(file: MappedFile, view: _View, place: Span, swapped: bool) -> np.ndarray:
    dtype, extent = view.dtype, _extent(view)
    if extent == 0:
        return np.empty(view.shape, dtype)
    flat = file.array(dtype, place.start + view.offset * dtype.itemsize, extent)
    if swapped:
        # A complex number is two floats; bfloat16 has no byte order of its own in numpy.
        width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
        flat = flat.view(f"u{width}").byteswap().view(dtype)
    steps = [stride * dtype.itemsize for stride in view.strides]
    # As bytes, for numpy's own strided views do not know float8; it checks the bounds again.
    return np.ndarray(view.shape, dtype, buffer=flat.view(np.uint8).data, strides=steps)
