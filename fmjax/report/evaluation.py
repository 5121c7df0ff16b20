"""The report's sections on predictions: confusion, classes, calibration, the worst mistakes."""

from typing import Any

import numpy as np

from fmjax import metrics
from fmjax.report import charts
from fmjax.report.markup import (
    Markup,
    Section,
    count,
    escape,
    figure,
    folded,
    paragraph,
    score,
    table,
    with_picture,
)
from fmjax.report.run_folder import Predictions, Run

_MAX_MATRIX = 20  # classes up to which a confusion matrix fits a page
_MAX_MISTAKES = 20
_MAX_TEXT = 280  # characters of a text that are shown at once


def evaluated_split(run: Run) -> str | None:
    """The split whose predictions the report shows: test if there, else val, else any."""
    return next(
        (split for split in ("test", "val", *run.predictions) if split in run.predictions), None
    )


def measured(run: Run, split: str) -> dict[str, Any]:
    """The metrics of the saved predictions for a split, computed anew from the arrays.

    Raises:
      ValueError: the arrays are no valid predictions; names the file.
    """
    part = run.predictions[split]
    names = run.label_names
    try:
        if part.predictions is not None:
            return metrics.regression_metrics(part.predictions, part.labels)
        assert part.probabilities is not None
        if run.data["problem_type"] == "multi_label_classification":
            return metrics.multi_label_metrics(part.probabilities, part.labels, label_names=names)
        return metrics.classification_metrics(part.probabilities, part.labels, label_names=names)
    except ValueError as error:
        path = run.folder / f"predictions_{split}.npz"
        raise ValueError(f"{path}: {error}") from error


def evaluation_sections(run: Run, split: str, scores: dict[str, Any]) -> list[Section]:
    """The sections that fit the kind of problem.

    Args:
      run: the run.
      split: one of `run.predictions`.
      scores: from `measured`.

    Returns:
      The sections in reading order.
    """
    part = run.predictions[split]
    if part.predictions is not None:
        return _regression(part, part.predictions, split)
    assert part.probabilities is not None
    if run.data["problem_type"] == "multi_label_classification":
        return _multi_label(run, part, part.probabilities, split, scores)
    return _single_label(run, part, part.probabilities, split, scores)


def _single_label(
    run: Run, part: Predictions, probabilities: np.ndarray, split: str, scores: dict[str, Any]
) -> list[Section]:
    names = run.label_names
    matrix = np.array(scores["confusion_matrix"])  # [C, C]
    confusion = _matrix(matrix, names) if len(names) <= _MAX_MATRIX else _pairs(matrix, names)
    return [
        Section("confusion", "Confusion", f"Confusion, {split} split", [confusion]),
        Section("classes", "Classes", f"Scores by class, {split} split", [_report(scores, names)]),
        Section(
            "calibration",
            "Calibration",
            f"Calibration, {split} split",
            _calibration(part, probabilities),
        ),
        _mistakes(part, probabilities, names, split),
    ]


def _matrix(matrix: np.ndarray, names: list[str]) -> Markup:
    """A table whose cells are shaded by the share of their row."""
    rows = []
    for name, counts in zip(names, matrix.tolist(), strict=True):
        total = sum(counts)
        cells = []
        for number in counts:
            share = number / total if total else 0.0
            # Opacity stays below 0.6 so that the page's ink is legible on every shade.
            cells.append(
                f'<td style="background: rgb(var(--heat) / {0.6 * share:.3f})">{count(number)}'
                f'<span class="share">{100 * share:.1f} %</span></td>'
            )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in names)
    caption = "Rows are the true class, columns the predicted class; percentages are of the row."
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="Confusion matrix">'
        f'<table class="matrix"><caption><span>{caption}</span></caption>'
        f'<thead><tr><th scope="col">true \N{RIGHTWARDS ARROW} predicted</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _pairs(matrix: np.ndarray, names: list[str]) -> Markup:
    """The most frequent confusions, for more classes than a matrix can show."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_MISTAKES]
    rows = []
    for true, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True):
        number = int(wrong[true, predicted])
        if number:
            share = 100 * number / matrix[true].sum()
            rows.append((names[true], names[predicted], count(number), f"{share:.1f} %"))
    if not rows:
        return paragraph("No class was taken for another.")
    return table(
        ("true", "predicted", "count", "share of the true class"),
        rows,
        caption=f"The most frequent confusions among {len(names)} classes",
        numeric=(2, 3),
    )


def _report(scores: dict[str, Any], names: list[str]) -> Markup:
    """scikit-learn's classification report as a table."""
    rows = [
        (
            name if name in names else Markup(f"<em>{escape(name)}</em>"),
            *(score(row[key]) for key in ("precision", "recall", "f1-score")),
            count(int(row["support"])),
        )
        for name, row in scores["report"].items()
        if isinstance(row, dict)
    ]
    return table(
        ("class", "precision", "recall", "F1", "examples"),
        rows,
        caption="Precision, recall and F1 of each class, and their averages",
        numeric=(1, 2, 3, 4),
    )


