"""Texts with labels, and how they are checked: every wrong cell is named, in one error."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from fmjax.data.files import Rows, raise_problems
from fmjax.types import one_text

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclasses.dataclass(frozen=True, eq=False)
class TextExamples:
    """N texts, or pairs of texts, and what is to be predicted from them.

    Attributes:
      texts: N strings.
      labels: int32 [N] class indices; float32 [N, C] of zeros and ones when an example may have
        several labels; float32 [N] for regression; None when there are none.
      label_names: the C classes in the order of their indices; () for regression.
      text_pairs: N second texts, for tasks on pairs of sentences.
      ids: N names of the examples, when the source has them.

    Raises:
      ValueError: lengths that differ, or one string in the place of many.
    """

    texts: Sequence[str]
    labels: np.ndarray | None
    label_names: tuple[str, ...]
    text_pairs: Sequence[str] | None = None
    ids: Sequence[str] | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{len(values)} {name} for {len(self.texts)} texts"
            for name, values in [
                ("labels", self.labels),
                ("text_pairs", self.text_pairs),
                ("ids", self.ids),
            ]
            if values is not None and len(values) != len(self.texts)
        ]
        problems += one_text("texts", self.texts) + one_text("text_pairs", self.text_pairs)
        raise_problems("TextExamples", problems)

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int] | np.ndarray) -> TextExamples:
        """The examples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return dataclasses.replace(
            self,
            texts=[self.texts[i] for i in chosen],
            labels=None if self.labels is None else self.labels[chosen],
            text_pairs=None if self.text_pairs is None else [self.text_pairs[i] for i in chosen],
            ids=None if self.ids is None else [self.ids[i] for i in chosen],
        )


def examples_from_rows(
    rows: Rows,
    *,
    text: str,
    text_pair: str | None,
    label: str | None,
    label_names: Sequence[str] | None,
    problem_type: ProblemType,
    class_names: Sequence[str] | None = None,
) -> TextExamples:
    """Checks every cell and builds the examples, or raises one error with all that is wrong.

    Args:
      class_names: of a source that stores class indices: what the integers in its cells mean.
    """
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type {problem_type!r} is not one of {PROBLEM_TYPES}")
    if label_names is not None and len(set(label_names)) != len(label_names):
        raise ValueError(f"label_names {list(label_names)} name a class twice")
    if label_names and problem_type == "regression":
        raise ValueError(f"label_names {list(label_names)} with regression, which has no classes")
    readers: dict[str, Callable[[Any], Any]] = {text: text_cell}
    if text_pair is not None:
        readers[text_pair] = text_cell
    if label is not None:
        readers[label] = label_reader(problem_type, class_names)
    values, problems = read_cells(rows, readers)
    names: tuple[str, ...] = ()
    labels = None
    if label is not None and problem_type == "regression":
        labels = np.array(values[label], np.float32) if not problems else None
    elif label is not None:
        multi = problem_type == "multi_label_classification"
        names, labels = class_labels(
            rows, label, values[label], label_names or class_names, multi, problems
        )
    raise_problems(rows.where, problems)
    return TextExamples(
        texts=values[text],
        labels=labels,
        label_names=names,
        text_pairs=None if text_pair is None else values[text_pair],
        ids=_ids(rows),
    )


def read_cells(
    rows: Rows, readers: Mapping[str, Callable[[Any], Any]]
) -> tuple[dict[str, list[Any]], list[str]]:
    """What columns hold, None where a cell is wrong, and all that is wrong with the rows.

    Args:
      rows: as read from a file.
      readers: by column, from a cell to its value; their ValueErrors read as the end of a sentence
        that begins with the name of the column.
    """
    problems = list(rows.problems)
    values: dict[str, list[Any]] = {column: [] for column in readers}
    for number, cells in zip(rows.numbers, rows.cells, strict=True):
        for column, read in readers.items():
            try:
                values[column].append(read(cells.get(column)))
            except ValueError as error:
                values[column].append(None)
                problems.append(f"row {number}: {column!r} {error}")
    return values, problems


