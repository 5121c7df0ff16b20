"""Running text for the experiments that train from scratch: the Brown corpus, or files."""

from __future__ import annotations

import dataclasses

from fmjax.data.corpus import read_documents
from fmjax.data.records import Documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where running text comes from."""

    data: str = "brown"
    """The Brown corpus, or a text file with empty lines between documents."""
    val: str | None = None
    """Validation text, when data is a file."""
    test: str | None = None
    """Test text, when data is a file."""


def load_corpus(settings: Corpus) -> dict[str, Documents]:
    """The documents of "train", "val" and "test".

    Raises:
        ValueError: a file without the two others, or text that does not fit.
        OSError: the corpus cannot be fetched, or a file not read.
    """
    if settings.data == "brown":
        from fmjax.data.brown import load_brown_documents

        return {split: load_brown_documents(split) for split in ("train", "val", "test")}
    if settings.val is None or settings.test is None:
        raise ValueError(f"data={settings.data!r} is a file: give val=FILE and test=FILE too")
    files = {"train": settings.data, "val": settings.val, "test": settings.test}
    return {split: read_documents(path, separator="blank") for split, path in files.items()}
