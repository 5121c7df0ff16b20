"""What a model made of single examples, side by side with what was wanted: samples.json."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmjax.report.markup import Section, picture, table
from fmjax.report.run_folder import Run, atomic_write

NAME = "samples.json"


def save_samples(
    folder: str | os.PathLike, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Write a table of samples into a run folder, replacing an earlier one.

    Args:
      folder: an existing run folder.
      columns: names such as ("source", "reference", "model").
      rows: as many texts each as there are columns; a `data:` URL of a PNG is shown as the picture.

    Raises:
      ValueError: rows of another length.
      OSError: the folder does not exist or cannot be written.
    """
    wrong = [number for number, row in enumerate(rows) if len(row) != len(columns)]
    if wrong:
        raise ValueError(f"sample {wrong[0]} has {len(rows[wrong[0]])} texts for {len(columns)}")
    with atomic_write(Path(folder) / NAME) as file:
        content = {"columns": list(columns), "rows": [list(row) for row in rows]}
        file.write(json.dumps(content).encode("ascii"))


def samples_section(run: Run) -> Section | None:
    """The samples of a run as a section of its report; None if it has none.

    Raises:
      ValueError: the file is not what `save_samples` writes.
    """
    path = run.folder / NAME
    if not path.is_file():
        return None
    try:
        content: Any = json.loads(path.read_bytes())
        columns, rows = content["columns"], content["rows"]
        fits = all(len(row) == len(columns) for row in rows)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} holds no table of samples: {error!r}") from error
    if not fits:
        raise ValueError(f"{path} has rows that do not fit its columns {columns}")
    numbered = (
        [str(number), *(picture(text) or text for text in row)]
        for number, row in enumerate(rows, 1)
    )
    body = table(
        ("", *columns), numbered, caption="Held-out examples and what the model made of them"
    )
    return Section("samples", "Samples", "Samples", [body])
