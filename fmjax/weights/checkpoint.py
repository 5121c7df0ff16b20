"""Opening a checkpoint of any format, and writing one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType

from fmjax.weights import strict_json
from fmjax.weights.flax_file import has_flax_names, open_flax, to_torch_names
from fmjax.weights.keras_file import open_keras
from fmjax.weights.safetensors_file import open_safetensors, write_safetensors
from fmjax.weights.tensor import MappedFile, Tensor
from fmjax.weights.torch_file import open_torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFERENCE = (
    *(SINGLE, INDEX),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("flax_model.msgpack", "flax_model.msgpack.index.json"),
)
# What an earlier export left, finished or killed.
FILES = r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
OURS = re.compile(rf"({FILES})|\.({FILES})\.\d+\.tmp")
SUFFIXES = {
    ".safetensors": "safetensors",
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), "torch"),
    ".msgpack": "flax msgpack",
    **dict.fromkeys((".h5", ".keras"), "keras"),
}
UNITS = {
    **{"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; a context manager, for its files are mapped while it is open.

    Attributes:
        tensors: by PyTorch name (a Flax checkpoint's are translated; of Keras' files by
            LAYER/WEIGHT), unread.
        format: "safetensors", "torch", "flax msgpack", "flax safetensors" or "keras".
        files: what they come from.
        maps: the open files.
    """

    tensors: dict[str, Tensor]
    format: str
    files: tuple[Path, ...]
    maps: tuple[MappedFile, ...] = field(default=(), repr=False)

    def close(self) -> None:
        """Unmaps the files; arrays already read stay valid, further reading is an error."""
        for file in self.maps:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint without reading its data.

    Args:
        path: a folder, in which the first of `PREFERENCE` is taken, or one file: weights
            (.safetensors, .bin, .pt, .pth, .ckpt, .msgpack, .h5, .keras) or an index of shards
            (.index.json).

    Returns:
        The checkpoint: ``with open_checkpoint(path) as checkpoint: ...``.

    Raises:
        OSError: there is no such file or folder.
        ValueError: no weights in the folder, or a file that is truncated, damaged or hostile.
    """
    place = Path(path)
    if place.is_dir():
        found = [name for name in PREFERENCE if (place / name).exists()]
        if not found:
            there = sorted(entry.name for entry in place.iterdir())
            raise FileNotFoundError(
                f"{place} has no weights: looked for {', '.join(PREFERENCE)}; "
                f"there is {', '.join(there[:30]) or 'nothing'}{' ...' if there[30:] else ''}"
            )
        place = place / found[0]
    if not place.exists():
        raise FileNotFoundError(f"there is no checkpoint {place}")
    if place.name.endswith(".index.json"):
        weight_map = _weight_map(place)
        files = [place.parent / shard for shard in sorted(set(weight_map.values()))]
    else:
        weight_map, files = None, [place]
    kinds = {SUFFIXES.get(file.suffix) for file in files}
    if None in kinds or len(kinds) != 1:
        raise ValueError(
            f"{place}: what format are {sorted({file.suffix for file in files})}? Weights end in "
            f"{', '.join(SUFFIXES)}, and the shards of an index all alike"
        )
    kind = kinds.pop()
    assert kind is not None
    maps: list[MappedFile] = []
    opened = False
    try:
        shards: dict[str, dict[str, Tensor]] = {}
        metadata: dict[str, str] = {}
        for file in files:
            maps.append(_mapped(file))
            shards[file.name], of_shard = _open(kind, maps[-1])
            metadata |= of_shard
        everything = [tensor for shard in shards.values() for tensor in shard.values()]
        if kind == "safetensors" and has_flax_names(everything, metadata):
            kind = "flax safetensors"
        merged = _merge(place, shards, weight_map)
        if kind.startswith("flax"):
            merged = to_torch_names(merged)
        _check_names(place, merged)
        opened = True
        return Checkpoint(merged, kind, tuple(files), tuple(maps))
    finally:
        if not opened:
            for mapped in maps:
                mapped.close()


def _mapped(path: Path) -> MappedFile:
    file = MappedFile(path)
    if file.bytes(0, 20).startswith(b"version https://git"):
        file.close()
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
    return file


def _open(kind: str, file: MappedFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    if kind == "torch":
        return open_torch(file), {}
    if kind == "flax msgpack":
        return open_flax(file), {}
    if kind == "keras":
        return open_keras(file), {}
    tensors, metadata = open_safetensors(file)
    if metadata.get("format") == "tf":
        raise ValueError(f"{file.path} has TensorFlow's names; re-save it from PyTorch")
    return tensors, metadata


def _weight_map(index: Path) -> dict[str, str]:
    """An index's map from tensors to shards, which must be files beside it."""
    with MappedFile(index) as file:
        if file.size > strict_json.MAX_BYTES:
            raise ValueError(f"{index} has {file.size} bytes; the most is {strict_json.MAX_BYTES}")
        data = strict_json.parse_object(file.bytes(0, file.size), str(index))
    entries = data.get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{index} needs a weight_map from tensor names to files")
    weight_map: dict[str, str] = {}
    for name, shard in entries.items():
        # A plain name: nothing that leads out of the folder. (The entry itself may be a symlink,
        # which is how the hub's cache stores snapshots.)
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-][\w. -]*", shard, re.ASCII):
            raise ValueError(f"{index}: {name!r} is mapped to {shard!r}; expected a file's name")
        if shard in (".", ".."):
            raise ValueError(f"{index}: {name!r} is mapped to {shard!r}, outside its folder")
        weight_map[str(name)] = shard
    missing = sorted(
        {shard for shard in weight_map.values() if not (index.parent / shard).exists()}
    )
    if missing:
        raise FileNotFoundError(f"{index} names shards that are not beside it: {missing}")
    return weight_map


