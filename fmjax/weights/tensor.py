"""A checkpoint's tensor before it is read, and the memory-mapped file it lies in."""

from __future__ import annotations

import math
import mmap
import os
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

Shape = tuple[int, ...]

MAX_AXES = 64  # numpy's own limit
MAX_BYTES = 2**63 - 1
LINE = 64  # bytes that a processor fetches at once
NEAR_CACHE, CACHE = 96 * 2**10, 2**20  # what its caches hold, or a little less


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Tensor:
    """One named array of a checkpoint, read when asked for.

    Attributes:
        name: its name in the checkpoint.
        shape: what `read` returns has this shape.
        dtype: and this dtype; bfloat16 and float8 are those of ml_dtypes.
        read: gives the array, perhaps transposed or not contiguous. A read-only one is a view of
            memory that is not the caller's, mostly of the mapped file, valid for as long as it is
            referenced; a writable one is the caller's to keep.
        release: lets the operating system drop the file's pages that `read` touched. Mapped pages
            count as resident memory, so a loader calls it once it has copied the tensor. Views
            stay valid: their pages are read again when touched.
    """

    name: str
    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    release: Callable[[], None] = _nothing

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Stack:
    """Arrays of one shape as one with a leading axis; nothing is read before `copied`.

    Args:
        parts: at least one; numpy's arrays, perhaps views of a file, or stacks.
    """

    def __init__(self, parts: Sequence[Sliceable]) -> None:
        self.parts = list(parts)
        self.shape: Shape = (len(self.parts), *self.parts[0].shape)
        self.dtype = self.parts[0].dtype

    def __getitem__(self, at: tuple[slice, ...]) -> Stack:
        return Stack([part[at[1:]] for part in self.parts[at[0]]])


Sliceable = np.ndarray | Stack
"""What is sliced, one slice an axis, before it is `copied`."""


def copied(source: Sliceable, dtype: np.dtype | None = None) -> np.ndarray:
    """A new C-contiguous array of the same numbers.

    Args:
        source: views of any layout.
        dtype: that they are cast to; None is theirs.
    """
    result = np.empty(source.shape, dtype or source.dtype)
    copy_into(result, source)
    return result


def copy_into(target: np.ndarray, source: Sliceable) -> None:
    """``target[...] = source``, several times as fast where a matrix is transposed.

    There numpy goes through whole columns, and has forgotten a line of the cache before it comes to
    its next number. Here the columns beside each other are few enough to stay.

    Args:
        target: C-contiguous, of the shape of `source`.
        source: views of any layout.
    """
    if isinstance(source, Stack):
        for index, part in enumerate(source.parts):
            copy_into(target[index, ...], part)
        return
    if target.ndim < 2 or source.strides[-1] == source.itemsize or not target.size:
        target[...] = source
        return
    width = target.shape[-1]
    rows = target.size // width
    step = max(LINE, NEAR_CACHE // rows) // target.itemsize
    if rows * LINE > CACHE:  # not even one line of each row would stay
        step = width
    for start in range(0, width, step):
        target[..., start : start + step] = source[..., start : start + step]


def check_shape(where: str, shape: Sequence[object], itemsize: int) -> tuple[Shape, int]:
    """A shape from a file as a tuple, and the bytes that an array of it takes.

    Args:
        where: file and tensor, for the error.
        shape: what the file claims.
        itemsize: bytes of one element.

    Raises:
        ValueError: an axis that is no integer >= 0, too many axes, or more bytes than an address.
    """
    sizes: list[int] = []
    for size in shape:
        # `type(...) is`: bool is a subclass of int, and True is no size.
        if type(size) is not int or not 0 <= size <= MAX_BYTES:
            raise ValueError(f"{where}: an axis of its shape is no integer from 0 to 2**63 - 1")
        sizes.append(size)
    if len(sizes) > MAX_AXES:
        raise ValueError(f"{where}: {len(sizes)} axes; the most is {MAX_AXES}")
    # numpy multiplies the axes other than 0 even when the array is empty.
    if math.prod(size for size in sizes if size) * itemsize > MAX_BYTES:
        raise ValueError(f"{where}: shape {tuple(sizes)} is larger than memory can be")
    return tuple(sizes), math.prod(sizes) * itemsize


@dataclass(frozen=True)
class Span:
    """Bytes of a file, from `start` to before `stop`."""

    start: int
    stop: int


class MappedFile:
    """A file mapped read-only into memory: nothing of it is resident until it is touched.

    Args:
        path: a regular file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is empty or not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # Asked before opening: opening a named pipe would wait for ever.
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise ValueError(f"{self.path} is not a regular file")
        with open(self.path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                raise ValueError(f"{self.path} is empty: a download that broke off?")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def bytes(self, start: int, stop: int) -> bytes:
        """A copy of a range."""
        return self.data[start:stop]

    def array(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        """A read-only view of `count` elements from byte `start` on, [count]."""
        if self.data.closed:
            raise ValueError(f"{self.path} is closed: read tensors before leaving the checkpoint")
        if count == 0:  # numpy refuses a view at the very end of a buffer
            return np.empty(0, dtype)
        return np.frombuffer(self.data, dtype, count=count, offset=start)

    def release(self, start: int, stop: int) -> None:
        """Drops the resident pages of a byte range."""
        if sys.platform == "win32" or self.data.closed or stop <= start:
            return
        first = start - start % mmap.PAGESIZE
        self.data.madvise(mmap.MADV_DONTNEED, first, stop - first)

    def close(self) -> None:
        """Unmaps the file, or leaves that to the last view of it that is still referenced."""
        try:
            self.data.close()
        except BufferError:
            return

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
