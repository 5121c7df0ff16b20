"""The head of the report: notices, the headline numbers, the table of baselines, the facts."""

import math
from typing import Any

import numpy as np

from fmjax.report.markup import (
    Markup,
    Section,
    count,
    duration,
    escape,
    paragraph,
    score,
    short,
    table,
)
from fmjax.report.run_folder import Run

# The scores that may stand for a run, best first; for all of them higher is better.
_HEADLINES = {
    "single_label_classification": ("accuracy", "macro_f1"),
    "multi_label_classification": ("micro_f1", "macro_f1", "subset_accuracy"),
    "regression": ("pearson", "spearman", "r2"),
}

_NAMES = {
    "macro_f1": "Macro F1",
    "micro_f1": "Micro F1",
    "f1": "F1",
    "r2": "R\N{SUPERSCRIPT TWO}",
    "mse": "Mean squared error",
    "mae": "Mean absolute error",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "expected_calibration_error": "Calibration error (ECE)",
}


def metric_name(key: str) -> str:
    """A metric's key in words."""
    return _NAMES.get(key, key.replace("_", " ").capitalize())


def headline_key(run: Run, logged: Any) -> str | None:
    """The first of the headline scores of this kind of run that `logged` contains; of a run
    without classes or numbers, what its best state is chosen by."""
    if run.data["problem_type"] is None:
        selected = run.data.get("metric")
        return selected if selected in logged else None
    keys = _HEADLINES[run.data["problem_type"]]
    return next((key for key in keys if key in logged), None)


def summary_section(run: Run, notices: list[str]) -> Section:
    """The first section of the report.

    Args:
      run: the run.
      notices: sentences about what is missing or odd, shown on top.

    Returns:
      The section.
    """
    parts: list[Any] = [paragraph(notice, kind="notice") for notice in notices]
    tiles = _tiles(run)
    if tiles:
        parts.append(Markup('<dl class="tiles">' + "".join(tiles) + "</dl>"))
    if run.results is not None:
        parts.append(_comparison(run, run.results))
    parts.append(_facts(run))
    return Section("summary", "Summary", "Summary", parts)


def wilson_interval(share: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212).

    Args:
      share: observed proportion, 0 to 1.
      trials: number of independent trials, at least 1.

    Returns:
      Lower and upper end.
    """
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials)
    half *= math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return center - half, center + half


def total_seconds(run: Run) -> float | None:
    """Seconds of the whole run: results.json's total or sum, else of the training so far."""
    seconds = scalars((run.results or {}).get("seconds", {}))
    if seconds:
        return seconds.get("total", sum(seconds.values()))
    _, intervals = run.series("train", "seconds")
    return float(intervals.sum()) if len(intervals) else None


def _tiles(run: Run) -> list[str]:
    results = run.results or {}
    split = "test" if scalars(results.get("test", {})) else "val"
    scores = scalars(results.get(split, {}))
    key = headline_key(run, scores)
    tiles = []
    if key is not None:
        tiles.append(
            _tile(
                f"{split.capitalize()} {metric_name(key).lower()}",
                score(scores[key]),
                _interval_note(run, split, key, scores[key]),
            )
        )
        rivals = {
            name: scalars(splits.get(split, {})).get(key)
            for name, splits in results.get("baselines", {}).items()
        }
        known = {name: value for name, value in rivals.items() if value is not None}
        if known:
            low = run.data["problem_type"] is None and run.data.get("mode") == "min"
            name = (min if low else max)(known, key=lambda rival: known[rival])
            gap = scores[key] - known[name]
            # What is lower where it is better, an error or a distance, has units of its own.
            shown = f"{gap:+.4f}" if low else f"{100 * gap:+.1f}"
            tiles.append(
                _tile(
                    "Against the best baseline" if low else "Over the best baseline",
                    shown.replace("-", "\N{MINUS SIGN}"),
                    f"{'lower is better' if low else 'points'}; {name} has {score(known[name])}",
                )
            )
    if "expected_calibration_error" in scores:
        tiles.append(
            _tile(
                "Calibration error",
                score(scores["expected_calibration_error"]),
                f"{split} ECE, 0 is calibrated",
            )
        )
    seconds = total_seconds(run)
    if seconds is not None:
        steps = run.series("train", "loss")[0]
        tiles.append(
            _tile(
                "Time",
                duration(seconds),
                f"{count(int(steps[-1]))} training steps" if len(steps) else "",
            )
        )
    _, speeds = run.series("train", "examples_per_second")
    speeds = speeds[np.isfinite(speeds)]
    if len(speeds):
        tiles.append(
            _tile("Training speed", f"{short(float(np.median(speeds)))} /s", "examples, median")
        )
    trainable, total = run.model["num_trainable"], run.model["num_params"]
    tiles.append(
        _tile(
            "Parameters",
            _millions(total),
            "all trained" if trainable == total else f"{_millions(trainable)} trained",
        )
    )
    return tiles


