"""The report's training curves: loss, validation score, learning rate, gradient norm, speed."""

import numpy as np

from fmjax.report import charts
from fmjax.report.charts import FIRST, SECOND, Line
from fmjax.report.markup import Markup, Section, figure, folded, paragraph, short, table
from fmjax.report.run_folder import Run
from fmjax.report.summary import headline_key, metric_name

# Gradient norms that span more than this are drawn on a logarithmic axis.
_LOG_SPAN = 50.0


def curves_section(run: Run) -> Section:
    """One chart for each quantity that metrics.jsonl holds; says so where it holds none."""
    figures = [
        chart
        for chart in (
            _loss(run),
            _players(run),
            _validation(run),
            _single(run, "learning_rate", "Learning rate", "learning rate"),
            _single(run, "grad_norm", "Gradient norm", "global L2 norm"),
            _single(run, "examples_per_second", "Examples per second", "examples/s"),
            _single(run, "tokens_per_second", "Tokens per second", "tokens/s"),
        )
        if chart is not None
    ]
    if not figures:
        body = [paragraph("Nothing was logged: the run stopped before its first step was written.")]
    else:
        body = [Markup('<div class="charts">' + "\n".join(figures) + "</div>")]
        evaluations = _evaluations(run)
        if evaluations is not None:
            body.append(evaluations)
    return Section("training", "Training", "Training", body)


def broken_loss(run: Run) -> int | None:
    """The first step whose training loss was not finite; strict JSON has null for it."""
    steps, losses = run.series("train", "loss")
    broken = set(steps[~np.isfinite(losses)].tolist())
    broken |= {
        row["step"]
        for row in run.metrics
        if row["split"] == "train" and "loss" in row and row["loss"] is None
    }
    return min(broken, default=None)


def _curve(run: Run, split: str, key: str, color: str, *, markers: bool = False) -> list[Line]:
    """The finite part of one curve, as a list of one line or none."""
    steps, values = run.series(split, key)
    finite = np.isfinite(values)
    label = {"train": "training", "val": "validation"}[split]
    return (
        [Line(label, steps[finite], values[finite], color, markers=markers)] if finite.any() else []
    )


def _loss(run: Run) -> Markup | None:
    lines = [
        *_curve(run, "train", "loss", FIRST),
        *_curve(run, "val", "loss", SECOND, markers=True),
    ]
    if not lines:
        return None
    unit = "loss" if run.data["problem_type"] == "regression" else "loss (nats)"
    note = ""
    if lines[-1].label == "validation":
        best = int(np.argmin(lines[-1].values))
        note = (
            f"Lowest validation loss {short(lines[-1].values[best])} "
            f"at step {lines[-1].steps[best]:,}."
        )
    svg = charts.line_chart("loss", lines, y_label=unit, description=_words("Loss", lines))
    return figure("Loss", svg, note=note)


def _players(run: Run) -> Markup | None:
    """The losses of players that take turns, which metrics.jsonl calls {player}/loss."""
    keys = dict.fromkeys(
        key for row in run.metrics if row["split"] == "train" for key in row
        if key.endswith("/loss")
    )  # fmt: skip
    lines = [
        line._replace(label=key.removesuffix("/loss"))
        for key, color in zip(keys, (FIRST, SECOND), strict=False)
        for line in _curve(run, "train", key, color)
    ]
    if not lines:
        return None
    title = "Losses of the players"
    svg = charts.line_chart(
        "players", lines, y_label="loss (nats)", description=_words(title, lines)
    )
    return figure(title, svg)


def _validation(run: Run) -> Markup | None:
    logged = {key for row in run.metrics if row["split"] == "val" for key in row}
    key = headline_key(run, logged)
    if key is None:
        return None
    validation = _curve(run, "val", key, SECOND, markers=True)
    if not validation:
        return None
    name = metric_name(key)
    lines = [*_curve(run, "train", key, FIRST), *validation]
    extreme = np.argmin if run.data.get("mode") == "min" else np.argmax
    best = int(extreme(validation[0].values))
    svg = charts.line_chart(
        "validation", lines, y_label=name.lower(), description=_words(name, lines)
    )
    note = (
        f"Best validation {name.lower()} {short(validation[0].values[best])} "
        f"at step {validation[0].steps[best]:,}."
    )
    return figure(name, svg, note=note)


def _single(run: Run, key: str, title: str, y_label: str) -> Markup | None:
    lines = _curve(run, "train", key, FIRST)
    if not lines:
        return None
    if key == "learning_rate":
        lines = [lines[0]._replace(noisy=False)]
    values = lines[0].values
    log = key == "grad_norm" and values.min() > 0 and values.max() > _LOG_SPAN * values.min()
    note = {
        "learning_rate": f"Peak {short(values.max())}.",
        "grad_norm": f"Median {short(float(np.median(values)))}, highest {short(values.max())}.",
    }.get(key, f"Median {short(float(np.median(values)))}.")
    svg = charts.line_chart(
        key.replace("_", "-"), lines, y_label=y_label, description=_words(title, lines), log=log
    )
    return figure(title, svg, note=note)


def _words(title: str, lines: list[Line]) -> str:
    """What a line chart shows, for readers who do not see it."""
    parts = [
        f"{line.label} goes from {short(line.values[0])} at step {line.steps[0]:,} "
        f"to {short(line.values[-1])} at step {line.steps[-1]:,}, "
        f"between {short(line.values.min())} and {short(line.values.max())}"
        for line in lines
    ]
    return f"{title} over training steps: " + "; ".join(parts) + "."


def _evaluations(run: Run) -> Markup | None:
    """Every evaluation during training, as numbers."""
    columns = {}
    keys = dict.fromkeys(key for row in run.metrics if row["split"] == "val" for key in row)
    for key in keys:
        steps, values = run.series("val", key)
        if key != "step" and len(steps):
            columns[key] = dict(zip(steps.tolist(), values.tolist(), strict=True))
    if not columns:
        return None
    steps = sorted({step for column in columns.values() for step in column})
    rows = [
        [f"{step:,}", *(short(c[step]) if step in c else "" for c in columns.values())]
        for step in steps
    ]
    numbers = table(
        ["step", *(metric_name(key).lower() for key in columns)],
        rows,
        caption="Validation by step",
        numeric=range(len(columns) + 1),
    )
    return folded(f"All {len(steps)} evaluations as a table", numbers)
