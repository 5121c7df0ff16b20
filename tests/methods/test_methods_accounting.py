"""Epsilon against dp-accounting by another of its interfaces, and against closed forms."""

import math
import types

import numpy as np
import pytest
from scipy import stats

from fmjax.methods.accounting import epsilon_of, noise_for, spending

pytest.importorskip("dp_accounting", reason="needs fmjax[privacy]")


def test_published_settings_have_the_epsilon_that_the_library_itself_computes():
    # TensorFlow Privacy's tutorial on MNIST: 60,000 pictures, batches of 256, 60 epochs.
    from dp_accounting.pld import privacy_loss_distribution
    from dp_accounting.rdp import rdp_privacy_accountant

    rate, steps, noise = 256 / 60000, 60 * 60000 // 256, 1.1
    setting = {"delta": 1e-5, "sample_rate": rate, "steps": steps}
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=1e-4
    )
    expected = loss.self_compose(steps).get_epsilon_for_delta(1e-5)
    assert epsilon_of(noise, **setting) == pytest.approx(expected, rel=1e-3)
    orders = np.array([6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0])
    # Of whole orders the divergence is a finite sum (arXiv:1908.10530, section 3.3).
    divergences = []
    for order in orders.astype(int):
        k = np.arange(order + 1)
        terms = (
            np.array([math.log(math.comb(int(order), int(i))) for i in k])
            + (order - k) * math.log1p(-rate)
            + k * math.log(rate)
            + (k * k - k) / (2 * noise**2)
        )
        divergences.append(steps * np.logaddexp.reduce(terms) / (order - 1))
    renyi, _ = rdp_privacy_accountant.compute_epsilon(orders, divergences, 1e-5)
    found = epsilon_of(noise, **setting, method="rdp")
    assert found == pytest.approx(renyi, rel=1e-3)
    assert 2.3 < expected < found < 2.65


def test_one_step_on_everything_is_the_gaussian_mechanism():
    # Balle and Wang 2018, arXiv:1805.06530, theorem 8.
    epsilon = epsilon_of(1.7, delta=1e-3, sample_rate=1.0, steps=1)
    a, b = 1 / (2 * 1.7), epsilon * 1.7
    delta = stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b)
    assert delta == pytest.approx(1e-3, rel=1e-2)
    assert epsilon_of(1.7, delta=1e-3, sample_rate=1.0, steps=0) == 0
    assert epsilon_of(0.0, delta=1e-3, sample_rate=1.0, steps=1) == math.inf


def test_the_noise_found_just_reaches_the_epsilon():
    setting = {"delta": 1e-4, "sample_rate": 0.1, "steps": 20}
    noise = noise_for(2.0, **setting)
    assert 1.98 < epsilon_of(noise, **setting) <= 2.0
    assert noise_for(2.0, **setting, overflow=1e-6) > noise
    cut = epsilon_of(noise, **setting, overflow=1e-6)
    assert epsilon_of(noise, **setting) < cut
    left = 1e-4 - (1 + math.exp(cut)) * 1e-6
    assert cut == pytest.approx(epsilon_of(noise, **setting | {"delta": left}), rel=1e-4)
    assert noise_for(math.inf, **setting) == 0


def test_an_epsilon_out_of_reach_says_what_would_do():
    setting = {"delta": 1e-5, "sample_rate": 0.1, "most": 4.0, "method": "rdp"}
    with pytest.raises(
        ValueError, match=r"out of reach in 5000 steps.*do at most (\d+) steps"
    ) as e:
        noise_for(1.0, steps=5000, **setting)
    possible = int(str(e.value).split("at most ")[1].split()[0])
    del setting["most"]
    assert epsilon_of(4.0, steps=possible, **setting) <= 1.0
    assert epsilon_of(4.0, steps=possible + 2, **setting) > 1.0
    with pytest.raises(ValueError, match="even one step is too much"):
        noise_for(1e-6, steps=10, most=4.0, **setting)


def test_numbers_out_of_range_are_all_named():
    with pytest.raises(ValueError, match=r"delta=0 .*sample_rate=2 .*steps=-1 .*method='gdp'"):
        epsilon_of(1.0, delta=0, sample_rate=2, steps=-1, method="gdp")
    with pytest.raises(ValueError, match="epsilon=-1"):
        noise_for(-1, delta=1e-5, sample_rate=0.1, steps=1)
    with pytest.raises(ValueError, match=r"overflow=0\.1 costs"):
        epsilon_of(1.0, delta=1e-5, sample_rate=0.1, steps=1, overflow=0.1, method="rdp")


def test_what_is_spent_is_recorded_and_ends_the_run():
    setting = {"delta": 1e-5, "sample_rate": 0.1}
    rows = []
    most = epsilon_of(1.0, steps=25, method="rdp", **setting)
    hook = spending(lambda *row: rows.append(row), 1.0, most=most, every=10, **setting)
    ends = [hook(types.SimpleNamespace(step=step)) for step in (10, 20)]
    assert ends == [False, True]  # ten more would be 30
    step, split, metrics = rows[1]
    assert (step, split) == (20, "privacy")
    assert metrics["epsilon"] == epsilon_of(1.0, steps=20, method="rdp", **setting)
