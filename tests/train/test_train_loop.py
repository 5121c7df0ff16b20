"""fit and its hooks: what is run, fetched, reported, and when a run ends."""

import dataclasses
import io
import json
import math
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_equal
from rich.console import Console

from fmjax.train import gradient, init_state, jit_step, make_train_step
from fmjax.train.loop import RUN_AHEAD, Event, Memory, evaluation, fit
from fmjax.train.recording import progress
from fmjax.train.signals import stop_signals
from fmjax.types import Aux, Mean

TX = optax.sgd(0.1)


def loss_fn(variables, batch, rng):
    errors = (batch["x"] @ variables["params"]["w"] - batch["y"]) ** 2
    loss = Mean.of(errors, batch["weight"])
    return loss.value, Aux(loss.weight, {"error": Mean.of(jnp.sqrt(errors), batch["weight"])}, {})


STEP = jit_step(make_train_step(gradient(loss_fn), TX))


def start():
    return init_state({"params": {"w": jnp.zeros(3)}}, TX, jax.random.key(0))


def batch(number, rows=4):
    """Batch `number`, from 1: examples 10 * number + 0, 1, ..., the last rows padding."""
    rng = np.random.default_rng(number)
    index = 10 * number + np.arange(rows, dtype=np.int32)
    index[number % rows + 1 :] = -1
    return {
        "x": rng.normal(size=(rows, 3)).astype(np.float32),
        "y": rng.normal(size=rows).astype(np.float32),
        "weight": (index >= 0).astype(np.float32),
        "attention_mask": np.ones((rows, 5), np.int32),
        "index": index,
    }


def stream(first=1, last=10_000):
    return (batch(number) for number in range(first, last + 1))


def note(events):
    return lambda event: events.append(event)


def by_hand(steps):
    state, history = start(), []
    for number in range(1, steps + 1):
        state, metrics = STEP(state, batch(number))
        history.append(jax.device_get(metrics))
    return state, history


class Scalar:
    """A metric on an imaginary device, which tells when it is fetched."""

    shape, dtype = (), np.dtype(np.float32)

    def __init__(self, value, log):
        self.value, self.log = value, log

    def __array__(self, dtype=None, copy=None):
        self.log.append("fetch")
        return np.asarray(self.value, np.float32)


def fake_step(losses, log):
    """A step that computes nothing and reports the given losses."""

    def step(state, batch):
        number = int(state.step) + 1
        log.append(number)
        metrics = {"loss": Mean(Scalar(losses.get(number, 1.0), log), np.float32(1))}
        return dataclasses.replace(state, step=np.int32(number)), metrics

    return step


def test_runs_to_steps_as_a_plain_loop_does():
    expected, _ = by_hand(7)
    batches = stream()
    state = fit(start(), STEP, batches, steps=7)
    assert int(state.step) == 7
    assert_trees_all_equal(state.trainable, expected.trainable)
    assert next(batches)["index"][0] == 80, "exactly one batch a step is taken"
    state = fit(state, STEP, stream(8), steps=9)
    assert_trees_all_equal(state.trainable, by_hand(9)[0].trainable)


def test_the_state_is_donated():
    state = start()
    weights = state.trainable["params"]["w"]
    fit(state, STEP, stream(), steps=1)
    assert weights.is_deleted()


def test_hooks_are_called_by_period_and_at_the_end_in_order():
    calls = []
    hooks = [(p, lambda event, p=p: calls.append((event.step, p))) for p in (3, 2, 100)]
    fit(start(), STEP, stream(), steps=7, hooks=hooks)
    assert calls == [(2, 2), (3, 3), (4, 2), (6, 3), (6, 2), (7, 3), (7, 2), (7, 100)]


def test_metrics_are_weighted_means_since_the_last_call():
    _, history = by_hand(7)
    threes, twos = [], []
    fit(start(), STEP, stream(), steps=7, hooks=[(3, note(threes)), (2, note(twos))])
    assert [event.step for event in threes] == [3, 6, 7]
    for events, cuts in ((threes, (0, 3, 6, 7)), (twos, (0, 2, 4, 6, 7))):
        for event, first, last in zip(events, cuts[:-1], cuts[1:], strict=True):
            part = history[first:last]
            assert next(iter(event.metrics)) == "loss"
            for name in ("loss", "error", "grad_norm"):
                total = sum(float(m[name].total) for m in part)
                assert event.metrics[name] == total / sum(float(m[name].weight) for m in part)
            real = sum(int((batch(n + 1)["index"] >= 0).sum()) for n in range(first, last))
            assert (event.examples, event.tokens) == (real, 5 * real)


