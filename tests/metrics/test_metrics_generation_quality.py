"""FID against its formula by scipy, KID against loops; both on distributions that are known."""

import numpy as np
import pytest
import scipy.linalg

from fmjax.metrics import frechet_distance, kernel_distance


def drawn(count, width=5, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + shift


def test_frechet_distance_is_the_formula():
    first, second = drawn(50), drawn(40, shift=0.5, seed=1)
    one, other = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(one @ other).real
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(one + other - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)
    # Fewer examples than features: the covariances have no full rank.
    few, others = drawn(4, width=9), drawn(3, width=9, seed=1)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6 * np.trace(np.cov(few.T)))
    assert frechet_distance(few, others) > 0
    # A shift alone moves the means alone.
    assert frechet_distance(first, first + 2.0) == pytest.approx(5 * 4.0)


def test_kernel_distance_is_the_unbiased_estimate():
    first, second = drawn(7), drawn(6, shift=0.5, seed=1)

    def kernel(x, y):
        return (x @ y / 5 + 1) ** 3

    def within(x):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
        return np.mean([kernel(x[i], x[j]) for i, j in pairs])

    between = np.mean([kernel(x, y) for x in first for y in second])
    expected = within(first) + within(second) - 2 * between
    assert kernel_distance(first, second) == (pytest.approx(expected), 0.0)
    # Of one distribution its mean is 0; the standard error is measured by the same draws.
    values = [
        kernel_distance(*np.random.default_rng(i).normal(size=(2, 10, 3)))[0] for i in range(300)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)
    assert min(values) < 0 < max(values)
    mean, spread = kernel_distance(drawn(50), drawn(50, seed=0), subset_size=10, subsets=5)
    assert spread > 0
    assert (mean, spread) == kernel_distance(drawn(50), drawn(50), subset_size=10, subsets=5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one net") as error:
        frechet_distance(np.zeros((1, 3)), np.full((4, 2), np.nan))
    assert "real features have the shape (1, 3)" in str(error.value)
    assert "4 of 4 made examples" in str(error.value)
    with pytest.raises(ValueError, match="there are 3 examples"):
        kernel_distance(np.zeros((3, 2)), np.zeros((4, 2)), subset_size=4)
