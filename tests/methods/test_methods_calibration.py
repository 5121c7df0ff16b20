"""Temperature scaling: the likeliest temperature, and those that do not exist."""

import numpy as np
import pytest
from scipy import optimize, special

from fmjax.methods.calibration import fit_temperature
from fmjax.metrics import expected_calibration_error, negative_log_likelihood


def overconfident(size=2000):
    """Logits of which a third of the labels is drawn: calibrated at a temperature of 3."""
    draw = np.random.default_rng(0)
    logits = 2 * draw.normal(size=(size, 4))
    chances = special.softmax(logits, axis=1)
    labels = (chances.cumsum(axis=1) > draw.random((size, 1))).argmax(axis=1)
    return 3 * logits, labels


def test_the_temperature_is_the_likeliest_one():
    logits, labels = overconfident()
    temperature = fit_temperature(logits, labels)
    best = optimize.minimize_scalar(
        lambda log: negative_log_likelihood(logits / np.exp(log), labels),
        bounds=(-3, 3), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    assert temperature == pytest.approx(np.exp(best.x), rel=1e-5)
    assert temperature == pytest.approx(3, rel=0.1)
    assert fit_temperature(5 * logits + 7, labels) == pytest.approx(5 * temperature)
    # Of log-probabilities it is the same, as a constant of a row changes nothing.
    rows = special.log_softmax(logits, axis=1).astype(np.float32)
    assert fit_temperature(rows, labels) == pytest.approx(temperature, rel=1e-5)
    before, after = (special.softmax(logits / t, axis=1) for t in (1, temperature))
    assert expected_calibration_error(before, labels) > 0.15
    assert expected_calibration_error(after, labels) < 0.03


def test_temperatures_that_do_not_exist_are_refused():
    logits, labels = overconfident(50)
    with pytest.raises(ValueError, match="all 50 labels are the most probable"):
        fit_temperature(logits, logits.argmax(axis=1))
    with pytest.raises(ValueError, match="no T above 0"):
        fit_temperature(logits, logits.argmin(axis=1))
    with pytest.raises(ValueError, match="minus infinity"):
        fit_temperature(np.where(np.arange(4) == 3, -np.inf, logits), np.zeros(50, int))
    with pytest.raises(ValueError, match="3 labels for 50 rows"):
        fit_temperature(logits, labels[:3])
