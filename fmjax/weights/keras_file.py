"""Reading Keras' files of weights without Keras: .h5, .weights.h5 and .keras.

The older .h5 has a group for each layer, whose attribute `weight_names` lists its arrays; a whole
model has these groups in "model_weights". Since Keras 3, .weights.h5 has layers/CLASS_N/vars/I: the
N-th layer of a class, which has its own name as an attribute of `vars`, and its I-th array. A
.keras file is a zip of that and config.json.

Tensors are called LAYER/WEIGHT. Keras numbers layers that were given no name by how many it has
made in the session, and that is what stands in files: here they are counted from 0, in their order.

h5py reads what is where, and the numbers are mapped as in other formats; only arrays that lie in
one piece in the file, as Keras writes them, are taken. No file makes this one open another or run
code; but the HDF5 library may take for ever over one that was made to that end.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from fmjax.weights.strict_json import parse_object
from fmjax.weights.tensor import MappedFile, Shape, Span, Tensor, check_shape
from fmjax.weights.zip_file import stored_members

MAGIC = b"\x89HDF\r\n\x1a\n"
HEAP = b"GCOL\x01\0\0\0"
CONFIG, WEIGHTS = "config.json", "model.weights.h5"  # members of a .keras file
MAX_NAMES = 100_000
MAX_DEPTH = 32
# The arrays of a layer in Keras' order.
VARIABLES = {
    "conv2d": ("kernel", "bias"),
    "depthwise_conv2d": ("kernel", "bias"),
    "separable_conv2d": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "dense": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "layer_normalization": ("gamma", "beta"),
    "normalization": ("mean", "variance", "count"),
}
AUTOMATIC = re.compile(rf"({'|'.join(VARIABLES)})(?:_(\d{{1,9}}))?", re.ASCII)
# "block1_conv1_W_1:0" in the oldest files is kernel.
OLDEST = re.compile(r".*_(W|b)(_\d+)?", re.ASCII)
OLDEST_NAMES = {"W": "kernel", "b": "bias"}
# A weight without a name of its own, as the newer layout calls a layer's first.
UNNAMED = re.compile(r"[Vv]ariable(_\d+)?", re.ASCII)


@dataclass(frozen=True)
class _Layers:
    """What a config.json says of layers, by their place in files, "batch_normalization_1".

    Attributes:
        names: their own names.
        configs: their configs.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class _Window(io.RawIOBase):
    """A part of a mapped file, as a file that h5py reads."""

    def __init__(self, file: MappedFile, span: Span) -> None:
        super().__init__()
        self.file, self.span, self.position = file, span, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        size = self.span.stop - self.span.start
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: size}[whence]
        self.position = max(start + offset, 0)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        start = min(self.span.start + self.position, self.span.stop)
        data = self.file.bytes(start, min(start + len(buffer), self.span.stop))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def open_keras(file: MappedFile) -> dict[str, Tensor]:
    """The weights of a Keras file, unread, by LAYER/WEIGHT.

    Args:
        file: the mapped file; the tensors read from it.

    Raises:
        ImportError: h5py is not installed.
        ValueError: it is no such file, is damaged, holds what Keras does not write, or lacks the
            names of its layers.
    """
    h5py = _library()
    span, layers = Span(0, file.size), _Layers()
    if file.bytes(0, 4) == b"PK\x03\x04":
        members = stored_members(file)
        if missing := [name for name in (CONFIG, WEIGHTS) if name not in members]:
            raise ValueError(f"{file.path} is a zip without {' and '.join(missing)}: not Keras'")
        span, config = members[WEIGHTS], members[CONFIG]
        where = f"{file.path}: {CONFIG}"
        layers = _layers_of(parse_object(file.bytes(config.start, config.stop), where))
    if file.bytes(span.start, span.start + len(MAGIC)) != MAGIC:
        raise ValueError(f"{file.path} is not HDF5: truncated, or of another format?")
    _check_heaps(file, span)
    try:
        with h5py.File(_Window(file, span), "r") as opened:
            reader = _Reader(h5py, file, span, layers)
            return _counted(file, reader.read(opened))
    # What HDF5 says of damaged files comes as any of these.
    except (OSError, RuntimeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.path} is damaged, truncated perhaps: {error}") from error


def _library() -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "Keras' files need h5py, which is not installed: pip install 'fmjax[keras]'"
        ) from error
    return h5py


def _check_heaps(file: MappedFile, span: Span) -> None:
    """Refuses damaged collections of strings, over which HDF5 2.0 loops for ever.

    They are objects one after another, of number, count and size; number 0 is what is left over.
    """
    start = file.data.find(HEAP, span.start, span.stop)
    while start >= 0:
        head = file.bytes(start, min(start + 16, span.stop)).ljust(16, b"\0")
        end = start + int.from_bytes(head[8:], "little")
        position = start + 16
        while position + 16 <= min(end, span.stop):
            head = file.bytes(position, position + 16)
            size = int.from_bytes(head[8:], "little")
            # That of number 0 counts these 16 bytes too, and no others are filled up to 8.
            step = size if head[:2] == b"\0\0" else 16 + (size + 7) // 8 * 8
            if step < 16:
                break
            position += step
        if not position <= end <= span.stop or end - position >= 16:
            raise ValueError(f"{file.path} has a damaged collection of strings at byte {start}")
        start = file.data.find(HEAP, end, span.stop)
    file.release(span.start, span.stop)


