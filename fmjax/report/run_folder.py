"""The files of a run: reading a run folder, and writing the predictions into it.

    run.json                   what was run: model, data, settings, environment
    metrics.jsonl              one JSON object a line: {"step": 20, "split": "train", "loss": ...};
                               null is what was not finite, "seconds" the time since the line before
    predictions_{split}.npz    "labels" and "probabilities" [N, C] or "predictions" [N]
    predictions_{split}.texts.json    the N texts
    results.json               {"test": {...}, "val": {...}, "baselines": {...}, "seconds": {...}}

Only run.json must exist: a run that was interrupted has fewer files, not broken ones.
"""

import contextlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")

# Every key of run.json that the report reads, with the types it may have.
_CONTRACT: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "command": (str,),
    "started": (str,),
    "model.source": (str,),
    "model.model_type": (str,),
    "model.head": (str, type(None)),
    "model.num_params": (int,),
    "model.num_trainable": (int,),
    "data.source": (str,),
    "data.splits": (dict,),
    "data.label_names": (list, type(None)),
    "data.problem_type": (str, type(None)),  # None: neither classes nor numbers, e.g. texts
    "settings": (dict,),
    "environment.python": (str,),
    "environment.platform": (str,),
    "environment.cpu": (str,),
    "environment.cores": (int, type(None)),
    "environment.devices": (list,),
    "environment.versions": (dict,),
}

_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Predictions:
    """The predictions for one split; exactly one of `probabilities` and `predictions` is set."""

    labels: np.ndarray  # [N] integers, [N, C] zeros and ones, or [N] floats
    texts: list[str]  # N
    probabilities: np.ndarray | None  # [N, C]
    predictions: np.ndarray | None  # [N]


