"""Texts for the experiments: a named set, or files for "train", "val" and "test"."""

from __future__ import annotations

import dataclasses

from fmjax.data.corpus import read_documents
from fmjax.data.parallel import read_pairs
from fmjax.data.records import Documents, TextPairs

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """A named set, or a file of training texts with those held out beside it."""

    data: str
    """A named set, or a file."""
    val: str | None = None
    """Validation texts, when data is a file."""
    test: str | None = None
    """Test texts, when data is a file."""

    def files(self) -> dict[str, str]:
        """The three files by split.

        Raises:
            ValueError: one is missing.
        """
        if self.val is None or self.test is None:
            raise ValueError(f"data={self.data!r} is a file: give val=FILE and test=FILE too")
        return {"train": self.data, "val": self.val, "test": self.test}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus(Files):
    """Where running text comes from."""

    data: str = "brown"
    """The Brown corpus, or a text file with empty lines between documents."""


def load_corpus(settings: Corpus) -> dict[str, Documents]:
    """The documents of "train", "val" and "test".

    Raises:
        ValueError: a file without the two others, or text that does not fit.
        OSError: the corpus cannot be fetched, or a file not read.
    """
    if settings.data == "brown":
        from fmjax.data.brown import load_brown_documents

        return {split: load_brown_documents(split) for split in SPLITS}
    return {
        split: read_documents(path, separator="blank") for split, path in settings.files().items()
    }


def read_pair_files(settings: Files, source: str, target: str) -> dict[str, TextPairs]:
    """The pairs of three .tsv, .csv or .jsonl files with these two columns.

    Raises:
        ValueError: a file without the two others, or rows that do not fit.
        OSError: a file cannot be read.
    """
    return {
        split: read_pairs(path, source=source, target=target)
        for split, path in settings.files().items()
    }