def _merge(
    place: Path, shards: Mapping[str, Mapping[str, Tensor]], weight_map: Mapping[str, str] | None
) -> dict[str, Tensor]:
    """The tensors of all shards; those that the index does not name are taken along."""
    absent = [
        f"{name} ({shard})"
        for name, shard in (weight_map or {}).items()
        if name not in shards[shard]
    ]
    if absent:
        raise ValueError(
            f"{place}: {len(absent)} tensors are not in the shard that the index gives: "
            f"{', '.join(absent[:20])}{' ...' if absent[20:] else ''}"
        )
    merged: dict[str, Tensor] = {}
    for shard, tensors in shards.items():
        for name, tensor in tensors.items():
            home = weight_map.get(name, shard) if weight_map else shard
            if home != shard:
                continue  # the index says which of several copies counts
            if name in merged:
                raise ValueError(f"{place}: {name!r} is in two shards and not in the index")
            merged[name] = tensor
    return merged


def _check_names(place: Path, names: Iterable[str]) -> None:
    for name in names:
        # Also keeps terminal control characters out of error messages.
        if not name.isprintable():
            raise ValueError(f"{place}: the tensor name {name!a} is not printable text")


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 5_000_000, "200MB", "5GB" (10**9) or "1GiB" (2**30).

    >>> parse_size("200MB")
    200000000

    Raises:
        ValueError: no such size, or not positive.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"(\d{1,18})(\.\d{1,9})? *([A-Za-z]+)?", size.strip(), re.ASCII)
        unit = UNITS.get((match[3] or "B").upper()) if match else None
        if match is None or unit is None:
            raise ValueError(f"size {size!r} is none such as 5000000, '200MB', '5GB' or '1GiB'")
        result = int(match[1]) * unit + int(float(match[2] or 0) * unit)
    else:
        result = size
    if isinstance(result, bool) or result <= 0:
        raise ValueError(f"size {size!r} must be positive")
    return result


def write_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Iterable[Tensor],
    *,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
    described: Mapping[str, str] = MappingProxyType({}),
) -> list[Path]:
    """Writes model.safetensors, or shards and their index, as Hugging Face names them.

    Everything is written under temporary names first and renamed at the end, the index last; an
    earlier export in the folder is then removed. However it ends, the folder never holds a mixture
    of two exports that `open_checkpoint` would open, nor weights beside what describes others.

    Args:
        folder: made if missing.
        tensors: with distinct names; read one at a time, in no particular order within a shard.
        max_shard_size: bytes, or text for `parse_size`; one tensor may exceed it.
        metadata: of each file; None is {"format": "pt"}, which PyTorch's loader asks for.
        described: by name, the texts of files without which the weights mean nothing, such as
            config.json. Another one is removed before the first weights appear; these come last.

    Returns:
        The files that were written.

    Raises:
        OSError: the folder cannot be written.
        ValueError: a bad size, a name twice, or a dtype that safetensors lacks.
    """
    limit = parse_size(max_shard_size)
    target = Path(folder)
    shards = _split(list(tensors), limit)
    target.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    temporary = {name: target / f".{name}.{os.getpid()}.tmp" for name in names}
    if len(shards) > 1:
        temporary[INDEX] = target / f".{INDEX}.{os.getpid()}.tmp"
    temporary |= {name: target / f".{name}.{os.getpid()}.tmp" for name in described}
    try:
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(temporary[name], shard, metadata=metadata or {"format": "pt"})
        if len(shards) > 1:
            temporary[INDEX].write_text(_index_text(names, shards), encoding="utf-8")
            if any((target / name).exists() for name in names):
                # An older index over shards of the same names must not outlive the first of them.
                (target / INDEX).unlink(missing_ok=True)
        for name, text in described.items():
            temporary[name].write_text(text, encoding="utf-8")
            old = target / name
            if old.is_file() and old.read_bytes() != text.encode():
                old.unlink()
        for name, path in temporary.items():
            os.replace(path, target / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    for path in sorted(target.iterdir()):
        if OURS.fullmatch(path.name) and path.name not in temporary:
            path.unlink()
    return [target / name for name in temporary]


def _split(tensors: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """Consecutive runs of tensors, each within the limit or a single tensor."""
    seen: set[str] = set()
    if twice := sorted({t.name for t in tensors if t.name in seen or seen.add(t.name)}):
        raise ValueError(f"tensor names must be distinct; there more than once: {twice[:10]}")
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _index_text(names: Sequence[str], shards: Sequence[Sequence[Tensor]]) -> str:
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    weight_map = {
        tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
    }
    data = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(data, indent=2) + "\n"
