"""Running a train step over a stream of batches; all that happens beside it is a list of hooks.

A whole run, with everything in it, that can be killed at any moment and started again::

    with Checkpoints(run / "checkpoints", settings=settings) as checkpoints:
        restored = checkpoints.restore_last(jax.eval_shape(init))
        if restored is None:
            state, memory = init(), Memory()
        else:
            state, memory = restored.state, restored.memory
            batches.set_state(restored.data)
        save = saving(checkpoints, batches.get_state, memory)
        with (
            Recorder(run, step=int(state.step)) as recorder,
            progress(steps, memory) as show,
            stop_signals() as should_stop,
        ):
            hooks = [
                (10, recording(recorder, schedule)),
                (10, show),
                (100, evaluation(evaluate, memory, record=recorder.write, save=save, patience=5)),
                (200, save),
            ]
            state = fit(state, step, batches, steps=steps, hooks=hooks, memory=memory,
                        should_stop=should_stop)
        checkpoints.save(state, batches.get_state(), memory)
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np

from fmjax.types import Mean, StepFn, TrainState

RUN_AHEAD = 32
"""Steps dispatched before their losses are fetched and checked, where no hook asks earlier."""


class Batches(Protocol):
    """A stream: ``next(batches)`` is a dict of host arrays with leading axis B.

    ``"index"`` int32 [B], the row of each example in its data set and -1 for padding, is used to
    count examples and to name them in errors; ``"attention_mask"`` [B, T] to count tokens.
    """

    def __next__(self) -> Mapping[str, np.ndarray]: ...


@dataclasses.dataclass
class Window:
    """Sums over the steps since the hooks of one period were last called.

    Args:
        sums: total and weight of each metric, added up in float64, step by step.
        seconds: time spent training, without the hooks.
        examples, tokens: what was seen, padding not counted.
    """

    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0


@dataclasses.dataclass
class Memory:
    """What a run remembers beside its `TrainState`; JSON, and part of every checkpoint.

    Args:
        windows: by period; kept so that a resumed run reports the means it would have reported.
        best_step, best_value: of the best evaluation so far.
        stale: evaluations since then.
        stopped: whether a hook ended the run.
    """

    windows: dict[str, Window] = dataclasses.field(default_factory=dict)
    best_step: int | None = None
    best_value: float | None = None
    stale: int = 0
    stopped: bool = False

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Memory:
        """The inverse of ``dataclasses.asdict``."""
        windows = {period: Window(**window) for period, window in saved["windows"].items()}
        return cls(**{**saved, "windows": windows})


@dataclasses.dataclass(frozen=True)
class Event:
    """What a hook is told.

    Args:
        step: steps done.
        state: after that step. The next step donates it: read it, and keep no part of it.
        metrics: means over the steps since the hook's last call, by each metric's own weights.
        seconds: training time of those steps, without the time spent in hooks.
        examples, tokens: seen in those steps.
    """

    step: int
    state: TrainState
    metrics: dict[str, float]
    seconds: float
    examples: int
    tokens: int


Hook = Callable[[Event], bool | None]
"""Called after a step; returning True ends the run."""


def fit(
    state: TrainState,
    step: StepFn,
    batches: Batches,
    *,
    steps: int,
    hooks: Sequence[tuple[int, Hook]] = (),
    memory: Memory | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    forgiven: int = 0,
) -> TrainState:
    """Runs steps ``state.step + 1 .. steps`` and returns the state after the last one.

    Steps are dispatched without waiting for their results; metrics stay on the device until a hook
    is due, are then fetched at once, and every loss and gradient norm among them is checked before
    any hook (so before any checkpoint) sees the state.

    Args:
        state: from `init_state` or a checkpoint. A compiled step donates it: do not use it again.
        step: from `jit_step` or `pmap_step`.
        batches: advanced by exactly one batch a step, never ahead of the state.
        steps: where the run ends, counted from its very beginning.
        hooks: (period, function) pairs. After step t those with ``t % period == 0`` are called, and
            all of them after the last step, in the order given: what records belongs before what
            saves. When a function returns True, the run ends after the other hooks due at t.
        memory: updated in place; save it with the state (`Checkpoints.save`) and pass the restored
            one to resume. A run that a hook ended stays ended.
        should_stop: asked after each step (`stop_signals`). On True the hooks due are called and
            the state is returned; it is the caller who then saves it.
        forgiven: steps in a row whose loss or gradient norm may be not finite, because the
            optimizer leaves them out (`fmjax.methods.spikes.skip_spikes`, which counts them); their
            metrics are no part of the means.

    Raises:
        ValueError: the state is past `steps`, a period is not positive, or the batches run out.
        FloatingPointError: a loss or gradient norm is not finite, once more than is forgiven; it
            names the step, the batch and its examples.
    """
    memory = Memory() if memory is None else memory
    done = int(state.step)
    if done > steps:
        raise ValueError(
            f"the state has done {done} steps and steps={steps}; it counts from the beginning of "
            f"the run, so give at least {done}"
        )
    periods = {period for period, _ in hooks}
    if wrong := sorted(period for period in periods if period < 1):
        raise ValueError(f"hook periods {wrong} must be at least 1 step")
    waiting: list[_Pending] = []
    clock = time.perf_counter()
    leaving, in_a_row = False, 0
    while done < steps and not memory.stopped and not leaving:
        try:
            batch: Any = next(batches)  # host arrays: the compiled step places them
        except StopIteration:
            raise ValueError(
                f"the batches ended after step {done} of {steps}; give the stream more epochs "
                f"(None never ends) or set steps={done}"
            ) from None
        state, metrics = step(state, batch)
        done += 1
        waiting.append(_Pending.of(done, batch, metrics))
        leaving = should_stop()
        due = {period for period in periods if done == steps or done % period == 0}
        if not (due or leaving or done == steps or len(waiting) == RUN_AHEAD):
            continue
        in_a_row = _deliver(waiting, memory.windows, periods, in_a_row, forgiven)
        waiting.clear()
        for period in periods:
            memory.windows[str(period)].seconds += time.perf_counter() - clock
        events = {p: _event(done, state, memory.windows.pop(str(p))) for p in due}
        for period, hook in hooks:
            if period in events and hook(events[period]):
                memory.stopped = True
        clock = time.perf_counter()
    return state


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step whose metrics are still on the device."""

    step: int
    metrics: dict[str, Mean]
    index: np.ndarray | None
    examples: int
    tokens: int

    @classmethod
    def of(cls, step: int, batch: Mapping[str, np.ndarray], metrics: dict[str, Mean]) -> _Pending:
        size = next(iter(batch.values())).shape[0]
        index = np.array(batch["index"]) if "index" in batch else None
        real = np.ones(size, bool) if index is None else index >= 0
        tokens = int(batch["attention_mask"][real].sum()) if "attention_mask" in batch else 0
        return cls(step, metrics, index, int(real.sum()), tokens)