@dataclass(frozen=True)
class Run:
    """Everything a run folder holds; `results` is None and `predictions` empty if interrupted."""

    folder: Path
    name: str
    command: str
    started: datetime
    model: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: dict[str, Any] | None
    predictions: dict[str, Predictions]

    @property
    def label_names(self) -> list[str]:
        """The names of the classes in class order; empty for regression without names."""
        return [str(name) for name in self.data["label_names"] or []]

    def series(self, split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """One curve of metrics.jsonl.

        A resumed run logs the steps after its checkpoint again: the last row of a step counts.

        Args:
          split: "train" or "val".
          key: "loss", "learning_rate", ...

        Returns:
          Steps [N] in rising order and their values [N] (float64, may hold NaN); both empty where
          the key was never logged as a number.
        """
        values = {
            row["step"]: float(row[key])
            for row in self.metrics
            if row["split"] == split and _is_number(row.get(key))
        }
        steps = sorted(values)
        return np.array(steps, dtype=np.int64), np.array([values[step] for step in steps])


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` and rename it to `path` when the block ends well.

    Args:
      path: the file to create or replace.

    Yields:
      A binary file to write to.

    Raises:
      OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_predictions(
    folder: str | os.PathLike,
    split: str,
    *,
    labels: ArrayLike,
    texts: Sequence[str],
    probabilities: ArrayLike | None = None,
    predictions: ArrayLike | None = None,
) -> None:
    """Write the predictions for one split into a run folder, replacing earlier ones.

    Args:
      folder: an existing run folder.
      split: "val", "test" or another plain name.
      labels: [N] integers (single label), [N, C] zeros and ones (multi label), [N] floats
        (regression).
      texts: N texts.
      probabilities: [N, C] floats, for both kinds of classification.
      predictions: [N] floats, for regression.

    Raises:
      ValueError: lists every shape, type or value that is wrong; nothing is written.
      OSError: the folder does not exist or cannot be written.
    """
    if (probabilities is None) == (predictions is None):
        raise ValueError(
            "pass either probabilities (classification) or predictions (regression), not "
            + ("neither" if probabilities is None else "both")
        )
    key, scores = (
        ("probabilities", probabilities) if predictions is None else ("predictions", predictions)
    )
    arrays = {key: np.asarray(scores), "labels": np.asarray(labels)}
    texts = list(texts)
    problems = _array_problems(arrays, len(texts))
    if not _SPLIT_NAME.fullmatch(split):
        problems.append(f"split {split!r} is no plain name: use letters, digits, '_' and '-'")
    wrong = [row for row, text in enumerate(texts) if not isinstance(text, str)]
    if wrong:
        problems.append(f"{len(wrong)} texts are not strings, the first at row {wrong[0]}")
    if problems:
        raise ValueError(f"cannot save predictions for {split!r}:\n  " + "\n  ".join(problems))
    arrays[key] = arrays[key].astype(np.float32)
    array_path, text_path = _prediction_paths(Path(folder), split)
    # The arrays come last: load_run looks for them, so it never finds them without their texts.
    with atomic_write(text_path) as file:
        file.write(json.dumps(texts).encode("ascii"))
    with atomic_write(array_path) as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def load_run(folder: str | os.PathLike) -> Run:
    """Read a run folder; files that a run has not reached yet may be missing.

    Args:
      folder: the folder of run.json.

    Returns:
      The run.

    Raises:
      ValueError: this is no run folder, or one of its files is malformed; names file and line.
      OSError: a file cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a run folder: there is no such folder")
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a run folder: run.json is missing; pass the output folder of a run"
        )
    info = _read_json(path)
    problems = _info_problems(info)
    if problems:
        raise ValueError(f"{path} does not describe a run:\n  " + "\n  ".join(problems))
    results_path = folder / "results.json"
    results = _read_json(results_path) if results_path.is_file() else None
    if results is not None:
        _check_results(results_path, results)
    predictions = {}
    for array_path in sorted(folder.glob("predictions_*.npz")):
        split = array_path.stem.removeprefix("predictions_")
        predictions[split] = _load_predictions(folder, split, info["data"])
    return Run(
        folder=folder,
        name=info["name"],
        command=info["command"],
        started=datetime.fromisoformat(info["started"]),
        model=info["model"],
        data=info["data"],
        settings=info["settings"],
        environment=info["environment"],
        metrics=_read_metrics(folder / "metrics.jsonl"),
        results=results,
        predictions=predictions,
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also covers text that is not UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error


def _info_problems(info: Any) -> list[str]:
    """Which keys of run.json are missing or of another type, all of them."""
    problems = []
    for dotted, types in _CONTRACT.items():
        value = info
        for key in dotted.split("."):
            if not isinstance(value, dict) or key not in value:
                problems.append(f"{dotted} is missing")
                break
            value = value[key]
        else:
            if not isinstance(value, types) or isinstance(value, bool):
                expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
                problems.append(f"{dotted} is {value!r}, expected {expected}")
    if problems:
        return problems
    try:
        datetime.fromisoformat(info["started"])
    except ValueError:
        problems.append(f"started is {info['started']!r}, expected an ISO 8601 time")
    data = info["data"]
    if data["problem_type"] is None:
        return problems
    if data["problem_type"] not in PROBLEM_TYPES:
        problems.append(
            f"data.problem_type is {data['problem_type']!r}, expected one of "
            f"{PROBLEM_TYPES} or null"
        )
    elif data["problem_type"] != "regression" and not data["label_names"]:
        problems.append(f"data.label_names is empty, {data['problem_type']} needs the classes")
    return problems


def _check_results(path: Path, results: Any) -> None:
    if not isinstance(results, dict):
        raise ValueError(f"{path} holds a {type(results).__name__}, expected an object")
    parts = {key: results.get(key, {}) for key in ("test", "val", "baselines", "seconds")}
    if isinstance(parts["baselines"], dict):
        for name, splits in parts["baselines"].items():
            parts[f"baselines.{name}"] = splits
            if isinstance(splits, dict):
                parts |= {f"baselines.{name}.{split}": splits[split] for split in splits}
    wrong = [key for key, part in parts.items() if not isinstance(part, dict)]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} must be objects")


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line; a last line without its newline that is cut off is left out."""
    if not path.is_file():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate([*lines, last], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) + 1:
                break  # the writer was stopped in the middle of this line
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"{path}, line {number} has no 'step' that counts from 0")
        if not isinstance(row.get("split"), str):
            raise ValueError(f"{path}, line {number} has no 'split'")
        rows.append(row)
    return rows


def _load_predictions(folder: Path, split: str, data: dict[str, Any]) -> Predictions:
    array_path, text_path = _prediction_paths(folder, split)
    key = "predictions" if data["problem_type"] == "regression" else "probabilities"
    try:
        with np.load(array_path, allow_pickle=False) as file:
            missing = {key, "labels"}.difference(file.files)
            arrays = {name: file[name] for name in (key, "labels") if name not in missing}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise ValueError(f"{array_path} is not a readable .npz file: {error}") from error
    if missing:
        raise ValueError(f"{array_path} lacks {sorted(missing)}, needed for {data['problem_type']}")
    if not text_path.is_file():
        raise ValueError(f"{text_path} is missing: it holds the texts of {array_path.name}")
    texts = _read_json(text_path)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{text_path} must hold a list of strings")
    problems = _array_problems(arrays, len(texts))
    multi_label = data["problem_type"] == "multi_label_classification"
    if not problems and key == "probabilities":
        names = data["label_names"]
        if names is None:
            problems.append("run.json names no classes, which probabilities need")
        elif arrays[key].shape[1] != len(names):
            problems.append(
                f"{arrays[key].shape[1]} columns of probabilities for {len(names)} label names"
            )
        if (arrays["labels"].ndim == 2) != multi_label:
            problems.append(
                f"labels have shape {arrays['labels'].shape}, wrong for {data['problem_type']}"
            )
    if problems:
        raise ValueError(f"{array_path} does not fit this run:\n  " + "\n  ".join(problems))
    return Predictions(
        labels=arrays["labels"],
        texts=texts,
        probabilities=arrays.get("probabilities"),
        predictions=arrays.get("predictions"),
    )


def _array_problems(arrays: dict[str, np.ndarray], num_texts: int) -> list[str]:
    """What is wrong with a pair of scores and labels."""
    problems = []
    (key, scores), (_, labels) = arrays.items()
    expected = 2 if key == "probabilities" else 1
    if scores.ndim != expected:
        shape = "[N, C]" if expected == 2 else "[N]"
        problems.append(f"{key} have shape {scores.shape}, expected {shape}")
    elif scores.size == 0:
        problems.append(f"{key} are empty, shape {scores.shape}")
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            problems.append(f"{name} are {array.dtype}, expected numbers")
        elif not np.isfinite(array).all():
            problems.append(f"{name} hold NaN or infinity")
    if labels.ndim not in (1, expected) or (labels.ndim == 2 and labels.shape != scores.shape):
        problems.append(f"labels have shape {labels.shape}, {key} {scores.shape}")
    elif scores.ndim and len(labels) != len(scores):
        problems.append(f"{len(labels)} labels for {len(scores)} rows of {key}")
    if scores.ndim and num_texts != len(scores):
        problems.append(f"{num_texts} texts for {len(scores)} rows of {key}")
    if labels.ndim == 1 and key == "probabilities" and labels.dtype.kind not in "iu":
        problems.append(f"labels are {labels.dtype}, class labels are integers")
    return problems


def _prediction_paths(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"predictions_{split}.npz", folder / f"predictions_{split}.texts.json"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
