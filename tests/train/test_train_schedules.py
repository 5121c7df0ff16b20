"""Learning rates: their corners, and what does not fit."""

import numpy as np
import pytest

from fmjax.train import inverse_sqrt, warmup_cosine, warmup_stable_decay


def test_cosine():
    schedule = warmup_cosine(2.0, steps=30, warmup=10, final=0.1)
    rates = [float(schedule(step)) for step in (0, 5, 10, 20, 30, 99)]
    np.testing.assert_allclose(rates, [0, 1, 2, 1.1, 0.2, 0.2], atol=1e-6)


def test_inverse_square_root_is_the_papers():
    width, warmup = 512, 4000
    schedule = inverse_sqrt((width * warmup) ** -0.5, steps=100_000, warmup=warmup)
    for step in (1, 3999, 4000, 4001, 90_000):
        expected = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)


def test_stable_then_cooled():
    schedule = warmup_stable_decay(1.0, steps=100, warmup=10, decay=16)
    rates = [float(schedule(step)) for step in (0, 5, 10, 50, 84, 88, 100, 120)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1, 1, 0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(warmup_stable_decay(1.0, steps=100, warmup=0)(79), 1.0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: warmup_cosine(1.0, steps=3, warmup=3), "warmup=3"),
        (lambda: inverse_sqrt(1.0, steps=3, warmup=0), "warmup=0"),
        (lambda: warmup_stable_decay(1.0, steps=10, warmup=6, decay=5), "steps=10"),
    ],
)
def test_what_does_not_fit(make, said):
    with pytest.raises(ValueError, match=said):
        make()
