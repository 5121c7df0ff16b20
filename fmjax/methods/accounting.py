"""How much a private run tells: epsilon for a delta, and the noise that an epsilon needs.

Of the Gaussian mechanism on batches in which each example (or client) takes part independently with
the same probability, composed over all steps (Abadi et al. 2016, arXiv:1607.00133, section 3.2);
neighbouring data sets differ by one that is added or removed. Counted by Google's ``dp-accounting``
(``pip install 'fmjax[privacy]'``): from the privacy loss distribution (Koskela et al. 2020,
arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380), or in Rényi divergences (Mironov 2017,
arXiv:1702.07476; Mironov, Talwar and Zhang 2019, arXiv:1908.10530), which is faster and looser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from fmjax.metrics.optional import optional_library
from fmjax.train.loop import Event

ATTACHES = ("program",)

Method = Literal["pld", "rdp"]
MOST_NOISE = 100.0
"""The largest noise multiplier that is looked for."""
ORDERS = (1.25, 1.5, 1.75, 2.25, 2.5, 3.5, 4.5, *range(2, 64), 72, 96, 128, 192, 256, 512, 1024)
"""Of the Rényi divergences, among which the best is taken."""


def epsilon_of(
    noise_multiplier: float,
    *,
    delta: float,
    sample_rate: float,
    steps: int,
    method: Method = "pld",
    overflow: float = 0.0,
) -> float:
    """The epsilon for which `steps` noisy steps are (epsilon, delta) private; infinity without
    noise.

    Args:
        noise_multiplier: of `private_gradient`.
        delta: the chance that the guarantee may fail; below 1 / N for N examples.
        sample_rate: the probability with which each example is in a batch.
        steps: done, or planned.
        method: of accounting.
        overflow: the chance that any batch was cut for want of rows
            (`fmjax.data.sampled.overflow`): such a run may be told from an ideal one by no more,
            which costs ``(1 + exp(epsilon)) * overflow`` of delta.

    Raises:
        ValueError: an argument out of its range, or an overflow that delta cannot bear.
        ImportError: dp-accounting is not installed.
    """
    _check(delta=delta, sample_rate=sample_rate, steps=steps, overflow=overflow, method=method)
    if noise_multiplier < 0 or math.isnan(noise_multiplier):
        raise ValueError(f"noise_multiplier={noise_multiplier} must be at least 0")
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    accountant = _accountant(method, steps)()
    accountant.compose(_event(noise_multiplier, sample_rate), steps)
    epsilon, before = float(accountant.get_epsilon(delta)), -math.inf
    # From below: a larger epsilon leaves less of delta, which asks for a larger one.
    while overflow and epsilon - before > 1e-6 * max(1.0, epsilon):
        before, left = epsilon, _left(delta, epsilon, overflow)
        epsilon = float(accountant.get_epsilon(left))
    return epsilon


def noise_for(
    epsilon: float,
    *,
    delta: float,
    sample_rate: float,
    steps: int,
    method: Method = "pld",
    overflow: float = 0.0,
    most: float = MOST_NOISE,
) -> float:
    """The least noise multiplier with which `steps` steps are (epsilon, delta) private.

    Args:
        epsilon: above 0; infinity gives 0.
        delta, sample_rate, steps, method, overflow: as in `epsilon_of`.
        most: the largest noise multiplier that would be of use.

    Raises:
        ValueError: an argument out of its range, or an epsilon that needs more than `most`; the
            message says how many steps it allows, and what epsilon that many steps have.
        ImportError: dp-accounting is not installed.
    """
    _check(delta=delta, sample_rate=sample_rate, steps=steps, overflow=overflow, method=method)
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be above 0")
    if math.isinf(epsilon) or steps == 0:
        return 0.0
    left = _left(delta, epsilon, overflow)
    accounting = optional_library("dp_accounting", "dp-accounting", "privacy")

    fresh = _accountant(method, steps)

    def calibrated(event: Callable[[Any], Any], low: float, high: float, **options: Any) -> float:
        interval = accounting.ExplicitBracketInterval(low, high)
        return accounting.calibrate_dp_mechanism(fresh, event, epsilon, left, interval, **options)

    def spent(noise: float, steps: int) -> float:
        return fresh().compose(_event(noise, sample_rate), steps).get_epsilon(left)

    if (least := spent(most, steps)) > epsilon:
        message = (
            f"epsilon={epsilon} is out of reach in {steps} steps at sample_rate={sample_rate}: "
            f"with noise_multiplier={most}, the most allowed, they have epsilon {least:.4g}"
        )
        if spent(most, 1) <= epsilon:
            possible = calibrated(
                lambda count: accounting.SelfComposedDpEvent(_event(most, sample_rate), count),
                1,
                steps,
                discrete=True,
            )
            message += f"; do at most {possible} steps, or"
        else:
            message += "; even one step is too much:"
        raise ValueError(f"{message} lower sample_rate, or raise epsilon or delta")

    def composed(noise: float) -> Any:
        return accounting.SelfComposedDpEvent(_event(noise, sample_rate), steps)

    high = min(most, 1.0)
    while spent(high, steps) > epsilon:
        high = min(most, 2 * high)
    low = high / 2
    while spent(low, steps) <= epsilon:
        low /= 2
    return float(calibrated(composed, low, high, tol=1e-3 * high))


def spending(
    record: Callable[[int, str, Mapping[str, float]], None],
    noise_multiplier: float,
    *,
    delta: float,
    sample_rate: float,
    split: str = "privacy",
    most: float = math.inf,
    every: int = 1,
    method: Method = "rdp",
    overflow: float = 0.0,
) -> Callable[[Event], bool]:
    """A hook for `fit` that records the epsilon spent so far, and ends a run that would exceed it.

    Args:
        record: called as ``record(step, split, {"epsilon", "delta"})``: `Recorder.write`.
        noise_multiplier, delta, sample_rate, method, overflow: as in `epsilon_of`.
        split: under which it is recorded.
        most: the run ends where another `every` steps would spend more.
        every: the hook's period in `fit`.

    Raises:
        ValueError: when called, as `epsilon_of`.
    """

    def hook(event: Event) -> bool:
        def spent(steps: int) -> float:
            return epsilon_of(
                noise_multiplier,
                delta=delta,
                sample_rate=sample_rate,
                steps=steps,
                method=method,
                overflow=overflow,
            )

        record(event.step, split, {"epsilon": spent(event.step), "delta": delta})
        return math.isfinite(most) and spent(event.step + every) > most

    return hook


def _event(noise_multiplier: float, sample_rate: float) -> Any:
    accounting = optional_library("dp_accounting", "dp-accounting", "privacy")
    return accounting.PoissonSampledDpEvent(
        sample_rate, accounting.GaussianDpEvent(noise_multiplier)
    )


def _accountant(method: Method, steps: int) -> Callable[[], Any]:
    """Makes a fresh accountant, for about so many steps."""
    if method == "rdp":
        rdp = optional_library("dp_accounting.rdp", "dp-accounting", "privacy")
        return lambda: rdp.RdpAccountant(ORDERS)
    pld = optional_library("dp_accounting.pld", "dp-accounting", "privacy")
    # Losses are rounded up to a grid, which adds at most about steps * interval^2 to epsilon: 1e-4,
    # in a tenth of the time that the library's own 1e-4 takes for a hundred steps.
    interval = 0.01 / math.sqrt(max(steps, 100))
    return lambda: pld.PLDAccountant(value_discretization_interval=interval)


def _left(delta: float, epsilon: float, overflow: float) -> float:
    """What of delta is left for the noise."""
    cost = 0.0 if overflow == 0 else (1 + math.exp(min(epsilon, 700.0))) * overflow
    if cost >= delta:
        raise ValueError(
            f"overflow={overflow} costs {cost:.3g} of delta={delta} at epsilon {epsilon:.4g}; give "
            "batches more rows (fmjax.data.sampled.capacity_of)"
        )
    return delta - cost


def _check(*, delta: float, sample_rate: float, steps: int, overflow: float, method: str) -> None:
    problems = [
        f"{name}={value} must be {rule}"
        for name, value, rule, right in [
            ("delta", delta, "in (0, 1)", 0 < delta < 1),
            ("sample_rate", sample_rate, "in (0, 1]", 0 < sample_rate <= 1),
            ("steps", steps, "at least 0", steps >= 0),
            ("overflow", overflow, "in [0, 1)", 0 <= overflow < 1),
            ("method", repr(method), "'pld' or 'rdp'", method in ("pld", "rdp")),
        ]
        if not right
    ]
    if problems:
        raise ValueError("; ".join(problems))
