"""CTranslate2's model.bin: its variables, and those of Whisper as PyTorch's tensors.

All numbers are little-endian: the version (u32), the model's kind (text) and revision (u32), the
number of variables (u32), each with its name (text), axes (u8) and their sizes (u32), type (u8),
bytes (u32) and data, and at last pairs of an alias and the name it stands for. A text is its length
with the zero that ends it (u16), then itself.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from fmjax.weights.tensor import MappedFile, Tensor, check_shape

FILE = "model.bin"
VERSION = 6
SPEC, REVISION = "WhisperSpec", 3
MOST = 1_000_000  # variables and aliases; real files have hundreds
DTYPES = {
    0: np.dtype("<f4"),
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
    5: np.dtype(ml_dtypes.bfloat16),
}
# What the scalars of a Whisper that PyTorch's class computes must say.
SCALARS = {
    "decoder/activation": 3,  # GELU
    "decoder/alibi": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
NOT_READ = ("decoder/alignment_heads", "decoder/alignment_layer")


@dataclass(frozen=True)
class CTranslate2:
    """An open model.bin.

    Attributes:
        spec, revision: the kind of model.
        tensors: by CTranslate2's names, unread.
        aliases: names that stand for others.
    """

    spec: str
    revision: int
    tensors: dict[str, Tensor]
    aliases: dict[str, str]


class _Reader:
    """Reads from a position on; nothing beyond the file's end."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.at = file, 0

    def take(self, count: int, what: str) -> int:
        """The position of the next `count` bytes, which must be there."""
        start = self.at
        if count > self.file.size - start:
            raise ValueError(
                f"{self.file.path}: {what} at byte {start} needs {count} bytes and "
                f"{self.file.size - start} are left: a download that broke off, or no CTranslate2 "
                "model"
            )
        self.at += count
        return start

    def number(self, code: str, what: str) -> int:
        size = struct.calcsize(code)
        start = self.take(size, what)
        return struct.unpack(code, self.file.bytes(start, start + size))[0]

    def text(self, what: str) -> str:
        length = self.number("<H", what)
        start = self.take(length, what)
        data = self.file.bytes(start, start + length)
        word = data[:-1]
        fine = data.endswith(b"\0") and word.isascii() and word.decode().isprintable()
        if not word or not fine:
            raise ValueError(
                f"{self.file.path}: {what} at byte {start} is no text that a zero ends: "
                "no CTranslate2 model"
            )
        return word.decode()


def open_ctranslate2(file: MappedFile) -> CTranslate2:
    """The variables of a model.bin, unread; every size and position is checked.

    Raises:
        ValueError: another version or another format, or a file that is truncated, damaged or
            hostile.
    """
    reader = _Reader(file)
    version = reader.number("<I", "the version")
    if version != VERSION:
        raise ValueError(
            f"{file.path} is no CTranslate2 model of version {VERSION}: it begins with {version}"
        )
    spec, revision = reader.text("the kind of model"), reader.number("<I", "its revision")
    tensors: dict[str, Tensor] = {}
    for _ in range(_count(reader, "variables")):
        name = reader.text("a variable's name")
        where = f"{file.path}: {name!r}"
        axes = reader.number("<B", f"the axes of {name!r}")
        sizes = [reader.number("<I", f"the shape of {name!r}") for _ in range(axes)]
        kind = reader.number("<B", f"the type of {name!r}")
        size = reader.number("<I", f"the size of {name!r}")
        if kind not in DTYPES:
            raise ValueError(f"{where} has type {kind}; known are {sorted(DTYPES)}")
        shape, wanted = check_shape(where, sizes, DTYPES[kind].itemsize)
        if size != wanted:
            raise ValueError(f"{where} has {size} bytes; shape {shape} of {DTYPES[kind]} {wanted}")
        if name in tensors:
            raise ValueError(f"{where} is there twice")
        start = reader.take(size, f"the data of {name!r}")
        tensors[name] = _tensor(file, name, shape, DTYPES[kind], start)
    aliases = {}
    for _ in range(_count(reader, "aliases")):
        alias, name = reader.text("an alias"), reader.text("an alias's variable")
        if alias in tensors or alias in aliases or name not in tensors:
            raise ValueError(f"{file.path}: the alias {alias!r} of {name!r} is no alias of one")
        aliases[alias] = name
    if reader.at != file.size:
        raise ValueError(f"{file.path} has {file.size - reader.at} bytes after its last alias")
    return CTranslate2(spec, revision, tensors, aliases)


def _count(reader: _Reader, what: str) -> int:
    count = reader.number("<I", f"the number of {what}")
    if count > MOST:
        raise ValueError(f"{reader.file.path} claims {count} {what}; the most is {MOST}")
    return count


def _tensor(
    file: MappedFile, name: str, shape: tuple[int, ...], dtype: np.dtype, start: int
) -> Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    end = start + count * dtype.itemsize

    def read() -> np.ndarray:
        if start % dtype.itemsize:  # variables follow each other without gaps
            return np.frombuffer(file.bytes(start, end), dtype).reshape(shape)
        return file.array(dtype, start, count).reshape(shape)

    return Tensor(name, shape, dtype, read, lambda: file.release(start, end))


