"""TensorBoard event files: Event protocol buffers in TFRecord frames, on disk record by record.

Written here, in a page, because what tensorboardX writes goes through a thread whose queue dies
with the process, and because importing it imports PyTorch where that is installed. The format is
that of tensorflow/core/util/event.proto and tensorflow/core/lib/io/record_writer.h.
"""

from __future__ import annotations

import functools
import os
import struct
import time
from collections.abc import Mapping

import numpy as np


class EventFile:
    """A new event file in a folder; TensorBoard reads the folder's files in the order of names.

    Args:
        folder: made if it is missing.
        step: the first step of this file; what earlier files have at this step or later, which a
            run recorded before it was killed, is hidden.
    """

    def __init__(self, folder: str | os.PathLike[str], *, step: int) -> None:
        os.makedirs(folder, exist_ok=True)
        now = time.time_ns()
        # TensorBoard looks for "tfevents"; nanoseconds, because a restart may take under a second.
        name = f"events.out.tfevents.{now // 10**9}.{now % 10**9:09d}"
        self._file = open(os.path.join(folder, name), "xb")  # noqa: SIM115
        self._write(_bytes(3, b"brain.Event:2"))
        self._write(_varint(2, step) + _bytes(7, _varint(1, 1)))  # session_log.status = START

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event with a scalar for every tag."""
        summary = b"".join(
            _bytes(1, _bytes(1, tag.encode()) + b"\x15" + np.array(value, "<f4").tobytes())
            for tag, value in values.items()
        )
        self._write(_varint(2, step) + _bytes(5, summary))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + event  # wall_time
        size = struct.pack("<Q", len(event))
        self._file.write(size + _masked_crc(size) + event + _masked_crc(event))
        self._file.flush()


def _varint(field: int, value: int) -> bytes:
    return _base128(field << 3) + _base128(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _base128(field << 3 | 2) + _base128(len(content)) + content


def _base128(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C (Castagnoli), rotated and shifted as TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _crc_table()[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@functools.cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for entry in range(256):
        for _ in range(8):
            entry = entry >> 1 ^ (0x82F63B78 if entry & 1 else 0)
        table.append(entry)
    return tuple(table)
