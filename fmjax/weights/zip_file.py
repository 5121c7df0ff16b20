"""Zips whose members are stored as they are, so that they can be mapped without unpacking."""

from __future__ import annotations

import struct
import zipfile

from fmjax.weights.tensor import MappedFile, Span


def stored_members(file: MappedFile) -> dict[str, Span]:
    """The members of a zip by name, and where their bytes are.

    Raises:
        ValueError: the zip is damaged, or a member is compressed, encrypted or there twice.
    """
    try:
        with zipfile.ZipFile(file.path) as archive:
            infos = archive.infolist()
    # zipfile lets all of these through when its records are damaged.
    except (
        *(zipfile.BadZipFile, NotImplementedError, OSError, struct.error),
        *(EOFError, OverflowError, ValueError, IndexError),
    ) as error:
        raise ValueError(f"{file.path} is a damaged zip, truncated perhaps: {error}") from error
    members: dict[str, Span] = {}
    for info in infos:
        where = f"{file.path}: its member {info.filename[:100]!r}"
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(
                f"{where} is compressed, which weights never are: unpack and zip -0 it"
            )
        if info.flag_bits & 0x1:
            raise ValueError(f"{where} is encrypted")
        start = info.header_offset
        if not 0 <= start <= file.size - 30:
            raise ValueError(f"{where} begins outside the file")
        header = file.bytes(start, start + 30)
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"{where} has no header at byte {start}")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start += 30 + name_length + extra_length
        if start + info.file_size > file.size:
            raise ValueError(f"{where} ends outside the file")
        if info.filename in members:
            raise ValueError(f"{where} is there twice")
        members[info.filename] = Span(start, start + info.file_size)
    return members