def class_labels(
    rows: Rows,
    label: str,
    cells: Sequence[Any],
    names: Sequence[str] | None,
    multi: bool,
    problems: list[str],
) -> tuple[tuple[str, ...], np.ndarray | None]:
    """The classes, and the labels of what `label_reader` read; None if anything is wrong.

    Args:
      rows, label: the rows and the column.
      cells: class names, or lists of them; None where a cell is wrong.
      names: the classes; None for those there are, in their order.
      multi: whether a cell is a list.
      problems: what is wrong so far; cells of other classes join it.
    """
    sets = [cell if multi else [cell] for cell in cells]
    found = {name for cell in sets if cell is not None for name in cell if name is not None}
    names = tuple(names or _in_order(found))
    for number, cell in zip(rows.numbers, sets, strict=True):
        for name in cell or ():
            if name is not None and name not in names:
                problems.append(f"row {number}: {label!r} {name!r} is not one of {names}")
    return names, None if problems else _indices(sets, names, multi)


def _indices(sets: list[Any], names: tuple[str, ...], multi: bool) -> np.ndarray:
    index = {name: i for i, name in enumerate(names)}
    if not multi:
        return np.array([index[name] for (name,) in sets], np.int32)  # [N]
    hot = np.zeros((len(sets), len(names)), np.float32)  # [N, C]
    for row, cell in enumerate(sets):
        hot[row, [index[name] for name in cell]] = 1
    return hot


def _ids(rows: Rows) -> list[str] | None:
    """The column "id", where every row has one."""
    if not all("id" in cells for cells in rows.cells):
        return None
    return [str(cells["id"]) for cells in rows.cells]


def _in_order(names: set[str]) -> list[str]:
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def text_cell(cell: Any) -> str:
    """A text that is not empty."""
    if cell is None:
        raise ValueError("is missing")
    if not isinstance(cell, str):
        raise ValueError(f"is {cell!r}, a text was expected")
    if not cell.strip():
        raise ValueError("is empty")
    return cell


def label_reader(
    problem_type: ProblemType, class_names: Sequence[str] | None
) -> Callable[[Any], Any]:
    """A function from a cell to its number, its class name or its class names.

    Its ValueErrors read as the end of a sentence that begins with the name of the column.
    """

    def name(cell: Any) -> str:
        if cell is None:
            raise ValueError("is missing")
        if isinstance(cell, bool):
            return str(cell).lower()  # as JSON spells it
        if isinstance(cell, (int, np.integer)):
            if class_names is None:
                return str(cell)
            if not 0 <= cell < len(class_names):
                raise ValueError(
                    f"is {cell}, outside the {len(class_names)} classes {tuple(class_names)} "
                    f"(label=None reads a split without labels)"
                )
            return class_names[int(cell)]
        if not isinstance(cell, str):
            raise ValueError(f"is {cell!r}, a class is a text or an integer")
        if not cell.strip():
            raise ValueError("is empty")
        return cell.strip()

    def several(cell: Any) -> list[str]:
        if isinstance(cell, str):
            cell = cell.split("|") if cell.strip() else []
        if cell is None:
            raise ValueError("is missing")
        if not isinstance(cell, list):
            raise ValueError(f"is {cell!r}, a list of labels was expected")
        return [name(item) for item in cell]

    def number(cell: Any) -> float:
        if cell is None:
            raise ValueError("is missing")
        if isinstance(cell, bool) or not isinstance(cell, (str, numbers.Real)):
            raise ValueError(f"is {cell!r}, a number was expected")
        try:
            value = float(cell)
        except ValueError:
            raise ValueError(f"is {cell!r}, a number was expected") from None
        if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
            raise ValueError(f"is {cell!r}, a finite float32 was expected")
        return value

    readers = {
        "single_label_classification": name,
        "multi_label_classification": several,
        "regression": number,
    }
    return readers[problem_type]
