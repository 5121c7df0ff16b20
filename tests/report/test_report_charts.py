"""Charts: theme colours only, unique ids, no outside reference, curves that keep their means."""

import re

import numpy as np
import pytest

from fmjax.metrics import reliability_bins
from fmjax.report.charts import (
    FIRST,
    SECOND,
    VARIABLES,
    Line,
    _thin,
    _trailing_mean,
    line_chart,
    reliability_chart,
    scatter_chart,
    tick,
)
from fmjax.report.style import STYLE

STEPS = np.arange(0, 300, 3)
NOISE = np.random.default_rng(0).random(100)


def every_chart() -> list[str]:
    train = Line("training", STEPS, NOISE + 0.1, FIRST)
    val = Line("validation", STEPS[::20], NOISE[::20], SECOND, markers=True)
    probabilities = np.random.default_rng(1).dirichlet(np.ones(3), 50)
    bins = reliability_bins(probabilities, np.arange(50) % 3)
    return [
        line_chart("loss", [train, val], y_label="loss", description='a "quoted" <word>'),
        line_chart("norm", [train], y_label="norm", description="d", log=True),
        line_chart("one", [Line("x", STEPS[:1], NOISE[:1], FIRST)], y_label="y", description="d"),
        reliability_chart("reliability", bins, description="d"),
        scatter_chart("scatter", NOISE, NOISE[::-1], description="d"),
    ]


@pytest.fixture(scope="module")
def drawings() -> list[str]:
    return every_chart()


def test_colours_come_from_the_page(drawings):
    for drawing in drawings:
        assert not re.findall(r"#[0-9a-fA-F]{3,8}\b(?!\")", re.sub(r'href="#[^"]*"', "", drawing))
        assert "var(--ink)" in drawing
    for variable in VARIABLES.values():
        # Once in the light and once in the dark set.
        assert STYLE.count(variable.removeprefix("var(").removesuffix(")") + ":") == 2


def test_nothing_reaches_outside_the_page(drawings):
    for drawing in drawings:
        assert "http" not in drawing
        assert "<style" not in drawing
        assert "<metadata" not in drawing
        assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', drawing))


def test_ids_are_unique_over_all_charts_and_references_resolve(drawings):
    ids = re.findall(r'\bid="([^"]*)"', "".join(drawings))
    assert len(ids) == len(set(ids))
    for drawing in drawings:
        own = set(re.findall(r'\bid="([^"]*)"', drawing))
        used = set(re.findall(r'href="#([^"]*)"', drawing))
        used |= set(re.findall(r"url\(#([^)]*)\)", drawing))
        assert used <= own


def test_descriptions_are_escaped(drawings):
    assert 'aria-label="a &quot;quoted&quot; &lt;word&gt;"' in drawings[0]
    assert all(drawing.startswith('<svg role="img" ') for drawing in drawings)


def test_the_same_data_gives_the_same_bytes(drawings):
    assert every_chart() == drawings


def test_long_curves_become_block_means():
    steps, values = np.arange(1234), np.random.default_rng(2).random(1234)
    thin_steps, thin_values, block = _thin(steps, values)
    assert block == 3
    assert len(thin_steps) == 412
    assert thin_steps[-1] == 1233
    assert thin_values[0] == pytest.approx(values[:3].mean())
    assert thin_values[-1] == pytest.approx(values[1233:].mean())
    long = line_chart("long", [Line("x", steps, values, FIRST)], y_label="y", description="d")
    assert len(long) < 60_000


def test_trailing_mean():
    means = _trailing_mean(np.array([2.0, 4.0, 6.0, np.nan, 1.0, 1.0, 1.0]), 3)
    np.testing.assert_allclose(means, [2.0, 3.0, 4.0, np.nan, np.nan, np.nan, 1.0])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2e-5, "2e-5"),
        (0.25, "0.25"),
        (12_000, "12k"),
        (1234, "1234"),
        (-1.5e6, "-1.5M"),
        (1e21, "1e21"),
    ],
)
def test_ticks_are_short(value, text):
    assert tick(value) == text