def _layers_of(data: Mapping[str, Any]) -> _Layers:
    """The layers of a config.json, counted within their class as in the weights."""
    inner = data.get("config")
    entries = inner.get("layers") if isinstance(inner, dict) else None
    names, configs, counts = {}, {}, Counter()
    for entry in entries if isinstance(entries, list) else ():
        kind = entry.get("class_name") if isinstance(entry, dict) else None
        config = entry.get("config") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or not isinstance(config, dict):
            continue
        kind = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind))
        place = kind.lower() + (f"_{counts[kind]}" if counts[kind] else "")
        counts[kind] += 1
        names[place], configs[place] = str(config.get("name")), config
    return _Layers(names, configs)


def _counted(file: MappedFile, tensors: list[Tensor]) -> dict[str, Tensor]:
    """The tensors by name, layers without a name of their own counted from 0."""
    numbers: dict[str, set[int]] = {}
    parts = [(tensor, *tensor.name.partition("/")) for tensor in tensors]
    for _, layer, _, _ in parts:
        if match := AUTOMATIC.fullmatch(layer):
            numbers.setdefault(match[1], set()).add(int(match[2] or 0))
    orders = {kind: sorted(found) for kind, found in numbers.items()}
    result: dict[str, Tensor] = {}
    for tensor, layer, slash, weight in parts:
        if match := AUTOMATIC.fullmatch(layer):
            layer = f"{match[1]}_{orders[match[1]].index(int(match[2] or 0))}"
        name = layer + slash + weight
        if name in result:
            raise ValueError(f"{file.path}: two arrays have the name {name!r}")
        result[name] = replace(tensor, name=name)
    return result


