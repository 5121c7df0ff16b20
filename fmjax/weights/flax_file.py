"""Reading Flax checkpoints: the msgpack file, and Flax names to PyTorch names.

`flax.serialization` writes nested maps whose leaves are msgpack ext type 1: (shape, dtype name,
bytes). A decoder would copy every leaf; this walks the structure and notes where each one lies.
https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import ml_dtypes
import numpy as np

from fmjax.weights.tensor import MappedFile, Shape, Tensor, check_shape

MAX_DEPTH = 64
CHUNKED = "__msgpack_chunked_array__"
NDARRAY, SCALAR = 1, 3  # ext types; 2 is a Python complex number, which no checkpoint has

DTYPES = {
    np.dtype(scalar).name: np.dtype(scalar)
    for scalar in (
        *(np.float64, np.float32, np.float16, np.complex64, np.complex128, np.bool_),
        *(np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    )
}
# (format byte, kind, struct format of the length or value that follows); the "fix" formats, which
# hold it in the byte itself, are in _Walker.head.
FORMATS: dict[int, tuple[str, str]] = {
    **{0xC0: ("nil", ""), 0xC2: ("false", ""), 0xC3: ("true", "")},
    **{0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I")},
    **{0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"), 0xC9: ("ext", ">I")},
    **{0xCA: ("float", ">f"), 0xCB: ("float", ">d")},
    **{0xCC: ("int", ">B"), 0xCD: ("int", ">H"), 0xCE: ("int", ">I"), 0xCF: ("int", ">Q")},
    **{0xD0: ("int", ">b"), 0xD1: ("int", ">h"), 0xD2: ("int", ">i"), 0xD3: ("int", ">q")},
    **{0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I")},
    **{0xDC: ("array", ">H"), 0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")},
}


@dataclass(frozen=True)
class _Leaf:
    dtype: np.dtype
    shape: Shape
    start: int
    stop: int


class _Walker:
    """A position in a msgpack file; every claim is checked against the bytes that are there."""

    def __init__(self, file: MappedFile, position: int, end: int) -> None:
        self.file, self.position, self.end = file, position, end

    def take(self, count: int) -> int:
        """Steps over `count` bytes; their start."""
        start = self.position
        if count > self.end - start:
            raise ValueError(
                f"{self.file.path}: {count} bytes claimed at {start}, where {self.end - start} "
                "are left: truncated?"
            )
        self.position = start + count
        return start

    def head(self) -> tuple[str, int]:
        """The kind of the next item, and its integer value, length or count."""
        start = self.take(1)
        byte = self.file.data[start]
        if byte <= 0x7F:
            return "int", byte
        if byte <= 0x8F:
            return "map", byte & 0x0F
        if byte <= 0x9F:
            return "array", byte & 0x0F
        if byte <= 0xBF:
            return "str", byte & 0x1F
        if byte >= 0xE0:
            return "int", byte - 0x100
        if 0xD4 <= byte <= 0xD8:
            return "ext", 1 << (byte - 0xD4)
        if byte not in FORMATS:
            raise ValueError(f"{self.file.path}: no msgpack at byte {start}")
        kind, layout = FORMATS[byte]
        if not layout:
            return kind, 0
        width = struct.calcsize(layout)
        start = self.take(width)
        (value,) = struct.unpack(layout, self.file.bytes(start, start + width))
        return kind, 0 if kind == "float" else value

    def text(self, what: str) -> str:
        """The next item, a string (or, in old files, bytes)."""
        kind, length = self.head()
        if kind not in ("str", "bytes"):
            raise ValueError(f"{self.file.path}: {what} is of type {kind}; expected a string")
        start = self.take(length)
        return self.file.bytes(start, start + length).decode("utf-8")

    def expect(self, kind: str, what: str) -> int:
        """The count of the next item, which must be of a kind."""
        found, count = self.head()
        if found != kind:
            raise ValueError(f"{self.file.path}: {what} is of type {found}; expected {kind}")
        return count


def open_flax(file: MappedFile) -> dict[str, Tensor]:
    """The leaves of a Flax msgpack file, unread, under their paths joined by "/".

    Args:
        file: the mapped file; the tensors read from it.

    Raises:
        ValueError: it is no such file, is truncated, or claims what its bytes do not hold.
    """
    walker = _Walker(file, 0, file.size)
    leaves: dict[str, Tensor] = {}
    try:
        count = walker.expect("map", "the file")
        _walk_map(walker, count, (), leaves)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.path}: a name that is no UTF-8: {error}") from error
    if walker.position != file.size:
        raise ValueError(f"{file.path}: {file.size - walker.position} bytes after the end")
    return leaves


def _walk_map(
    walker: _Walker, count: int, path: tuple[str, ...], leaves: dict[str, Tensor]
) -> None:
    """Adds the leaves below one map; its head has been read."""
    file = walker.file
    name = "/".join(path)
    if len(path) > MAX_DEPTH:
        raise ValueError(f"{file.path}: maps nested deeper than {MAX_DEPTH}")
    seen: set[str] = set()
    for _ in range(count):
        key = walker.text(f"a key under {name!r}")
        if key in seen:
            raise ValueError(f"{file.path}: {key!r} is twice under {name!r}")
        seen.add(key)
        if key == CHUNKED and len(seen) == 1:
            tensor = _chunked(walker, count, name)
        else:
            kind, size = walker.head()
            if kind == "map":
                _walk_map(walker, size, (*path, key), leaves)
                continue
            name_here = "/".join((*path, key))
            if kind != "ext":
                raise ValueError(f"{file.path}: {name_here!r} is of type {kind}, not an array")
            tensor = _tensor(file, name_here, _leaf(walker, size, name_here))
        if tensor.name in leaves:
            raise ValueError(f"{file.path}: two leaves have the path {tensor.name!r}")
        leaves[tensor.name] = tensor
        if key == CHUNKED:
            return


def _leaf(walker: _Walker, size: int, name: str) -> _Leaf:
    """The array in an ext item of `size` bytes whose length has been read, but not its type."""
    file = walker.file
    code = file.bytes(start := walker.take(1), start + 1)[0]
    if code not in (NDARRAY, SCALAR):
        raise ValueError(f"{file.path}: {name!r} is of msgpack ext type {code}, not an array")
    start = walker.take(size)
    inner = _Walker(file, start, start + size)
    if inner.expect("array", f"the array {name!r}") != 3:
        raise ValueError(f"{file.path}: {name!r} is not (shape, dtype, bytes)")
    axes = inner.expect("array", f"the shape of {name!r}")
    shape = []
    for _ in range(axes):
        shape.append(inner.expect("int", f"an axis of {name!r}"))
    dtype_name = inner.text(f"the dtype of {name!r}")
    if dtype_name not in DTYPES:
        raise ValueError(f"{file.path}: {name!r} has a dtype that is none of {', '.join(DTYPES)}")
    dtype = DTYPES[dtype_name]
    checked, nbytes = check_shape(f"{file.path}: {name!r}", shape, dtype.itemsize)
    kind, length = inner.head()
    if kind not in ("bytes", "str"):
        raise ValueError(f"{file.path}: the data of {name!r} is of type {kind}; expected bytes")
    begin = inner.take(length)
    if length != nbytes or inner.position != inner.end:
        raise ValueError(
            f"{file.path}: {name!r} is {dtype}{list(checked)}, {nbytes} bytes, but has {length}"
        )
    return _Leaf(dtype, checked, begin, begin + length)


def _chunked(walker: _Walker, count: int, name: str) -> Tensor:
    """An array that was cut up: {CHUNKED: True, "shape": {...}, "chunks": {...}}, key read."""
    file = walker.file
    fault = f"{file.path}: the chunked array {name!r}"
    if count != 3 or walker.head()[0] != "true" or walker.text("a key") != "shape":
        raise ValueError(f"{fault} is not ({CHUNKED}: true, shape, chunks)")
    shape: list[int] = []
    for index in range(walker.expect("map", f"the shape of {name!r}")):
        if walker.text("an axis") != str(index):
            raise ValueError(f"{fault} has a shape out of order")
        shape.append(walker.expect("int", f"an axis of {name!r}"))
    if walker.text("a key") != "chunks":
        raise ValueError(f"{fault} has no chunks")
    chunks: list[_Leaf] = []
    for index in range(walker.expect("map", f"the chunks of {name!r}")):
        if walker.text("a chunk") != str(index):
            raise ValueError(f"{fault} has chunks out of order")
        chunks.append(_leaf(walker, walker.expect("ext", "a chunk"), f"{name}, chunk {index}"))
    if not chunks or any(chunk.dtype != chunks[0].dtype for chunk in chunks):
        raise ValueError(f"{fault} has no chunks, or chunks of several dtypes")
    dtype = chunks[0].dtype
    checked, nbytes = check_shape(fault, shape, dtype.itemsize)
    held = sum(chunk.stop - chunk.start for chunk in chunks)
    if held != nbytes:
        raise ValueError(f"{fault} of shape {checked} takes {nbytes} bytes, its chunks {held}")
    first, last = chunks[0].start, chunks[-1].stop
    read = partial(_join, file, chunks, checked)
    return Tensor(name, checked, dtype, read, partial(file.release, first, last))


def _tensor(file: MappedFile, name: str, leaf: _Leaf) -> Tensor:
    read = partial(_read, file, leaf)
    return Tensor(name, leaf.shape, leaf.dtype, read, partial(file.release, leaf.start, leaf.stop))


def _read(file: MappedFile, leaf: _Leaf) -> np.ndarray:
    count = (leaf.stop - leaf.start) // leaf.dtype.itemsize
    return file.array(leaf.dtype, leaf.start, count).reshape(leaf.shape)


def _join(file: MappedFile, chunks: list[_Leaf], shape: Shape) -> np.ndarray:
    """One array from chunks, dropping each chunk's pages once it is copied."""
    result = np.empty(shape, chunks[0].dtype)
    flat, position = result.reshape(-1), 0
    for chunk in chunks:
        part = _read(file, chunk).reshape(-1)
        flat[position : position + part.size] = part
        position += part.size
        file.release(chunk.start, chunk.stop)
    return result


