"""Sounds with transcripts or classes: from folders, manifests, and Hugging Face's data sets."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmjax.data.audio import FILES, RATE, Sound, Source, read_audio
from fmjax.data.columns import IGNORED_LABEL, Columns, Ragged, join
from fmjax.data.examples import class_labels, label_reader, read_cells, text_cell
from fmjax.data.files import Rows, raise_problems, read_rows
from fmjax.data.images import class_files
from fmjax.data.text import one_dataset

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class AudioExamples:
    """N sounds of one rate, and what is to be predicted from them.

    Attributes:
      samples: float32 [T] each.
      rate: samples a second.
      texts: what is said in them, or None.
      labels: int32 [N] class indices, or None.
      label_names: the classes in the order of their indices.
      names: of the sounds, such as their files', or None.

    Raises:
      ValueError: sounds of another kind or empty, or texts and labels that are not theirs.
    """

    samples: Sequence[np.ndarray]
    rate: int
    texts: Sequence[str] | None = None
    labels: np.ndarray | None = None
    label_names: tuple[str, ...] = ()
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{len(values)} {name} for {len(self.samples)} sounds"
            for name, values in (
                ("texts", self.texts), ("labels", self.labels), ("names", self.names),
            )
            if values is not None and len(values) != len(self.samples)
        ]  # fmt: skip
        for number, one in enumerate(self.samples):
            if one.dtype != np.float32 or one.ndim != 1 or not len(one):
                problems.append(
                    f"sound {number} is {one.dtype} {list(one.shape)}; it must be float32 [T], T "
                    "at least 1"
                )
        if self.labels is not None:
            wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.label_names)))
            if len(wrong):
                problems.append(
                    f"{len(wrong)} labels are none of the {len(self.label_names)} classes, the "
                    f"first is {self.labels[wrong[0]]} of sound {wrong[0]}"
                )
        raise_problems("AudioExamples", problems)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_labels(self) -> int:
        """How many classes there are."""
        return len(self.label_names)

    @property
    def seconds(self) -> float:
        """How long all sounds are together."""
        return sum(map(len, self.samples)) / self.rate

    def select(self, indices: Sequence[int] | np.ndarray) -> AudioExamples:
        """The examples at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        return dataclasses.replace(
            self,
            samples=[self.samples[i] for i in chosen],
            texts=None if self.texts is None else [self.texts[i] for i in chosen],
            labels=None if self.labels is None else self.labels[chosen],
            names=None if self.names is None else [self.names[i] for i in chosen],
        )

    def columns(
        self,
        features: Callable[[np.ndarray], np.ndarray] | None = None,
        *,
        encode: Callable[[str], Sequence[int]] | None = None,
        max_seconds: float = 30.0,
    ) -> Columns:
        """As they are batched by length.

        Args:
          features: from samples [T] to frames [T', M]: the batch then has ``input_features``
            [B, T', M]. None leaves samples: ``input_values`` [B, T].
          encode: from a text to its tokens: the batch then has ``labels`` int32 [B, U], -100 in
            padding. None gives the classes, if there are any, as ``labels`` int32 [B].
          max_seconds: that a sound may have.

        Raises:
          ValueError: longer sounds, sounds without a frame, no texts to encode, or texts without
            tokens.
        """
        limit = int(max_seconds * self.rate)
        long = [number for number, one in enumerate(self.samples) if len(one) > limit]
        if long:
            raise ValueError(
                f"{len(long)} sounds are longer than max_seconds={max_seconds}, the first is "
                f"{self.name(long[0])} with {len(self.samples[long[0]]) / self.rate:.1f} s; cut "
                "them, leave them out, or allow more"
            )
        rows = list(self.samples) if features is None else [features(one) for one in self.samples]
        name = "input_values" if features is None else "input_features"
        sizes = [len(row) for row in rows]
        longest = limit if features is None else max(sizes, default=1)
        offsets = np.cumsum([0, *sizes], dtype=np.int64)
        parts = [Ragged({name: np.concatenate(rows)}, offsets, longest)]
        if encode is None:
            fixed = {} if self.labels is None else {"labels": self.labels}
            return Columns(tuple(parts), fixed)
        if self.texts is None:
            raise ValueError("these sounds have no texts to encode")
        tokens = [list(encode(text)) for text in self.texts]
        if empty := [number for number, row in enumerate(tokens) if not row]:
            raise ValueError(
                f"{len(empty)} transcripts have no tokens, the first is {self.texts[empty[0]]!r} "
                f"of {self.name(empty[0])}; leave silence out"
            )
        sizes = [len(row) for row in tokens]
        offsets = np.cumsum([0, *sizes], dtype=np.int64)
        fill = {"labels": IGNORED_LABEL}
        parts.append(Ragged({"labels": join(tokens)}, offsets, max(sizes), fill, mask=None))
        return Columns(tuple(parts))

    def name(self, number: int) -> str:
        """What a sound is called in errors."""
        return f"sound {number}" if self.names is None else self.names[number]


def read_audio_folder(
    folder: str | Path, *, rate: int = RATE, label_names: Sequence[str] | None = None
) -> AudioExamples:
    """The sounds of ``FOLDER/CLASS/*.wav`` (or .flac), in the order of their names.

    Args:
      folder: holds a folder for each class.
      rate: samples a second of the result.
      label_names: the classes, such as those of the training sounds; by default the folders'.

    Raises:
      OSError: there is no such folder.
      ValueError: no sounds, unknown classes, or files that are no sounds; all of it is listed.
    """
    root = Path(folder).expanduser()
    files, names, problems = class_files(root, label_names, endings=FILES, what="sounds")
    found, sounds = [str(path.relative_to(root)) for path, _ in files], []
    for name, (path, _) in zip(found, files, strict=True):
        try:
            sounds.append(read_audio(path, rate))
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {error}")
    raise_problems(str(root), problems)
    _say(str(root), sounds)
    return AudioExamples(
        [sound.samples for sound in sounds],
        rate,
        labels=np.array([names.index(name) for _, name in files], np.int32),
        label_names=names,
        names=found,
    )