class _Reader:
    """The groups of one open file; nothing is followed that leads out of it."""

    def __init__(self, h5py: ModuleType, file: MappedFile, span: Span, layers: _Layers) -> None:
        self.h5py, self.file, self.span, self.layers = h5py, file, span, layers
        self.seen: set[int] = set()

    def read(self, root: Any) -> list[Tensor]:
        """All weights of layers; an optimizer's are left out."""
        if "model_weights" in root:
            root = self.child(root, "model_weights")
        if {"layer_names", "layer_names0"} & set(root.attrs):
            return list(self.by_name(root))
        for name in ("layers", "_layer_checkpoint_dependencies"):
            if name in root:
                return list(self.by_place(self.child(root, name)))
        raise ValueError(
            f"{self.file.path} has neither layer_names nor layers: these are not Keras' weights"
        )

    def child(self, group: Any, path: str) -> Any:
        """What a path names in a group, by hard links alone."""
        for name in path.split("/"):
            link = group.get(name, getlink=True)
            if not isinstance(link, self.h5py.HardLink):
                raise ValueError(
                    f"{self.file.path}: {group.name}/{name} is a link to elsewhere, or missing"
                )
            group = group[name]
        return group

    def by_name(self, root: Any) -> Iterator[Tensor]:
        """The older layout."""
        for layer in self.texts(root, "layer_names"):
            group = self.child(root, layer)
            paths = self.texts(group, "weight_names")
            # A model that is a layer of another has the weights of many layers in its group.
            several = len({path.rpartition("/")[0] for path in paths}) > 1
            for path in paths:
                parent, _, weight = path.removesuffix(":0").rpartition("/")
                if match := OLDEST.fullmatch(weight):
                    weight = OLDEST_NAMES[match[1]]
                elif UNNAMED.fullmatch(weight):
                    weight = "vars/0"
                name = f"{layer}/{parent}/{weight}" if several else f"{layer}/{weight}"
                yield self.tensor(name, self.child(group, path))

    def by_place(self, root: Any) -> Iterator[Tensor]:
        """The layout of Keras 3."""
        for place in root:
            group = self.child(root, place)
            found = [
                (path, dataset)
                for path, dataset in self.datasets(group, ())
                if "seed_generator" not in path  # of dropout
            ]
            if not found:
                continue
            layer = self.layers.names.get(place)
            if layer is None and "vars" in group:
                layer = self.text(self.child(group, "vars"), "name")
            if layer is None:
                raise ValueError(
                    f"{self.file.path} does not name its layers, as older versions of Keras wrote "
                    "it: load it with Keras and save the model as .keras, or its weights anew"
                )
            names = self.variables(place, sum(path[:-1] == ("vars",) for path, _ in found))
            for path, dataset in found:
                own = path[:-1] == ("vars",) and int(path[-1]) < len(names)
                weight = names[int(path[-1])] if own else "/".join(path)
                yield self.tensor(f"{layer}/{weight}", dataset)

    def variables(self, place: str, count: int) -> tuple[str, ...]:
        """The names of a layer's arrays."""
        match = AUTOMATIC.fullmatch(place)
        if match is None:
            return ()
        names = VARIABLES[match[1]]
        if match[1] == "batch_normalization" and count < len(names):
            # Only a .keras file says which is missing; elsewhere it is the scale, as in Inception.
            config = self.layers.configs.get(place, {"scale": False})
            kept = {"gamma": config.get("scale", True), "beta": config.get("center", True)}
            return tuple(name for name in names if kept.get(name, True))
        return names

    def datasets(self, group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        """Everything below a group, by path."""
        if len(path) > MAX_DEPTH:
            raise ValueError(f"{self.file.path}: groups nested deeper than {MAX_DEPTH}")
        for name in group:
            child = self.child(group, name)
            if isinstance(child, self.h5py.Dataset):
                if path[-1:] == ("vars",) and not re.fullmatch(r"\d{1,9}", name, re.ASCII):
                    raise ValueError(f"{self.file.path}: {child.name} is no number of an array")
                yield (*path, name), child
            else:
                address = self.h5py.h5o.get_info(child.id).addr
                if address in self.seen:
                    raise ValueError(f"{self.file.path}: {child.name} is in two groups")
                self.seen.add(address)
                yield from self.datasets(child, (*path, name))

    def texts(self, group: Any, name: str) -> list[str]:
        """A list of strings in a group's attributes; a long one is in several, name0, name1, ..."""
        names = [name]
        if name not in group.attrs and f"{name}0" in group.attrs:
            count = next(i for i in range(MAX_NAMES) if f"{name}{i}" not in group.attrs)
            names = [f"{name}{i}" for i in range(count)]
        result: list[str] = []
        for part in names:
            found = self.attribute(group, part)
            if found is None:
                raise ValueError(f"{self.file.path}: {group.name} has no list {name}")
            result += found
        return result

    def text(self, group: Any, name: str) -> str | None:
        """A string in a group's attributes."""
        found = self.attribute(group, name)
        return found[0] if found and len(found) == 1 else None

    def attribute(self, group: Any, name: str) -> list[str] | None:
        """Strings in an attribute, whose size and type are looked at before it is read."""
        if name not in group.attrs:
            return None
        held = group.attrs.get_id(name)
        if math.prod(held.shape or ()) > MAX_NAMES:
            raise ValueError(f"{self.file.path}: {group.name} has {held.shape} {name}")
        if held.shape is None or 0 in held.shape:
            return []
        if self.h5py.check_string_dtype(held.dtype) is None and held.dtype.kind != "S":
            raise ValueError(f"{self.file.path}: {name} of {group.name} are no strings")
        values = np.asarray(group.attrs[name], object).reshape(-1)
        return [
            value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values
        ]

    def tensor(self, name: str, dataset: Any) -> Tensor:
        """An array that lies in one piece in the file."""
        where = f"{self.file.path}: {name!r}"
        if not isinstance(dataset, self.h5py.Dataset) or dataset.shape is None:
            raise ValueError(f"{where} is no array")
        if dataset.is_virtual or dataset.external:
            raise ValueError(f"{where} lies in other files")
        stored, dtype = dataset.dtype, dataset.dtype
        if stored.kind == "V" and self.text(dataset, "dtype") == "bfloat16":
            dtype = np.dtype(ml_dtypes.bfloat16)
        # Numbers of other layouts would come out of the bytes as something else.
        known = self.h5py.h5t.py_create(stored) == dataset.id.get_type()
        numbers = stored.kind in "fiu" or (dtype != stored and dtype.itemsize == stored.itemsize)
        if not known or not numbers:
            raise ValueError(f"{where} has a dtype, {stored}, that is none of numbers")
        shape, nbytes = check_shape(where, dataset.shape, dtype.itemsize)
        layout = dataset.id.get_create_plist().get_layout()
        offset = dataset.id.get_offset()
        if not nbytes:
            offset = 0
        elif layout != self.h5py.h5d.CONTIGUOUS or offset is None:
            raise ValueError(
                f"{where} is chunked, compressed or empty; Keras writes arrays in one piece: save "
                "the weights with Keras again"
            )
        start = self.span.start + offset
        if offset + nbytes > self.span.stop - self.span.start:
            raise ValueError(f"{where} of {nbytes} bytes ends outside the file: truncated?")
        read = partial(_read, self.file, dtype, shape, start)
        release = partial(self.file.release, start, start + nbytes)
        return Tensor(name, shape, _native(dtype), read, release)


def _native(dtype: np.dtype) -> np.dtype:
    """The same numbers in this machine's order of bytes."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def _read(file: MappedFile, dtype: np.dtype, shape: Shape, start: int) -> np.ndarray:
    array = file.array(dtype, start, math.prod(shape)).reshape(shape)
    return array.astype(_native(dtype), copy=False)