def _deliver(
    waiting: list[_Pending],
    windows: dict[str, Window],
    periods: set[int],
    in_a_row: int,
    forgiven: int,
) -> int:
    """Fetches the metrics of the waiting steps, checks them, and adds them to the windows.

    Args:
        waiting, windows, periods: see `fit`.
        in_a_row: how many steps before them, up to the last one, were not finite.
        forgiven: how many may be.

    Returns:
        How many up to the last one now are.
    """
    fetched = jax.device_get([pending.metrics for pending in waiting])
    for place, (pending, metrics) in enumerate(zip(waiting, fetched, strict=True)):
        wrong = [
            name
            for kind in ("loss", "grad_norm")
            for name, mean in metrics.items()
            # Of several players each has its own, {player}/loss.
            if name.rpartition("/")[2] == kind and not math.isfinite(mean.total)
        ]
        in_a_row = in_a_row + 1 if wrong else 0
        if in_a_row > forgiven:
            raise FloatingPointError(_not_finite(pending, wrong[0], metrics[wrong[0]]))
        if wrong:
            fetched[place] = {}
    open_windows = [windows.setdefault(str(period), Window()) for period in periods]
    for pending, metrics in zip(waiting, fetched, strict=True):
        for window in open_windows:
            window.examples += pending.examples
            window.tokens += pending.tokens
            for name, mean in metrics.items():
                total, weight = window.sums.get(name, (0.0, 0.0))
                # Python floats: adding one step after the other in float64 gives the same bits
                # wherever the boundaries, or a restart, fall between them.
                window.sums[name] = [total + float(mean.total), weight + float(mean.weight)]
    return in_a_row


