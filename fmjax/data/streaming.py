"""Language-model batches from files larger than memory: tokenized in the pipeline, as they come.

Files are read in blocks of some 256 KiB, wherever they begin in a file; a window of a few
blocks, in random order, is tokenized and packed into rows, by a thread that works ahead. So memory
is bounded by the window, also where a line never ends, and a position is which window and which of
its rows comes next.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import os
import re
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from fmjax.data.batches import check_options, check_state
from fmjax.data.corruption import Corruption, corrupted_batch, corruption_identity
from fmjax.data.files import parse_json
from fmjax.data.language import PACKINGS, Packing, tokenize_documents
from fmjax.data.packing import Layout, Packer, concatenated, language_batch
from fmjax.data.tokens import special_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip")
HASHED_BYTES = 1 << 16  # at both ends of a file, by which a saved position knows it again


class Blocks(Protocol):
    """Documents in groups that can be read in any order."""

    @property
    def fingerprint(self) -> str:
        """What tells these documents from others."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sequence[str]: ...


@dataclasses.dataclass(frozen=True)
class TextBlocks:
    """The documents of text files, by blocks of bytes; nothing is read until a block is asked for.

    A document belongs to the block in which it begins. One that is longer than a block is cut,
    near white space, into as many documents as needed.

    Attributes:
      paths: the files, in UTF-8.
      block_bytes: of a block.
      separator: what ends a document: a line break, or two for documents separated by empty lines.
        A line break may also be CRLF in the files, and an empty line may hold spaces.
      field: in JSON Lines, the key of the text.

    Raises:
      ValueError: no files, compressed ones (they have no blocks), empty ones, or a setting out of
        its range.
      OSError: a file cannot be read.
    """

    paths: tuple[Path, ...]
    block_bytes: int = 1 << 18
    separator: str = "\n"
    field: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if not self.paths:
            problems.append("there are no files")
        if self.block_bytes < 16:
            problems.append(f"block_bytes={self.block_bytes} must be at least 16")
        if not self.separator:
            problems.append("separator is empty; give what ends a document")
        if self.field is not None and self.separator != "\n":
            problems.append(
                f"field={self.field!r} is for JSON Lines, whose separator is a line end"
            )
        problems += [
            f"{path} is compressed and cannot be read from its middle; unpack it"
            for path in self.paths
            if path.suffix.lower() in PACKED_SUFFIXES
        ]
        if problems:
            raise ValueError("text blocks: " + "; ".join(problems))
        if not sum(self.sizes):
            raise ValueError(f"{', '.join(map(str, self.paths))}: there is no text in it")

    @classmethod
    def of(cls, *paths: str | os.PathLike[str], **settings: Any) -> TextBlocks:
        """From the files' names and the other attributes."""
        return cls(tuple(Path(path) for path in paths), **settings)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Bytes of each file."""
        return [path.stat().st_size for path in self.paths]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the settings and of each file's size, beginning and end."""
        digest = hashlib.sha256(f"{self.block_bytes} {self.separator!r} {self.field}".encode())
        for path, size in zip(self.paths, self.sizes, strict=True):
            digest.update(str(size).encode())
            with path.open("rb") as file:
                digest.update(file.read(HASHED_BYTES))
                file.seek(max(0, size - HASHED_BYTES))
                digest.update(file.read(HASHED_BYTES))
        return digest.hexdigest()[:16]

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        """int64 [files + 1]: the number of each file's first block."""
        return np.cumsum([0, *(-(-size // self.block_bytes) for size in self.sizes)])

    @functools.cached_property
    def _ends(self) -> str:
        """The separator as a regular expression."""
        lines = [re.escape(line) for line in self.separator.split("\n")]
        between = [line or "[ \\t]*" for line in lines[1:-1]]
        return "\\r?\\n".join([lines[0], *between, *lines[1:][-1:]])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> list[str]:
        """The documents of a block; empty ones are left out.

        Raises:
          ValueError: bytes that are not UTF-8, or a line that is no JSON object with the field.
          OSError: the file cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        path, block = self.paths[number], index - int(self._firsts[number])
        with path.open("rb") as file:
            start = self._cut(file, block, self.sizes[number])
            end = self._cut(file, block + 1, self.sizes[number])
            file.seek(start)
            content = file.read(end - start)
        try:
            text = content.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: byte 0x{error.object[error.start]:02x} in the block at byte {start} is "
                f"not UTF-8; convert the file, for instance: iconv -f WINDOWS-1252 -t UTF-8"
            ) from error
        documents = [document.strip("\r\n") for document in re.split(self._ends, text)]
        documents = [document for document in documents if document.strip()]
        if self.field is None:
            return documents
        return [_field(path, start, line, self.field) for line in documents]

    def _cut(self, file: BinaryIO, block: int, size: int) -> int:
        """The byte at which a block begins: behind the first document that ends in it.

        Where none does, behind the first space in it. So each block is found without reading the
        others, and no document is cut that is not longer than a block.
        """
        begin = block * self.block_bytes
        if begin == 0 or begin >= size:
            return min(begin, size)
        before = min(begin, 2 * len(self.separator.encode()))  # of "\n" may be "\r\n"
        file.seek(begin - before)
        content = file.read(before + self.block_bytes)
        ends = re.compile(self._ends.encode())
        found = ends.search(content)
        while found and found.end() < before:
            found = ends.search(content, found.start() + 1)
        if found:
            return begin - before + found.end()
        if begin + self.block_bytes >= size:
            return size
        if self.field is not None:
            raise ValueError(
                f"{file.name}: the line around byte {begin} is longer than block_bytes="
                f"{self.block_bytes}; give more, a JSON object cannot be cut"
            )
        return begin + _break(content[before:])


def _break(content: bytes) -> int:
    """Where a long document may be cut: behind the first space, else between two characters."""
    if found := re.search(rb"\s", content):
        return found.end()
    return next((i for i, byte in enumerate(content[:4]) if byte & 0xC0 != 0x80), 0)


def _field(path: Path, start: int, line: str, field: str) -> str:
    try:
        text = parse_json(line)[field]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path}: in the block at byte {start}, {line[:60]!r} is no JSON object with a "
            f"{field!r} ({error!r})"
        ) from error
    if not isinstance(text, str):
        raise ValueError(f"{path}: in the block at byte {start}, {field!r} is {text!r}, no text")
    return text


class _Window(NamedTuple):
    """Some documents as rows."""

    tokens: np.ndarray
    layout: Layout


@dataclasses.dataclass(frozen=True, eq=False)
class _Windows:
    """Window w of all epochs, tokenized and packed: what grain calls a random-access source."""

    tokenizer: PreTrainedTokenizerBase
    blocks: Blocks
    blocks_at_once: int
    length: int
    packing: Packing
    seed: int
    shuffle: bool
    vocab_size: int | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    epochs: int | None

    @property
    def per_epoch(self) -> int:
        return -(-len(self.blocks) // self.blocks_at_once)

    def __len__(self) -> int:
        return sys.maxsize if self.epochs is None else self.epochs * self.per_epoch

    def __getitem__(self, index: int) -> _Window:
        epoch, within = divmod(index, self.per_epoch)
        chosen = self._order(epoch)[within * self.blocks_at_once :][: self.blocks_at_once]
        texts = [text for block in chosen for text in self.blocks[int(block)]]
        documents = tokenize_documents(
            self.tokenizer, texts, self.before, self.after, vocab_size=self.vocab_size
        )
        rng = np.random.default_rng([self.seed, epoch, within]) if self.shuffle else None
        if self.packing == "documents":
            layout = Packer.of(documents.offsets, self.length).layout(rng)
        else:
            layout = concatenated(documents.offsets, self.length, rng)
        return _Window(documents.tokens, layout)

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.blocks))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks))


def _pieces(taken: tuple[_Window, int]) -> list[np.ndarray]:
    window, row = taken
    return window.layout.pieces(window.tokens, row)


class TextStream(Iterator[dict[str, np.ndarray]]):
    """An iterator over batches of rows, with a position that can be saved and restored.

    Made by `stream_batches`; the batches are those of `language_batches`, except that ``index`` is
    the number of the row in the stream.

    Attributes:
      shapes: the one shape of this process's batches.
    """

    def __init__(
        self,
        windows: _Windows,
        *,
        batch_size: int,
        pad_id: int,
        corruption: Corruption | None,
        identity: Mapping[str, Any],
        process_index: int,
        process_count: int,
        prefetch: int,
    ) -> None:
        import grain  # over a second

        lengths = (windows.length,)
        if corruption is not None:
            lengths = corruption.lengths(windows.length)
        self.shapes = [(batch_size // process_count, *lengths)]
        self._windows = windows
        self._batch_size = batch_size
        self._pad_id = pad_id
        self._corruption = corruption
        self._identity = dict(identity)
        self._mine = slice(process_index, None, process_count)
        self._number = 0  # of the next batch
        self._next = 0  # the window that the iterator returns next
        self._open: _Window | None = None  # the one before it, where rows of it are left
        self._row = 0  # the next row of that
        self._iterator = iter(
            grain.MapDataset.source(windows).to_iter_dataset(
                grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
            )
        )
        weakref.finalize(self, self._iterator.close)

    def __next__(self) -> dict[str, np.ndarray]:
        taken: list[tuple[_Window, int]] = []
        while len(taken) < self._batch_size and (window := self._advance()) is not None:
            upto = min(self._row + self._batch_size - len(taken), len(window.layout))
            taken += [(window, row) for row in range(self._row, upto)]
            self._row = upto
        if not taken:
            raise StopIteration
        batch = self._assemble(taken)
        self._number += 1
        return batch

    def _advance(self) -> _Window | None:
        """The window that has rows left; None at the end of the last epoch."""
        # Whole epochs of nothing would never end; between two others lie less than two.
        for _ in range(2 * self._windows.per_epoch + 1):
            if self._open is not None and self._row < len(self._open.layout):
                return self._open
            self._open, self._row = next(self._iterator, None), 0
            if self._open is None:
                return None
            self._next += 1
        raise ValueError("no document has a token; there is nothing to learn")

    def _assemble(self, taken: list[tuple[_Window, int]]) -> dict[str, np.ndarray]:
        places = np.arange(self._batch_size)
        places[len(taken) :] = -1
        own = places[self._mine]
        # int32 as everywhere: past 2**31 rows the numbers begin again.
        index = np.where(own >= 0, (own + self._number * self._batch_size) % 2**31, -1)
        if self._corruption is None:
            return language_batch(
                [_pieces(taken[place]) if place >= 0 else () for place in own],
                index,
                length=self._windows.length,
                pad_id=self._pad_id,
                separate=self._windows.packing == "documents",
            )
        batch = corrupted_batch(
            self._corruption,
            lambda place: np.concatenate(_pieces(taken[place])),
            self._number,
            places,
            self._mine,
            length=self._windows.length,
            seed=self._windows.seed,
        )
        return {**batch, "index": index.astype(np.int32)}

    def get_state(self) -> dict[str, Any]:
        """The position, after the last batch that was returned, ready for json.dumps.

        It is the same in every process, and may be restored with another number of them.
        """
        left = self._open is not None and self._row < len(self._open.layout)
        return {
            "position": {
                "window": self._next - 1 if left else self._next,
                "row": self._row if left else 0,
                "batch": self._number,
            },
            "stream": dict(self._identity),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a position, bitwise as the stream it was taken from would have.

        Raises:
          ValueError: a state of other files, another tokenizer, seed, batch size or packing, or a
            position behind the end of a stream of few epochs.
        """
        check_state(state, self._identity)
        position = state["position"]
        if not 0 <= position["window"] <= len(self._windows):
            raise ValueError(
                f"the saved position is window {position['window']}, this stream ends at "
                f"{len(self._windows)}; give it more epochs"
            )
        self._iterator.set_state({"next_index": position["window"]})
        self._next, self._open, self._row = position["window"], None, 0
        self._number = position["batch"]
        if position["row"] and self._advance() is not None:
            self._row = position["row"]

    def close(self) -> None:
        """Ends the tokenizing thread; the stream cannot be used any more."""
        self._iterator.close()


def stream_batches(
    tokenizer: PreTrainedTokenizerBase,
    blocks: Blocks,
    *,
    length: int,
    batch_size: int,
    pad_id: int,
    packing: Packing = "documents",
    corruption: Corruption | None = None,
    vocab_size: int | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
    end: bool = True,
    blocks_at_once: int = 8,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 1,
) -> TextStream:
    """A stream of rows of T tokens from files that need not fit into memory.

    As `language_batches`, with documents packed within windows of a few blocks: at the end of each
    window a row is left that may not be full. The rows are the same in every process, each of
    which reads and tokenizes all of them; where that is too slow, tokenize once with
    `encode_documents` and save the tokens as a `numpy.memmap`.

    Args:
      tokenizer: a fast one of `transformers`.
      blocks: the files, as `TextBlocks`.
      length, batch_size, pad_id, packing, corruption: as in `language_batches`.
      vocab_size, bos_id, eos_id, end: as in `encode_documents`.
      blocks_at_once: of a window; more mix better and take more memory, and more time to resume.
      seed, shuffle, epochs, process_index, process_count: as in `batches`.
      prefetch: windows that a thread prepares ahead; 0 for no thread.

    Raises:
      ValueError: a number out of its range, no end token; while iterating, documents that have no
        token at all, or a token id outside the model's vocabulary.
    """
    problems = check_options(
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        process_index=process_index,
        process_count=process_count,
        prefetch=prefetch,
    )
    if packing not in PACKINGS:
        problems.append(f"packing={packing!r} is not one of {PACKINGS}")
    if length < 2:
        problems.append(f"length={length} must be at least 2, for a token and the next")
    if blocks_at_once < 1:
        problems.append(f"blocks_at_once={blocks_at_once} must be at least 1")
    if problems:
        raise ValueError("; ".join(problems))
    eos = special_id(tokenizer, "eos", eos_id) if end else None
    windows = _Windows(
        # A tokenizer serves one thread at a time, and the caller's may be used beside this one.
        tokenizer=copy.deepcopy(tokenizer),
        blocks=blocks,
        blocks_at_once=blocks_at_once,
        length=length,
        packing=packing,
        seed=seed,
        shuffle=shuffle,
        vocab_size=vocab_size,
        before=() if bos_id is None else (bos_id,),
        after=() if eos is None else (eos,),
        epochs=epochs,
    )
    return TextStream(
        windows,
        batch_size=batch_size,
        pad_id=pad_id,
        corruption=corruption,
        identity={
            "data": blocks.fingerprint,
            "tokenizer": vocabulary_hash(tokenizer),
            "bos_id": bos_id,
            "eos_id": eos,
            "blocks_at_once": blocks_at_once,
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
            "length": length,
            "packing": packing,
            "pad_id": pad_id,
            **corruption_identity(corruption),
        },
        process_index=process_index,
        process_count=process_count,
        prefetch=prefetch,
    )


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells a tokenizer's vocabulary from others."""
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(pieces).encode("utf-8", "surrogatepass")).hexdigest()[:16]
