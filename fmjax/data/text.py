"""Texts with labels: from files, from TFDS, from Hugging Face `datasets`, from one name.

Whatever the source, the result is one `TextExamples`, and whatever is wrong is one ValueError
that lists the rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmjax.data.examples import ProblemType, TextExamples, examples_from_rows
from fmjax.data.files import Rows, raise_problems, read_rows

if TYPE_CHECKING:
    import datasets
    import tensorflow_datasets as tfds

__all__ = ["TextExamples", "from_builder", "from_datasets", "from_tfds", "load_text", "read_text"]


def load_text(
    source: str | os.PathLike[str],
    split: str | None = None,
    *,
    text: str = "text",
    text_pair: str | None = None,
    label: str | None = "label",
    label_names: Sequence[str] | None = None,
    problem_type: ProblemType = "single_label_classification",
    data_dir: str | os.PathLike[str] | None = None,
) -> TextExamples:
    """Loads texts from wherever `source` points.

    Args:
      source: "sentiment/movie" (or tweets, amazon, editorials), "tfds:NAME", "hf:NAME" or
        "hf:NAME:CONFIG", or the path of a .tsv, .csv or .jsonl file.
      split: "train", "val" or "test" for sentiment; what the data set calls it for tfds and hf
        (slices such as "train[:90%]" work); None for a file.
      text, text_pair, label: columns; `label=None` reads texts without labels.
      label_names, problem_type: see `read_text`.
      data_dir: where TFDS keeps its files; only for "tfds:".

    Raises:
      ValueError: an unknown source, a missing or needless split, or wrong rows.
      OSError: the file cannot be read or an asset cannot be downloaded.
    """
    source = os.fspath(source)
    scheme, _, name = source.partition(":")
    # The sets of the paper win over a local folder of the same name: say ./sentiment/... for that.
    sentiment = source.startswith("sentiment/")
    is_file = not sentiment and scheme not in ("tfds", "hf")
    if is_file and split is not None:
        raise ValueError(f"split={split!r} with the file {source}: a file is one split; drop it")
    if not is_file and not sentiment and not name:
        raise ValueError(f"{source!r} names no data set: write its name behind the colon")
    if not is_file and split is None:
        raise ValueError(f"{source} has several splits: name one, for instance split='train'")
    if data_dir is not None and scheme != "tfds":
        raise ValueError(f"data_dir={os.fspath(data_dir)!r} is for 'tfds:NAME', not for {source}")
    columns: dict[str, Any] = {
        "text": text,
        "text_pair": text_pair,
        "label": label,
        "label_names": label_names,
        "problem_type": problem_type,
    }
    if sentiment:
        from fmjax.data.sentiment import builder  # imports tensorflow_datasets: seconds

        return from_builder(builder(source.removeprefix("sentiment/")), str(split), **columns)
    if scheme == "tfds":
        return from_tfds(name, str(split), data_dir=data_dir, **columns)
    if scheme == "hf":
        repository, _, config = name.partition(":")
        return from_datasets(repository, split, config=config or None, **columns)
    if not Path(source).is_file():
        raise FileNotFoundError(
            f"{source!r} is no file, and none of 'sentiment/movie|tweets|amazon|editorials', "
            f"'tfds:NAME', 'hf:NAME'"
        )
    return read_text(source, **columns)


def read_text(
    path: str | os.PathLike[str],
    *,
    text: str = "text",
    text_pair: str | None = None,
    label: str | None = "label",
    label_names: Sequence[str] | None = None,
    problem_type: ProblemType = "single_label_classification",
) -> TextExamples:
    """Reads a TSV or CSV file with a header, or JSON Lines; the suffix says which.

    Args:
      path: the file, in UTF-8.
      text, text_pair, label: names of columns; `label=None` reads texts without labels.
      label_names: the classes in the order of their indices; by default those of the file, in
        numerical order if all are integers, else in alphabetical order. Give those of the
        training file when reading any other.
      problem_type: as in Hugging Face's config.json. Several labels are a list in JSON Lines and
        separated by "|" in TSV and CSV; no label at all is an empty list or cell.

    Raises:
      ValueError: everything that is wrong with the file, by row number.
      OSError: the file cannot be read.
    """
    rows = read_rows(path, [column for column in (text, text_pair, label) if column is not None])
    return examples_from_rows(
        rows,
        text=text,
        text_pair=text_pair,
        label=label,
        label_names=label_names,
        problem_type=problem_type,
    )


def from_tfds(
    name: str,
    split: str,
    *,
    text: str = "text",
    text_pair: str | None = None,
    label: str | None = "label",
    label_names: Sequence[str] | None = None,
    problem_type: ProblemType = "single_label_classification",
    data_dir: str | os.PathLike[str] | None = None,
) -> TextExamples:
    """Reads a split of a TensorFlow Datasets text set, preparing it if needed, without TensorFlow.

    Args:
      name: of the data set, with its config if it has some: "ag_news_subset", "glue/mrpc".
      split: as TFDS spells it, slices included: "train", "test[:10%]".
      text, text_pair, label: names of features; `label=None` reads texts without labels.
      label_names: see `read_text`; by default the names that TFDS has for the classes.
      problem_type: as in Hugging Face's config.json.
      data_dir: TFDS's folder; by default ~/tensorflow_datasets.

    Raises:
      ValueError: an unknown data set, split or feature, or wrong rows.
    """
    import tensorflow_datasets as tfds

    folder = None if data_dir is None else os.fspath(data_dir)
    builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    return from_builder(
        builder,
        split,
        text=text,
        text_pair=text_pair,
        label=label,
        label_names=label_names,
        problem_type=problem_type,
    )


def from_builder(
    builder: tfds.core.DatasetBuilder,
    split: str,
    *,
    text: str = "text",
    text_pair: str | None = None,
    label: str | None = "label",
    label_names: Sequence[str] | None = None,
    problem_type: ProblemType = "single_label_classification",
) -> TextExamples:
    """As `from_tfds`, from a builder that writes the array_record format."""
    import tensorflow_datasets as tfds

    features: Any = builder.info.features
    where = f"tfds:{builder.info.full_name} {split}"
    _check_columns(where, list(features), [text, text_pair, label])
    builder.download_and_prepare()
    read: Any = builder.as_data_source  # its decorator hides the signature
    names = None
    if label is not None:
        feature = features[label]
        if isinstance(feature, tfds.features.Sequence):
            feature = feature.feature
        names = feature.names if isinstance(feature, tfds.features.ClassLabel) else None
    cells = [
        {key: _plain(value) for key, value in example.items()} for example in read(split=split)
    ]
    return examples_from_rows(
        Rows(where, list(range(1, len(cells) + 1)), cells, []),
        text=text,
        text_pair=text_pair,
        label=label,
        label_names=label_names,
        problem_type=problem_type,
        class_names=names,
    )


def from_datasets(
    dataset: str | datasets.Dataset | datasets.DatasetDict,
    split: str | None = None,
    *,
    config: str | None = None,
    text: str = "text",
    text_pair: str | None = None,
    label: str | None = "label",
    label_names: Sequence[str] | None = None,
    problem_type: ProblemType = "single_label_classification",
) -> TextExamples:
    """Reads a data set of Hugging Face's `datasets` package.

    Args:
      dataset: a hub id, a DatasetDict (both need `split`) or one Dataset.
      split: as `datasets` spells it.
      config: of a hub id that has several: "mrpc" of "nyu-mll/glue".
      text, text_pair, label: columns; `label=None` reads texts without labels.
      label_names: see `read_text`; by default the names of the column's ClassLabel.
      problem_type: as in Hugging Face's config.json.

    Raises:
      ImportError: `datasets` is not installed.
      ValueError: a missing split or column, or wrong rows.
    """
    where, found = one_dataset(dataset, split, config, [text, text_pair, label])
    import datasets

    names = None
    if label is not None:
        feature = found.features[label]
        if isinstance(feature, (datasets.List, datasets.LargeList)):
            feature = feature.feature
        names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    kept = [name for name in found.column_names if name in (text, text_pair, label, "id")]
    cells: list[Any] = list(found.select_columns(kept).with_format(None))
    return examples_from_rows(
        Rows(where, list(range(1, len(cells) + 1)), cells, []),
        text=text,
        text_pair=text_pair,
        label=label,
        label_names=label_names,
        problem_type=problem_type,
        class_names=names,
    )


def one_dataset(
    dataset: str | datasets.Dataset | datasets.DatasetDict,
    split: str | None,
    config: str | None,
    columns: Sequence[str | None],
) -> tuple[str, datasets.Dataset]:
    """What errors call a data set of `datasets`, and its one split with these columns.

    Raises:
      ImportError: `datasets` is not installed.
      ValueError: a missing or needless split, or a missing column.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading Hugging Face data sets needs the package datasets: pip install fmjax[datasets]"
        ) from error

    where = f"hf:{dataset}" if isinstance(dataset, str) else "the given data set"
    if not isinstance(dataset, datasets.Dataset):
        if split is None:
            raise ValueError(f"{where} has several splits: name one, for instance split='train'")
        if isinstance(dataset, str):
            dataset = datasets.load_dataset(dataset, config, split=split)
        elif split not in dataset:
            raise ValueError(f"{where} has no split {split!r}; it has {sorted(dataset)}")
        else:
            dataset = dataset[split]
    elif split is not None:
        raise ValueError(f"split={split!r} with a single Dataset, which is one split; drop it")
    _check_columns(where, dataset.column_names, columns)
    return where, dataset


def _check_columns(where: str, present: Sequence[str], wanted: Sequence[str | None]) -> None:
    missing = [column for column in wanted if column is not None and column not in present]
    problems = [f"no column {column!r}; there are {sorted(present)}" for column in missing]
    raise_problems(where, problems)


def _plain(value: Any) -> Any:
    """TFDS gives bytes for texts and arrays for sequences; the rest of this file wants neither."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