def _not_finite(pending: _Pending, name: str, mean: Mean) -> str:
    if pending.index is None:
        rows = "its examples are unknown, because the batches carry no 'index'"
    else:
        rows = f"examples {pending.index[pending.index >= 0].tolist()}"
    return (
        f"step {pending.step}: {name} is {float(mean.total)} (batch {pending.step} of the run, "
        f"counted from 1; {rows}); look at these examples, lower the learning rate or clip the "
        "gradient, and resume from the newest checkpoint, which was saved before this step"
    )


def _event(step: int, state: TrainState, window: Window) -> Event:
    means = {
        name: total / weight if weight else 0.0
        for name, (total, weight) in sorted(window.sums.items(), key=lambda item: item[0] != "loss")
    }  # the loss first: this is the order in which they are shown
    return Event(step, state, means, window.seconds, window.examples, window.tokens)


def evaluation(
    evaluate: Callable[[TrainState], Mapping[str, float]],
    memory: Memory,
    *,
    metric: str = "loss",
    mode: Literal["min", "max"] = "min",
    record: Callable[[int, str, Mapping[str, float]], None] | None = None,
    save: Hook | None = None,
    patience: int | None = None,
    min_delta: float = 0.0,
) -> Hook:
    """A hook that evaluates, keeps the best state, and ends a run that no longer improves.

    Args:
        evaluate: state -> metrics on held-out data.
        memory: the one given to `fit`; holds the best value and the count of evaluations since.
        metric, mode: what is compared, and whether lower or higher is better.
        record: called as ``record(step, "val", metrics)``: `Recorder.write`.
        save: called after an improvement: the hook from `saving`.
        patience: the run ends after this many evaluations in a row without improvement; None never
            ends it.
        min_delta: the least change that counts as an improvement.

    Raises:
        ValueError: `mode`, `patience` or `min_delta` is out of range; when called, if `evaluate`
            returns no such metric.
    """
    problems = []
    if mode not in ("min", "max"):
        problems.append(f"mode={mode!r} is not 'min' or 'max'")
    if patience is not None and patience < 1:
        problems.append(f"patience={patience} must be at least 1 evaluation, or None")
    if min_delta < 0:
        problems.append(f"min_delta={min_delta} must not be negative")
    if problems:
        raise ValueError("; ".join(problems))

    def hook(event: Event) -> bool:
        start = time.perf_counter()
        metrics = dict(evaluate(event.state))
        seconds = time.perf_counter() - start
        if metric not in metrics:
            raise ValueError(f"evaluate gave no {metric!r}; choose metric from {sorted(metrics)}")
        if record is not None:
            record(event.step, "val", {**metrics, "seconds": seconds})
        value = float(metrics[metric])
        sign = 1 if mode == "max" else -1
        # A nan is never an improvement, and never what others are compared with.
        if not math.isnan(value) and (
            memory.best_value is None or sign * (value - memory.best_value) > min_delta
        ):
            memory.best_step, memory.best_value, memory.stale = event.step, value, 0
            if save is not None:
                save(event)
        else:
            memory.stale += 1
        return patience is not None and memory.stale >= patience

    return hook
