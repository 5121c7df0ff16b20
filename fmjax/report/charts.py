"""The charts of a report as inline SVG, drawn by matplotlib and coloured by the page's own CSS.

Each chart is drawn once, in placeholder colours that are then replaced by CSS variables: the same
picture follows the page from light to dark. matplotlib is imported inside the functions, and only
its Figure class, so no global state or display is touched.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colours, each a hex code that nothing else uses, and the variables they stand for.
_INK, _MUTED, _GRID = "#010201", "#020302", "#030403"
FIRST, SECOND = "#040504", "#050605"
VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
}

_MAX_POINTS = 500  # more than a screen shows; longer curves become means of equal blocks
_MAX_DOTS = 2000


class Line(NamedTuple):
    """One curve: steps [N] and values [N].

    `markers` shows each of a few far measurements; `noisy` adds a running mean to many near ones.
    """

    label: str
    steps: np.ndarray
    values: np.ndarray
    color: str
    markers: bool = False
    noisy: bool = True


def line_chart(
    name: str, lines: Sequence[Line], *, y_label: str, description: str, log: bool = False
) -> str:
    """Curves over the training step.

    Args:
      name: the chart's name, unique in the page.
      lines: one or more curves with at least one point each.
      y_label: quantity and unit of the vertical axis.
      description: what the chart shows, in words, for readers who do not see it.
      log: logarithmic vertical axis; values must be positive.

    Returns:
      An <svg> element.
    """

    def draw(figure: "Figure") -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        for line in lines:
            _draw_line(axes, line)
        if log:
            axes.set_yscale("log")
        _style(axes, x_label="step", y_label=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(lines) > 1:
            _legend(axes)

    return _svg(name, draw, description=description)


def reliability_chart(name: str, bins: dict[str, list], *, description: str) -> str:
    """Accuracy against confidence in bins, above the number of predictions in each bin.

    Args:
      name: the chart's name, unique in the page.
      bins: from `fmjax.metrics.reliability_bins`.
      description: what the chart shows, in words.

    Returns:
      An <svg> element.
    """
    edges = np.array(bins["edges"])
    used = [m for m, count in enumerate(bins["count"]) if count]
    width = edges[1] - edges[0]
    centers = (edges[:-1] + edges[1:])[used] / 2

    def draw(figure: "Figure") -> None:
        grid = figure.add_gridspec(2, 1, height_ratios=(3.2, 1))
        top = figure.add_subplot(grid[0])
        top.bar(
            centers,
            [bins["accuracy"][m] for m in used],
            width=0.86 * width,
            color=FIRST,
            label="accuracy in the bin",
        )
        top.plot([0, 1], [0, 1], color=SECOND, linestyle="--", linewidth=1.4, label="calibrated")
        top.set_xlim(edges[used[0]], 1.0)
        top.set_ylim(0.0, 1.02)
        _style(top, x_label="", y_label="accuracy")
        top.tick_params(labelbottom=False)
        _legend(top)
        bottom = figure.add_subplot(grid[1], sharex=top)
        bottom.bar(centers, [bins["count"][m] for m in used], width=0.86 * width, color=_MUTED)
        _style(bottom, x_label="confidence (probability of the predicted class)", y_label="count")
        bottom.locator_params(axis="y", nbins=2)

    return _svg(name, draw, description=description, height=3.9)


def scatter_chart(
    name: str, labels: np.ndarray, predictions: np.ndarray, *, description: str
) -> str:
    """Predicted against true values, with the diagonal of perfect predictions.

    Args:
      name: the chart's name, unique in the page.
      labels: [N] true values.
      predictions: [N] predicted values; at most 2,000 evenly spaced pairs are drawn.
      description: what the chart shows, in words.

    Returns:
      An <svg> element.
    """
    every = -(-len(labels) // _MAX_DOTS)
    low = float(min(labels.min(), predictions.min()))
    high = float(max(labels.max(), predictions.max()))

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        axes.scatter(
            labels[::every], predictions[::every], s=11, color=FIRST, alpha=0.55, linewidths=0
        )
        axes.plot([low, high], [low, high], color=SECOND, linestyle="--", linewidth=1.4)
        _style(axes, x_label="true value", y_label="predicted value")

    return _svg(name, draw, description=description, height=3.6)


def _draw_line(axes: "Axes", line: Line) -> None:
    steps, values, block = _thin(line.steps, line.values)
    if line.markers or len(steps) < 3:
        axes.plot(
            steps,
            values,
            color=line.color,
            linewidth=1.8,
            marker="o",
            markersize=4.2,
            label=line.label,
        )
        return
    window = max(1, len(steps) // 25) if line.noisy else 1
    smooth = _trailing_mean(values, window)
    if window > 1:
        axes.plot(steps, values, color=line.color, linewidth=0.9, alpha=0.3)
        line = line._replace(label=f"{line.label} (mean of {window * block:,})")
    axes.plot(steps, smooth, color=line.color, linewidth=1.8, label=line.label)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Means of blocks of equal length, and that length; 1 where the curve is short enough."""
    block = -(-len(steps) // _MAX_POINTS)
    starts = np.arange(0, len(steps), block)
    sizes = np.diff(np.append(starts, len(steps)))
    last = starts + sizes - 1
    return steps[last], np.add.reduceat(values, starts) / sizes, block


def _trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and up to `window` - 1 before it; a NaN breaks only its window."""
    padded = np.concatenate([np.zeros(window - 1), values])
    sums = np.lib.stride_tricks.sliding_window_view(padded, window).sum(axis=1)  # [N]
    return sums / np.minimum(np.arange(1, len(values) + 1), window)


def _style(axes: "Axes", *, x_label: str, y_label: str) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_xlabel(x_label, color=_MUTED)
    axes.set_ylabel(y_label, color=_MUTED)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=_MUTED, labelcolor=_INK)
    formatter = FuncFormatter(lambda value, _: tick(value))
    axes.xaxis.set_major_formatter(formatter)
    axes.yaxis.set_major_formatter(formatter)
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.locator_params(axis="x", nbins=6)


def tick(value: float) -> str:
    """A short number for an axis: 12k, 1.5M, 0.25, 2e-5."""
    for unit, size, end in (("k", 1e3, 1e6), ("M", 1e6, 1e9)):
        if max(size, 1e4) <= abs(value) < end:
            return f"{value / size:.6g}{unit}"
    text = f"{value:.6g}"
    return re.sub(r"e([+-])0*(\d)", lambda m: f"e{m[1].strip('+')}{m[2]}", text)


def _legend(axes: "Axes") -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=2,
        frameon=False,
        labelcolor=_INK,
        borderaxespad=0.2,
        handlelength=1.4,
        columnspacing=1.4,
    )


def _svg(
    name: str, draw: Callable[["Figure"], None], *, description: str, height: float = 2.75
) -> str:
    """Draw a figure and make its SVG fit to stand in an HTML page beside others."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: it can be selected, searched and restyled
        "svg.hashsalt": name,  # the same run gives the same bytes
        "font.size": 9.5,
        "axes.labelsize": 9.0,
        "legend.fontsize": 9.0,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.0, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    # What belongs to a file of its own: metadata, a style sheet that would apply to the whole
    # page, namespaces (HTML knows them) and the size in points (CSS decides).
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"<style type=.*?</style>", "", drawing, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', drawing)
    assert view_box, "matplotlib writes a viewBox"
    drawing = drawing[drawing.index(">") + 1 :].replace("xlink:href", "href")
    drawing = re.sub(r"font-family: [^;\"]*", "font-family: inherit", drawing)
    # Ids must be unique in the page, and matplotlib numbers those of every figure alike.
    drawing = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawing)
    for placeholder, variable in VARIABLES.items():
        drawing = drawing.replace(placeholder, variable)
    label = html.escape(description)
    return f'<svg role="img" aria-label="{label}" {view_box[0]}>{drawing}'
