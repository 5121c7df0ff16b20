"""Learning rates over a run: a warm-up, and what comes after it."""

from __future__ import annotations

import jax.numpy as jnp
import optax


def _check(steps: int, warmup: int) -> None:
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup={warmup} must be at least 0 and below steps={steps}")


def warmup_linear(peak: float, *, steps: int, warmup: int) -> optax.Schedule:
    """0 -> `peak` over `warmup` steps, then linearly to 0 at `steps` (Devlin et al. 2019, A.2).

    Raises:
        ValueError: `warmup` is not below `steps`.
    """
    _check(steps, warmup)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.linear_schedule(peak, 0.0, steps - warmup),
        ],
        [warmup],
    )


def warmup_cosine(peak: float, *, steps: int, warmup: int, final: float = 0.0) -> optax.Schedule:
    """0 -> `peak` over `warmup` steps, then half a cosine to `final` times the peak at `steps`.

    Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, without restarts.

    Raises:
        ValueError: `warmup` is not below `steps`.
    """
    _check(steps, warmup)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, peak * final)


def inverse_sqrt(peak: float, *, steps: int, warmup: int) -> optax.Schedule:
    """0 -> `peak` over `warmup` steps, then falling with the square root of the step.

    Vaswani et al. 2017, arXiv:1706.03762, eq. 3, whose peak is ``(D * warmup) ** -0.5``. It never
    ends, and so does not depend on `steps`.

    Raises:
        ValueError: `warmup` is below 1, or not below `steps`.
    """
    _check(steps, warmup)
    if warmup < 1:
        raise ValueError(f"warmup={warmup} must be at least 1: the rate falls with steps / warmup")

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        return peak * jnp.minimum(step / warmup, jnp.sqrt(warmup / jnp.maximum(step, 1)))

    return schedule


def warmup_stable_decay(
    peak: float, *, steps: int, warmup: int, decay: int | None = None
) -> optax.Schedule:
    """0 -> `peak` over `warmup` steps, there until `decay` steps before the end, then to 0.

    WSD (Hu et al. 2024, arXiv:2404.06395, section 4.2): any state of the stable part can be cooled
    down, or trained on. The decay is ``1 - sqrt(share)`` (Hägele et al. 2024, arXiv:2405.18392,
    section 3).

    Args:
        decay: steps; None is a fifth of all.

    Raises:
        ValueError: `warmup` and `decay` do not fit into `steps`.
    """
    decay = max(1, steps // 5) if decay is None else decay
    if warmup < 0 or decay < 1 or warmup + decay > steps:
        raise ValueError(
            f"warmup={warmup} and decay={decay} must fit into steps={steps}, decay at least 1"
        )

    def cooled(step):
        return peak * (1 - jnp.sqrt(jnp.clip(step / decay, 0, 1)))

    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak), cooled],
        [warmup, steps - decay],
    )