def read_audio_manifest(
    path: str | os.PathLike[str],
    *,
    audio: str = "path",
    text: str | None = "text",
    label: str | None = None,
    label_names: Sequence[str] | None = None,
    rate: int = RATE,
) -> AudioExamples:
    """Sounds that a .jsonl, .csv or .tsv file lists, each with its transcript, class or both.

    Args:
      path: the file.
      audio: the column of the sounds' files, relative to the manifest's folder.
      text: the column of transcripts; None for none.
      label: the column of classes; None for none.
      label_names: the classes; by default those there are, in their order.
      rate: samples a second of the result.

    Raises:
      OSError: the manifest cannot be read.
      ValueError: columns that are missing, cells that are empty, or files that are no sounds; all
        of it is listed, by row.
    """
    folder = Path(path).expanduser().parent
    columns = [column for column in (audio, text, label) if column is not None]
    return _from_rows(
        read_rows(path, columns), lambda cell: folder / str(cell), audio=audio, text=text,
        label=label, label_names=label_names, rate=rate,
    )  # fmt: skip


def from_audio_datasets(
    dataset: str | datasets.Dataset | datasets.DatasetDict,
    split: str | None = None,
    *,
    config: str | None = None,
    audio: str = "audio",
    text: str | None = "text",
    label: str | None = None,
    label_names: Sequence[str] | None = None,
    rate: int = RATE,
) -> AudioExamples:
    """Reads the sounds of a data set of Hugging Face's `datasets` package, with our own decoder.

    Args:
      dataset: a hub id, an "audiofolder" among them, a DatasetDict (both need `split`) or one
        Dataset.
      split: as `datasets` spells it.
      config: of a hub id that has several.
      audio: the column of sounds.
      text: the column of transcripts ("sentence", "transcription", ...); None for none.
      label: the column of classes; None for none.
      label_names: by default the names of the column's ClassLabel.
      rate: samples a second of the result.

    Raises:
      ImportError: `datasets` is not installed.
      ValueError: a missing split or column, or wrong rows; all are listed.
    """
    where, found = one_dataset(dataset, split, config, [audio, text, label])
    import datasets

    if isinstance(found.features[audio], datasets.Audio):
        found = found.cast_column(audio, datasets.Audio(decode=False))
    classes = None
    if label is not None and isinstance(feature := found.features[label], datasets.ClassLabel):
        classes = feature.names
    kept = [name for name in found.column_names if name in (audio, text, label, "id")]
    cells: list[Any] = list(found.select_columns(kept).with_format(None))
    return _from_rows(
        Rows(where, list(range(1, len(cells) + 1)), cells, []), _of_cell, audio=audio, text=text,
        label=label, label_names=label_names, class_names=classes, rate=rate,
    )  # fmt: skip


def _of_cell(cell: Any) -> Any:
    """A cell of `datasets`: bytes, a path, or samples with their rate."""
    if isinstance(cell, dict):
        if cell.get("bytes") is not None:
            return cell["bytes"]
        if cell.get("array") is not None:
            return np.asarray(cell["array"]), cell["sampling_rate"]
        if cell.get("path") is not None:
            return cell["path"]
    return cell


def _from_rows(
    rows: Rows,
    source: Callable[[Any], Source],
    *,
    audio: str,
    text: str | None,
    label: str | None,
    label_names: Sequence[str] | None,
    rate: int,
    class_names: Sequence[str] | None = None,
) -> AudioExamples:
    """The examples of rows, or one error with all that is wrong."""

    def sound(cell: Any) -> Sound:
        if cell is None or cell == "":
            raise ValueError("is missing")
        try:
            return read_audio(source(cell), rate)
        except (OSError, ValueError) as error:
            raise ValueError(f"{_called(cell)} is not read: {error}") from error

    readers: dict[str, Callable[[Any], Any]] = {audio: sound}
    if text is not None:
        readers[text] = text_cell
    if label is not None:
        readers[label] = label_reader("single_label_classification", class_names)
    values, problems = read_cells(rows, readers)
    names, labels = (), None
    if label is not None:
        names, labels = class_labels(
            rows, label, values[label], label_names or class_names, False, problems
        )
    raise_problems(rows.where, problems)
    sounds: list[Sound] = values[audio]
    _say(rows.where, sounds)
    called = [
        _called(row[audio]) or f"row {n}" for n, row in zip(rows.numbers, rows.cells, strict=True)
    ]
    texts = None if text is None else values[text]
    return AudioExamples([one.samples for one in sounds], rate, texts, labels, names, called)


def _called(cell: Any) -> str:
    """The file that a cell names, or ""."""
    path = cell.get("path") if isinstance(cell, dict) else cell
    return path if isinstance(path, str) else ""


def _say(where: str, sounds: Sequence[Sound]) -> None:
    """Logs what had to be changed, once for each kind of change."""
    changes = collections.Counter(change for sound in sounds for change in sound.changes)
    for change, count in changes.items():
        logger.warning("%s: of %d of %d sounds: %s", where, count, len(sounds), change)