def _calibration(part: Predictions, probabilities: np.ndarray) -> list[Markup]:
    bins = metrics.reliability_bins(probabilities, part.labels)
    error = metrics.expected_calibration_error(probabilities, part.labels)
    used = [m for m, number in enumerate(bins["count"]) if number]
    description = "Reliability diagram. " + "; ".join(
        f"confidence {bins['confidence'][m]:.2f}: accuracy {bins['accuracy'][m]:.2f} "
        f"of {bins['count'][m]}"
        for m in used
    )
    total = sum(bins["count"])
    confidence = sum(bins["count"][m] * bins["confidence"][m] for m in used) / total
    accuracy = sum(bins["count"][m] * bins["accuracy"][m] for m in used) / total
    verdict = "more" if confidence > accuracy else "less"
    text = (
        f"Expected calibration error {score(error)} over {len(bins['count'])} bins of equal width. "
        f"On average the model is {score(confidence)} confident and {score(accuracy)} right: "
        f"{verdict} confident than right. Bars below the dashed line are too confident."
    )
    numbers = table(
        ("confidence", "mean confidence", "accuracy", "examples"),
        [
            (
                f"{bins['edges'][m]:.2f} to {bins['edges'][m + 1]:.2f}",
                score(bins["confidence"][m]),
                score(bins["accuracy"][m]),
                count(bins["count"][m]),
            )
            for m in used
        ],
        caption="Reliability by bin of confidence; empty bins are left out",
        numeric=(1, 2, 3),
    )
    svg = charts.reliability_chart("reliability", bins, description=description)
    chart = figure("Reliability diagram", svg)
    return [paragraph(text), Markup(f'<div class="charts">{chart}<div>{numbers}</div></div>')]


def _mistakes(
    part: Predictions, probabilities: np.ndarray, names: list[str], split: str
) -> Section:
    predicted = probabilities.argmax(axis=1)  # [N]
    wrong = np.flatnonzero(predicted != part.labels)
    confidence = probabilities[wrong, predicted[wrong]]
    order = wrong[np.argsort(-confidence, kind="stable")]
    title = f"Most confident mistakes, {split} split"
    if not len(order):
        return Section("mistakes", "Mistakes", title, [paragraph("Every prediction is right.")])
    rows = [
        (
            _text(part.texts[row]),
            names[part.labels[row]],
            names[predicted[row]],
            score(probabilities[row, predicted[row]]),
        )
        for row in order[:_MAX_MISTAKES]
    ]
    caption = (
        f"{min(len(order), _MAX_MISTAKES)} of {count(len(order))} mistakes, by the probability "
        "of the predicted class"
    )
    body = table(
        ("text", "true", "predicted", "probability"),
        rows,
        caption=caption,
        numeric=(3,),
        kind="wide",
    )
    return Section("mistakes", "Mistakes", title, [body])


def _multi_label(
    run: Run,
    part: Predictions,
    probabilities: np.ndarray,
    split: str,
    scores: dict[str, Any],
) -> list[Section]:
    names = run.label_names
    wrong = (probabilities >= 0.5) != (part.labels == 1)  # [N, C]
    # How far a wrong decision is from its threshold.
    distance = np.where(wrong, np.abs(probabilities - 0.5), -1.0)
    order = np.argsort(-distance, axis=None, kind="stable")[: min(_MAX_MISTAKES, wrong.sum())]
    rows = [
        (
            _text(part.texts[row]),
            names[label],
            "yes" if part.labels[row, label] else "no",
            "yes" if probabilities[row, label] >= 0.5 else "no",
            score(probabilities[row, label]),
        )
        for row, label in zip(*np.unravel_index(order, wrong.shape), strict=True)
    ]
    worst = (
        table(
            ("text", "label", "true", "predicted", "probability"),
            rows,
            caption=f"{len(rows)} of {count(int(wrong.sum()))} wrong decisions at threshold 0.5",
            numeric=(4,),
            kind="wide",
        )
        if rows
        else paragraph("Every decision is right.")
    )
    return [
        Section("classes", "Classes", f"Scores by label, {split} split", [_report(scores, names)]),
        Section("mistakes", "Mistakes", f"Most confident mistakes, {split} split", [worst]),
    ]


def _regression(part: Predictions, predictions: np.ndarray, split: str) -> list[Section]:
    errors = predictions.astype(np.float64) - part.labels
    description = (
        f"Predicted against true values of {count(len(errors))} examples: true values from "
        f"{part.labels.min():.4g} to {part.labels.max():.4g}, predictions from "
        f"{predictions.min():.4g} to {predictions.max():.4g}; mean error {errors.mean():.4g}."
    )
    svg = charts.scatter_chart("scatter", part.labels, predictions, description=description)
    note = "The dashed line is where prediction and truth agree."
    order = np.argsort(-np.abs(errors), kind="stable")[:_MAX_MISTAKES]
    worst = table(
        ("text", "true", "predicted", "error"),
        (
            (
                _text(part.texts[row]),
                score(part.labels[row]),
                score(predictions[row]),
                score(errors[row]),
            )
            for row in order
        ),
        caption=f"{len(order)} of {count(len(errors))} predictions, by the size of the error",
        numeric=(1, 2, 3),
        kind="wide",
    )
    chart = figure("Predicted and true values", svg, note=note)
    return [
        Section("scatter", "Predictions", f"Predictions, {split} split", [chart]),
        Section("mistakes", "Mistakes", f"Largest errors, {split} split", [worst]),
    ]


def _text(text: str) -> Markup:
    """A text of the data set; `dir` keeps right-to-left texts from turning the row around.

    A picture, as `data:` URL of a PNG, is shown.
    """
    if isinstance(found := with_picture(text), Markup):
        return found
    if len(text) <= _MAX_TEXT:
        return Markup(f'<span dir="auto">{escape(text)}</span>')
    return folded(
        f"{text[:_MAX_TEXT]}\N{HORIZONTAL ELLIPSIS}",
        Markup(f'<span dir="auto">{escape(text[_MAX_TEXT:])}</span>'),
    )