def has_flax_names(tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file has Flax's names and orientation rather than PyTorch's.

    Its metadata says so where there is any. Without: a Flax tree has leaves called `kernel` and no
    matrix called `weight` (PyTorch's Linear, Embedding and convolutions are), whereas `scale`,
    `embedding` and even `kernel` alone also occur as plain PyTorch parameter and buffer names.
    """
    if "format" in metadata:
        return metadata["format"] == "flax"
    leaves = [(tensor.name.rsplit(".", 1)[-1], len(tensor.shape)) for tensor in tensors]
    return any(leaf == "kernel" for leaf, _ in leaves) and not any(
        leaf == "weight" and axes > 1 for leaf, axes in leaves
    )


# By number of axes: Dense [I, O] -> [O, I]; Conv [X, I, O] and [X, Y, I, O] -> [O, I, X, Y].
KERNELS = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}


def to_torch_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PyTorch's names and orientation for the leaves of a Flax model of `transformers`.

    `kernel` becomes `weight` and is transposed (a view), `scale` and `embedding` become `weight`,
    and `mean` and `var` of batch_stats `running_mean` and `running_var`. This one rule covers the
    trees of every family that had a Flax class.

    Args:
        tensors: by path joined with "/" or "."; under "params" and "batch_stats" if it has both.

    Raises:
        ValueError: a kernel with no known orientation, or two leaves that become one name.
    """
    split = {name: name.replace("/", ".").split(".") for name in tensors}
    collections = {"params", "batch_stats"}
    in_collections = all(len(parts) > 1 and parts[0] in collections for parts in split.values())
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = split[name]
        statistic = in_collections and parts[0] == "batch_stats"
        *module, leaf = parts[1:] if in_collections else parts
        if leaf == "kernel":
            axes = KERNELS.get(len(tensor.shape))
            if axes is None:
                raise ValueError(f"{name} has shape {tensor.shape}; a kernel has 2, 3 or 4 axes")
            tensor = _transposed(tensor, axes)
        if leaf in ("kernel", "scale", "embedding"):
            leaf = "weight"
        elif statistic and leaf in ("mean", "var"):
            leaf = f"running_{leaf}"
        new = ".".join((*module, leaf))
        if new in result:
            raise ValueError(f"two leaves become {new!r} under PyTorch's names, one of them {name}")
        result[new] = replace(tensor, name=new)
    return result


def _transposed(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    def read() -> np.ndarray:
        return tensor.read().transpose(axes)

    return replace(tensor, shape=tuple(tensor.shape[axis] for axis in axes), read=read)