def test_means_survive_a_restart_bitwise():
    whole, parts = [], []
    fit(start(), STEP, stream(), steps=14, hooks=[(7, note(whole))])
    memory = Memory()
    state = fit(start(), STEP, stream(), steps=14, hooks=[(7, note(parts))], memory=memory,
                should_stop=iter([False] * 8 + [True]).__next__)  # fmt: skip
    assert int(state.step) == 9
    memory = Memory.from_json(json.loads(json.dumps(dataclasses.asdict(memory))))
    assert memory.windows["7"].examples > 0
    fit(state, STEP, stream(10), steps=14, hooks=[(7, note(parts))], memory=memory)
    for one, other in zip(whole, parts, strict=True):
        assert one.metrics == other.metrics
        assert (one.examples, one.tokens) == (other.examples, other.tokens)


def test_nothing_is_fetched_between_boundaries_nor_too_late():
    log = []
    fit(start(), fake_step({}, log), stream(), steps=2 * RUN_AHEAD + 1)
    fetches = [i for i, entry in enumerate(log) if entry == "fetch"]
    assert log[:RUN_AHEAD] == list(range(1, RUN_AHEAD + 1))
    assert [entry for entry in log if entry != "fetch"] == list(range(1, 2 * RUN_AHEAD + 2))
    assert {log[i - 1] for i in fetches} - {"fetch"} == {
        RUN_AHEAD,
        2 * RUN_AHEAD,
        2 * RUN_AHEAD + 1,
    }
    log.clear()
    fit(start(), fake_step({}, log), stream(), steps=6, hooks=[(3, lambda event: None)])
    assert [entry for entry in log if entry != "fetch"] == [1, 2, 3, 4, 5, 6]
    assert log[:4] == [1, 2, 3, "fetch"]


def test_seconds_leave_out_the_hooks():
    events = []
    hooks = [(2, note(events)), (1, lambda event: time.sleep(0.05))]
    fit(start(), fake_step({}, []), stream(), steps=4, hooks=hooks)
    assert all(0 < event.seconds < 0.05 for event in events)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_step_batch_and_examples(bad):
    events = []
    with pytest.raises(FloatingPointError) as error:
        fit(start(), fake_step({5: bad, 6: bad}, []), stream(), steps=20, hooks=[(8, note(events))])
    assert f"step 5: loss is {bad}" in str(error.value)
    assert "batch 5" in str(error.value)
    assert "examples [50, 51]" in str(error.value)
    assert "learning rate" in str(error.value)
    assert events == [], "no hook, so no checkpoint, sees that state"


def test_a_gradient_that_is_not_finite_is_caught_before_it_is_saved():
    def steep(variables, batch, rng):  # finite at 0, its slope is not
        return jnp.sqrt(variables["params"]["w"]).sum(), Aux(jnp.float32(1), {}, {})

    step = jit_step(make_train_step(gradient(steep), TX))
    with pytest.raises(FloatingPointError, match="step 1: grad_norm is inf"):
        fit(start(), step, stream(), steps=3, hooks=[(1, pytest.fail)])


def test_batches_without_index():
    plain = ({"x": b["x"], "y": b["y"], "weight": b["weight"]} for b in stream())
    events = []
    fit(start(), STEP, plain, steps=2, hooks=[(2, note(events))])
    assert (events[0].examples, events[0].tokens) == (8, 0)
    with pytest.raises(FloatingPointError, match="no 'index'"):
        fit(start(), fake_step({1: math.nan}, []), plain, steps=3)


def test_bad_input():
    with pytest.raises(ValueError, match=r"ended after step 4 of 6.*steps=4"):
        fit(start(), STEP, stream(1, 4), steps=6)
    state = fit(start(), STEP, stream(), steps=3)
    with pytest.raises(ValueError, match=r"done 3 steps and steps=2"):
        fit(state, STEP, stream(), steps=2)
    with pytest.raises(ValueError, match=r"\[-1, 0\] must be at least 1"):
        fit(state, STEP, stream(), steps=4, hooks=[(0, note([])), (2, note([])), (-1, note([]))])
    assert fit(state, STEP, iter(()), steps=3) is state, "a finished run is finished"


def test_a_hook_ends_the_run():
    seen, memory = [], Memory()
    hooks = [
        (2, lambda event: event.step == 4),
        (4, lambda event: seen.append((event.step, memory.stopped))),
        (3, note(seen)),
    ]
    state = fit(start(), STEP, stream(), steps=10, hooks=hooks, memory=memory)
    assert int(state.step) == 4
    assert seen[-1] == (4, True), "hooks due at that step still run, and see that it is the end"
    assert fit(state, STEP, stream(), steps=10, memory=memory) is state, "and it stays ended"


def test_should_stop_calls_only_the_hooks_due():
    seen = []
    state = fit(start(), STEP, stream(), steps=10, hooks=[(3, note(seen)), (5, note(seen))],
                should_stop=iter([False, False, False, False, False, True]).__next__)  # fmt: skip
    assert int(state.step) == 6
    assert [event.step for event in seen] == [3, 5, 6]


def evaluated(values, **settings):
    """Runs one evaluation a step; returns the steps done, the steps saved, and the memory."""
    memory, saved, results = Memory(), [], iter(values)
    hook = evaluation(
        lambda state: {"loss": next(results)}, memory, save=lambda e: saved.append(e.step),
        **settings,
    )  # fmt: skip
    state = fit(
        start(), fake_step({}, []), stream(), steps=len(values), hooks=[(1, hook)], memory=memory
    )
    return int(state.step), saved, memory