def whisper_tensors(model: CTranslate2, path: Path) -> tuple[list[Tensor], dict[str, int]]:
    """A Whisper's tensors by PyTorch's names, and its sizes as config.json names them.

    Queries, keys and values are one matrix in the file, and keys have a bias there, which is zero.

    Args:
        model: from `open_ctranslate2`.
        path: for errors.

    Raises:
        ValueError: another kind of model, a quantised one, or variables that no Whisper has or
            lacks; all are listed.
    """
    if (model.spec, model.revision) != (SPEC, REVISION):
        raise ValueError(
            f"{path} is a {model.spec} of revision {model.revision}; only {SPEC} of revision "
            f"{REVISION} is read"
        )
    left = dict(model.tensors)
    if quantised := [name for name in left if name.endswith("weight_scale")]:
        raise ValueError(
            f"{path} is quantised ({len(quantised)} scales such as {quantised[0]}); convert it "
            "anew with --quantization float16 or float32"
        )
    problems: list[str] = []
    sizes = {"encoder_attention_heads": 0, "decoder_attention_heads": 0}
    for side in ("encoder", "decoder"):
        heads = left.pop(f"{side}/num_heads", None)
        sizes[f"{side}_attention_heads"] = 0 if heads is None else int(heads.read())
    for name, value in SCALARS.items():
        found = left.pop(name, None)
        if found is None or found.shape or int(found.read()) != value:
            problems.append(f"{name} is {None if found is None else found.read()}, not {value}")
    for name in NOT_READ:
        left.pop(name, None)
    result: list[Tensor] = []
    for ours, theirs, part in _whisper_names(left):
        tensor = left.get(theirs)
        if tensor is None:
            problems.append(f"{theirs} is missing")
            continue
        pieces = _pieces(tensor, part, problems)
        if ours is not None and pieces is not None:
            result.append(_renamed(pieces, f"model.{ours}"))
        elif pieces is not None and pieces.read().any():
            problems.append(f"{theirs}: the keys' bias is not zero, which Whisper's is")
    read = {theirs for _, theirs, _ in _whisper_names(left)}
    problems += [f"{name} is in no Whisper" for name in left if name not in read]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(f"{path}: {len(problems)} problems\n  {shown}")
    for size, name, axis in (
        ("vocab_size", "decoder/embeddings/weight", 0),
        ("d_model", "decoder/embeddings/weight", 1),
        ("num_mel_bins", "encoder/conv1/weight", 1),
        ("max_source_positions", "encoder/position_encodings/encodings", 0),
        ("max_target_positions", "decoder/position_encodings/encodings", 0),
        ("encoder_ffn_dim", "encoder/layer_0/ffn/linear_0/weight", 0),
        ("decoder_ffn_dim", "decoder/layer_0/ffn/linear_0/weight", 0),
    ):
        shape = model.tensors[name].shape
        if len(shape) <= axis:
            raise ValueError(f"{path}: {name} has shape {shape}, which is no matrix")
        sizes[size] = shape[axis]
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"] = _layers(model.tensors, side)
    return result, sizes


def _layers(tensors: Mapping[str, Tensor], side: str) -> int:
    """How many layers a side has: one more than the largest number."""
    numbers = [
        int(m[1]) for name in tensors if (m := re.match(rf"{side}/layer_(\d{{1,4}})/", name))
    ]
    return max(numbers, default=0) + 1


Part = tuple[int, int] | None
"""(which, of how many) equal blocks of rows, or all."""


def _whisper_names(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str | None, str, Part]]:
    """(PyTorch's name inside "model." or None for zeros, CTranslate2's, the part of it)."""

    def norm(ours: str, theirs: str) -> Iterator[tuple[str, str, Part]]:
        yield f"{ours}.weight", f"{theirs}/gamma", None
        yield f"{ours}.bias", f"{theirs}/beta", None

    def dense(ours: str, theirs: str, part: Part = None) -> Iterator[tuple[str | None, str, Part]]:
        yield f"{ours}.weight", f"{theirs}/weight", part
        yield None if ours.endswith("k_proj") else f"{ours}.bias", f"{theirs}/bias", part

    for number in (1, 2):
        yield from dense(f"encoder.conv{number}", f"encoder/conv{number}")
    yield "decoder.embed_tokens.weight", "decoder/embeddings/weight", None
    for side in ("encoder", "decoder"):
        yield f"{side}.embed_positions.weight", f"{side}/position_encodings/encodings", None
        yield from norm(f"{side}.layer_norm", f"{side}/layer_norm")
        for i in range(_layers(tensors, side)):
            ours, theirs = f"{side}.layers.{i}", f"{side}/layer_{i}"
            yield from norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            for place, name in enumerate("qkv"):
                yield from dense(
                    f"{ours}.self_attn.{name}_proj", f"{theirs}/self_attention/linear_0", (place, 3)
                )
            yield from dense(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            if side == "decoder":
                cross, attention = f"{ours}.encoder_attn", f"{theirs}/attention"
                yield from norm(f"{cross}_layer_norm", f"{attention}/layer_norm")
                yield from dense(f"{cross}.q_proj", f"{attention}/linear_0")
                for place, name in enumerate("kv"):
                    yield from dense(f"{cross}.{name}_proj", f"{attention}/linear_1", (place, 2))
                yield from dense(f"{cross}.out_proj", f"{attention}/linear_2")
            yield from norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            yield from dense(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            yield from dense(f"{ours}.fc2", f"{theirs}/ffn/linear_1")


def _pieces(tensor: Tensor, part: Part, problems: list[str]) -> Tensor | None:
    """A block of a tensor's rows, or the tensor."""
    if part is None:
        return tensor
    which, count = part
    if not tensor.shape or tensor.shape[0] % count:
        problems.append(f"{tensor.name} has shape {tensor.shape}; {count} blocks of rows expected")
        return None
    rows = tensor.shape[0] // count
    block = slice(which * rows, (which + 1) * rows)
    read: Callable[[], np.ndarray] = lambda: tensor.read()[block]  # noqa: E731
    return Tensor(tensor.name, (rows, *tensor.shape[1:]), tensor.dtype, read)


def _renamed(tensor: Tensor, name: str) -> Tensor:
    return Tensor(name, tensor.shape, tensor.dtype, tensor.read, tensor.release)
