"""Reading and writing one .safetensors file.

The format: 8 bytes header length (little-endian), a JSON object from tensor names to
{"dtype", "shape", "data_offsets"}, then the data, which the tensors fill without overlap or hole.
https://huggingface.co/docs/safetensors (section Format).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from fmjax.weights.strict_json import parse_object
from fmjax.weights.tensor import MappedFile, Shape, Tensor, check_shape, copied

MAX_HEADER = 100_000_000  # the safetensors library's own limit

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(scalar)
    for name, scalar in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "C64": np.complex64,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_safetensors(file: MappedFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, unread, and its metadata.

    Args:
        file: the mapped file; the tensors read from it.

    Returns:
        (tensors by name, metadata, {} where there is none).

    Raises:
        ValueError: anything in the header that is not exactly as the format says.
    """
    path = file.path
    if file.size < 8:
        raise ValueError(f"{path} has {file.size} bytes, too few for a safetensors file")
    (length,) = struct.unpack("<Q", file.bytes(0, 8))
    if length > MAX_HEADER:
        raise ValueError(f"{path}: header of {length} bytes; the most is {MAX_HEADER}")
    start = 8 + length
    if start > file.size:
        raise ValueError(f"{path}: header of {length} bytes in a file of {file.size}: truncated?")
    header = parse_object(file.bytes(8, start), f"{path}: the header")
    metadata = _metadata(header.pop("__metadata__", {}), path)
    tensors: dict[str, Tensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(f"{path}: tensor {name!r}", entry)
        ranges.append((begin, end, name))
        tensors[name] = Tensor(
            name,
            shape,
            dtype,
            partial(_read, file, dtype, shape, start + begin),
            partial(file.release, start + begin, start + end),
        )
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a hole"
            raise ValueError(f"{path}: tensor {name!r} at {begin} {fault}; expected {position}")
        position = end
    if start + position != file.size:
        raise ValueError(
            f"{path} has {file.size} bytes where its header describes {start + position}: "
            "truncated, or not all of it is tensors"
        )
    return tensors, metadata


def _metadata(entry: object, path: Path) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError(f"{path}: __metadata__ must map strings to strings")
    return {str(key): value for key, value in entry.items()}


def _entry(where: str, entry: object) -> tuple[np.dtype, Shape, int, int]:
    """dtype, shape, begin and end of one tensor of the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has a dtype that is none of {', '.join(DTYPES)}")
    if not isinstance(shape, list):
        raise ValueError(f"{where}: shape must be a list")
    sizes, nbytes = check_shape(where, shape, DTYPES[dtype].itemsize)
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise ValueError(f"{where}: data_offsets must be two integers")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise ValueError(f"{where}: data_offsets {offsets} must be 0 <= begin <= end")
    if end - begin != nbytes:
        raise ValueError(
            f"{where}: {dtype} of shape {sizes} takes {nbytes} bytes, data_offsets {offsets} "
            f"give it {end - begin}"
        )
    return DTYPES[dtype], sizes, begin, end


def _read(file: MappedFile, dtype: np.dtype, shape: Shape, start: int) -> np.ndarray:
    return file.array(dtype, start, int(np.prod(shape, dtype=np.int64))).reshape(shape)


def write_safetensors(
    path: Path, tensors: Iterable[Tensor], *, metadata: Mapping[str, str]
) -> None:
    """Writes one file, one tensor in memory at a time.

    Args:
        path: written in place: the caller gives a temporary name and renames it.
        tensors: in any order; the file has the library's order (widest dtype first, then name).
        metadata: strings to strings.

    Raises:
        OSError: it cannot be written.
        ValueError: a dtype the format lacks, a name twice, or a tensor that reads as something
            other than it says.
    """
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in ordered:
        if tensor.name in header or tensor.name == "__metadata__":
            raise ValueError(f"the tensor name {tensor.name!r} is taken; names must be distinct")
        if tensor.dtype not in NAMES:
            raise ValueError(
                f"tensor {tensor.name!r} has dtype {tensor.dtype}, which safetensors cannot hold; "
                f"it has {', '.join(str(dtype) for dtype in NAMES)}"
            )
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in ordered:
            array = tensor.read()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(
                    f"tensor {tensor.name!r} should be {tensor.dtype}{list(tensor.shape)}, but "
                    f"reads as {array.dtype}{list(array.shape)}"
                )
            array = array if array.flags.c_contiguous else copied(array)
            # As bytes: the buffer protocol does not know bfloat16.
            file.write(array.reshape(-1).view(np.uint8).data)
            tensor.release()