def test_evaluation_keeps_the_best():
    values = [3.0, 2.0, 2.5, 1.0, 1.0]
    steps, saved, memory = evaluated(values)
    assert (steps, saved) == (5, [1, 2, 4])
    assert (memory.best_step, memory.best_value, memory.stale) == (4, 1.0, 1)
    _, saved, memory = evaluated(values, mode="max")
    assert (saved, memory.best_value, memory.stale) == ([1], 3.0, 4)


def test_early_stopping():
    assert evaluated([3, 2, 2.5, 2.1, 1], patience=2)[:2] == (4, [1, 2])
    assert evaluated([3, 2, 2.5, 1, 2, 0, 1], patience=2)[:2] == (7, [1, 2, 4, 6])
    assert evaluated([3, 2.9, 2.8, 2.7, 1], patience=2, min_delta=0.5)[:2] == (3, [1])
    assert evaluated([math.nan, 2, math.nan, 1], patience=2)[:2] == (4, [2, 4])
    assert evaluated([math.nan] * 4, patience=3)[:2] == (3, [])


def test_early_stopping_counts_on_after_a_restart():
    memory = Memory()
    results = iter([1.0, 2.0, 2.0, 2.0, 2.0])

    def hooks():
        return [(1, evaluation(lambda s: {"loss": next(results)}, memory, patience=3))]

    state = fit(start(), fake_step({}, []), stream(), steps=9, hooks=hooks(), memory=memory,
                should_stop=iter([False, False, True]).__next__)  # fmt: skip
    assert (int(state.step), memory.stale) == (3, 2)
    memory = Memory.from_json(json.loads(json.dumps(dataclasses.asdict(memory))))
    state = fit(state, fake_step({}, []), stream(4), steps=9, hooks=hooks(), memory=memory)
    assert int(state.step) == 4


def test_evaluation_records_all_metrics():
    records = []
    hook = evaluation(
        lambda state: {"loss": 1.0, "f1": 0.5}, Memory(), metric="f1", mode="max",
        record=lambda *record: records.append(record),
    )  # fmt: skip
    fit(start(), fake_step({}, []), stream(), steps=2, hooks=[(2, hook)])
    ((step, split, values),) = records
    assert (step, split, values["loss"], values["f1"]) == (2, "val", 1.0, 0.5)
    assert values["seconds"] >= 0


def test_evaluation_bad_input():
    with pytest.raises(ValueError, match=r"mode='up'.*patience=0.*min_delta=-1"):
        evaluation(lambda state: {}, Memory(), mode="up", patience=0, min_delta=-1)  # type: ignore
    hook = evaluation(lambda state: {"loss": 1.0}, Memory(), metric="f1")
    with pytest.raises(ValueError, match=r"no 'f1'; choose metric from \['loss'\]"):
        fit(start(), fake_step({}, []), stream(), steps=2, hooks=[(2, hook)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_ask_first_and_act_then(number):
    received = []
    interrupt = signal.getsignal(signal.SIGINT)  # what starts tests in the background ignores it
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("old"))
    try:
        with stop_signals() as should_stop:
            assert not should_stop()
            os.kill(os.getpid(), number)
            assert should_stop()
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == ["old"], "a second signal reaches the handler from before"
        with stop_signals():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == ["old", "old"]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGINT) is interrupt


def test_a_signal_ends_the_run_after_its_step():
    def step_killed(state, batch):
        if int(state.step) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return STEP(state, batch)

    with stop_signals() as should_stop:
        state = fit(start(), step_killed, stream(), steps=10, should_stop=should_stop)
    assert_trees_all_equal(state.trainable, by_hand(3)[0].trainable)


def test_signals_need_the_main_thread():
    caught = []

    def enter():
        try:
            with stop_signals():
                pass
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(caught) == 1


def show(console):
    memory = Memory(best_step=1, best_value=0.25)
    state = start()
    with progress(4, memory, console=console) as hook:
        for step in (2, 4):
            hook(Event(step, state, {"loss": 0.5, "accuracy": 0.75}, 2.0, 16, 0))


def test_progress_prints_lines_where_there_is_no_terminal():
    text = io.StringIO()
    show(Console(file=text, force_terminal=False, width=40))
    first, second = text.getvalue().splitlines()
    assert first == ("step 2/4  loss 0.5  accuracy 0.75  8.0 examples/s  best 0.25 at 1  left ?")
    assert second.startswith("step 4/4 ")
    assert second.endswith("left 0:00:00")


def test_progress_draws_a_bar_on_a_terminal():
    text = io.StringIO()
    show(Console(file=text, force_terminal=True, width=120))
    assert "4/4 loss 0.5" in text.getvalue().replace("\x1b[0m", "").replace("\x1b[32m", "")
    assert "━" in text.getvalue()