def _tile(label: str, value: str, note: str) -> str:
    small = f'<dd class="note">{escape(note)}</dd>' if note else ""
    return (
        f'<div class="tile"><dt>{escape(label)}</dt>'
        f'<dd class="value">{escape(value)}</dd>{small}</div>'
    )


def _interval_note(run: Run, split: str, key: str, value: float) -> str:
    size = run.data["splits"].get(split)
    if not isinstance(size, int) or size < 1:
        return ""
    if key != "accuracy" or not 0.0 <= value <= 1.0:
        return f"{count(size)} examples"
    low, high = wilson_interval(value, size)
    return f"95 % interval {low:.3f} to {high:.3f}, {count(size)} examples"


def _comparison(run: Run, results: dict[str, Any]) -> Markup:
    """One row a metric, one column for each model and split."""
    columns: list[tuple[str, dict[str, float]]] = []
    for name, splits in {"this run": results, **results.get("baselines", {})}.items():
        for split in ("test", "val"):
            scores = scalars(splits.get(split, {}))
            if scores:
                columns.append((f"{name}, {split}", scores))
    if not columns:
        return paragraph("results.json holds no scores.", kind="note")
    keys = list(dict.fromkeys(key for _, scores in columns for key in scores))
    first = headline_key(run, keys)
    if first is not None:
        keys = [first, *(key for key in keys if key != first)]
    return table(
        ["metric", *(name for name, _ in columns)],
        (
            [metric_name(key), *(score(s[key]) if key in s else "" for _, s in columns)]
            for key in keys
        ),
        caption="Scores of this run and of the baselines",
        numeric=range(1, len(columns) + 1),
    )


def _facts(run: Run) -> Markup:
    model, data = run.model, run.data
    splits = ", ".join(
        f"{name} {count(size) if isinstance(size, int) else size}"
        for name, size in data["splits"].items()
    )
    names = run.label_names
    classes = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    rows = [
        ("Model", model["source"]),
        ("Architecture", model["model_type"] + (f", {model['head']}" if model["head"] else "")),
        ("Parameters", f"{count(model['num_params'])}, {count(model['num_trainable'])} trained"),
        ("Data", data["source"]),
        ("Examples", splits),
        *([("Problem", data["problem_type"].replace("_", " "))] if data["problem_type"] else []),
        *([("Labels", classes)] if names else []),
        (
            "Started",
            Markup(f"<time>{escape(run.started.strftime('%Y-%m-%d %H:%M %Z').strip())}</time>"),
        ),
    ]
    seconds = scalars((run.results or {}).get("seconds", {}))
    if seconds:
        parts = ", ".join(f"{name.replace('_', ' ')} {duration(s)}" for name, s in seconds.items())
        rows.append(("Time", parts))
    return table(("", ""), rows, caption="What was run", kind="facts")


def scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """The plain numbers of a metrics dictionary, without nested reports."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _millions(parameters: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.1f} {unit}"
    return str(parameters)
