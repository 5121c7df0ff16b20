"""Studies: what a space may be, going on where one stopped, ending trials, one compiled step."""

import math
import signal
import subprocess
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest

from fmjax.methods.hyper_parameter_search import (
    RETRIES,
    draw,
    open_study,
    reported,
    search,
    tunable,
    with_values,
)
from fmjax.methods.search_space import distributions
from fmjax.train import (
    Memory,
    adamw,
    evaluation,
    fit,
    gradient,
    init_state,
    jit_step,
    make_train_step,
)
from fmjax.types import Aux, Mean

SPACE = {
    "rate": {"low": 1e-4, "high": 1.0, "log": True},
    "layers": {"low": 1, "high": 5, "step": 2},
    "kind": {"choices": ["a", "b", None]},
}
DONE = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)


def study_in(folder, **changes):
    settings = {
        "space": SPACE, "objective": {"data": "none", "steps": 8}, "latest": 8, "startup": 3,
        **changes,
    }  # fmt: skip
    return open_study(folder / "study.db", settings.pop("space"), **settings)


def value_of(params):
    best = {"a": 0.0, "b": 0.3, None: 0.1}[params["kind"]]
    return best - abs(math.log10(params["rate"]) + 2) - abs(params["layers"] - 3)


def done_params(study):
    return [trial.params for trial in study.get_trials(states=DONE)]


def test_a_space_says_all_that_is_wrong():
    found = distributions(SPACE)
    assert found["rate"] == optuna.distributions.FloatDistribution(1e-4, 1.0, log=True)
    assert found["layers"] == optuna.distributions.IntDistribution(1, 5, step=2)
    assert found["kind"].choices == ("a", "b", None)
    wrong = {
        "a": {"low": 0.0, "high": 1.0, "log": True},
        "b": {"low": 2, "high": 1},
        "c": {"low": 0, "high": 4, "step": 0.5},
        "d": {"low": "x", "high": 1},
        "e": {"choices": [1, 1], "low": 3},
        "f": {"low": 1.0, "high": 2.0, "base": 10},
        "g": {"choices": [(1, 2)]},
    }
    with pytest.raises(ValueError, match="search space: 8 problems") as error:
        distributions(wrong)
    for name in wrong:
        assert f"\n  {name}: " in str(error.value)
    with pytest.raises(ValueError, match="it is empty"):
        distributions({})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that nothing interrupted."""
    with study_in(tmp_path_factory.mktemp("whole")) as study:
        return done_params(search(study, lambda trial: value_of(trial.params), trials=7))


def test_an_interrupted_study_proposes_what_it_would_have(tmp_path, whole):
    """While random, and while the estimator proposes; and the trial is run again as it was."""
    calls = []

    def objective(trial):
        calls.append(trial.params)
        if len(calls) in (2, 6):
            raise KeyboardInterrupt
        return value_of(trial.params)

    for _ in range(2):
        with study_in(tmp_path) as study, pytest.raises(KeyboardInterrupt):
            search(study, objective, trials=7)
    with study_in(tmp_path) as study:
        search(study, objective, trials=7)
        assert done_params(study) == whole
        assert calls[2] == calls[1]
        assert [t.user_attrs.get("began_as") for t in study.trials] == [
            None, None, 1, None, None, None, 5, None, None,
        ][: len(study.trials)]  # fmt: skip
        assert len({tuple(map(str, params.values())) for params in whole}) > 5
        search(study, objective, trials=7)  # nothing is left to do
        assert len(calls) == 9


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path, whole):
    code = (
        "import os, signal, sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from test_methods_hyper_parameter_search import search, study_in, value_of\n"
        "def objective(trial):\n"
        "    if trial.number == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return value_of(trial.params)\n"
        "with study_in(Path(sys.argv[1])) as study: search(study, objective, trials=7)\n"
    )
    here = str(tmp_path), *sys.path, str(__file__).rpartition("/")[0]
    killed = subprocess.run([sys.executable, "-c", code, *here], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with study_in(tmp_path) as study:
        assert study.trials[2].state == optuna.trial.TrialState.RUNNING
        search(study, lambda trial: value_of(trial.params), trials=7)
        assert done_params(study) == whole


def test_what_diverges_counts_and_what_always_fails_is_given_up(tmp_path):
    attempts = []

    def objective(trial):
        attempts.append(trial.number)
        if trial.number == 0:
            raise FloatingPointError("step 3: loss is nan")
        if trial.number == 1:
            return math.nan
        raise OSError("no memory")

    with study_in(tmp_path, direction="minimize") as study:
        for _ in range(RETRIES + 1):
            with pytest.raises(OSError, match="no memory"):
                search(study, objective, trials=3)
        search(study, objective, trials=3)
        assert [trial.state.name for trial in study.trials[:2]] == ["PRUNED", "PRUNED"]
    assert attempts == list(range(RETRIES + 3))


def test_another_study_is_refused_with_the_difference(tmp_path):
    first = {"rate": 0.1, "layers": 3, "kind": None}
    with study_in(tmp_path, defaults=[first]) as study:
        study.ask()  # as if it was killed before it had its values
        search(study, lambda trial: value_of(trial.params), trials=1)
        assert study.best_trial.params == first
        with pytest.raises(ValueError, match="another process has"), study_in(tmp_path):
            pass
    other = {**SPACE, "rate": {"low": 1e-4, "high": 0.5, "log": True}}
    with (
        pytest.raises(ValueError, match="a study of other settings") as error,
        study_in(tmp_path, space=other, objective={"data": "none", "steps": 9}, defaults=[first]),
    ):
        pass
    assert "objective/steps: 8 there, 9 here" in str(error.value)
    assert "space/rate/high: 1.0 there, 0.5 here" in str(error.value)
    with study_in(tmp_path, defaults=[first]) as study:
        assert len(study.trials) == 2


@pytest.mark.parametrize(
    "pruning",
    [
        pytest.param("median", marks=pytest.mark.slow),  # with the compiled step, too
        "halving",
        pytest.param("hyperband", marks=pytest.mark.slow),  # halvings
    ],
)
def test_bad_trials_end_early(tmp_path, pruning):
    """What falls behind ends at a report; the best goes to its end, where none is ended."""
    qualities, reports = [3.0, 4.0, 1.0, 2.0, 5.0, 0.5], []

    def objective(trial):
        quality = qualities[trial.number]
        scored = reported(
            trial, lambda state: {"score": quality + state.step / 100}, "score", per_step=2
        )
        for step in range(1, 5):
            reports.append((trial.number, 2 * step))
            scored(types.SimpleNamespace(step=step))
        return quality

    with study_in(tmp_path, pruning=pruning, startup=2, earliest=2, reduction=2) as study:
        search(study, objective, trials=6)
        states = [trial.state.name for trial in study.trials]
        assert states[4] == "COMPLETE"
        assert study.best_value == 5.0
        if pruning != "hyperband":  # where some are in brackets of the whole length
            assert states[2] == states[5] == "PRUNED"
            assert (2, 4) not in reports
        assert "PRUNED" in states


def linear(variables, batch, rng):
    errors = (batch["x"] @ variables["params"]["kernel"] - batch["y"]) ** 2
    mean = Mean.of(errors, jnp.ones_like(errors))
    return mean.value, Aux(mean.weight, {}, {})


def test_trials_share_one_compiled_step(tmp_path):
    """With other rates and decays; and it does what an ordinary optimizer of these does."""
    chex.clear_trace_counter()
    draw_numbers = np.random.default_rng(0)
    x = draw_numbers.normal(size=(8, 3)).astype(np.float32)
    batch = {"x": x, "y": x @ np.float32([1, -2, 0.5])}
    kernel = np.ones(3, np.float32)
    ends = {}

    def trained(tx, step, change, hooks=(), memory=None):
        state = init_state({"params": {"kernel": jnp.array(kernel)}}, tx, jax.random.key(0))
        stream = iter(lambda: batch, None)
        return fit(change(state), step, stream, steps=6, hooks=hooks, memory=memory)

    tx = tunable(adamw, learning_rate=0.0, weight_decay=0.0)
    step = jit_step(chex.assert_max_traces(make_train_step(gradient(linear), tx), 1))

    def objective(trial):
        memory = Memory()
        score = jax.jit(lambda state: linear(state.trainable, batch, None)[0])
        scored = reported(trial, lambda state: {"loss": float(score(state))}, "loss")
        end = trained(
            tx, step, lambda state: with_values(state, trial.params),
            [(2, evaluation(scored, memory))], memory,
        )  # fmt: skip
        ends[trial.number] = end.trainable
        return memory.best_value

    space = {
        "learning_rate": {"low": 1e-6, "high": 1.0, "log": True},
        "weight_decay": {"low": 0.0, "high": 1.0},
    }
    defaults = [
        {"learning_rate": rate, "weight_decay": decay}
        for rate, decay in ((0.1, 0.0), (0.3, 0.5), (1e-6, 0.0))
    ]
    with study_in(
        tmp_path, space=space, defaults=defaults, direction="minimize", startup=1, latest=6
    ) as study:
        search(study, objective, trials=3)
        assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED"]
        assert list(study.trials[2].intermediate_values) == [2]
    plain = adamw(0.3, weight_decay=0.5)
    step = jit_step(make_train_step(gradient(linear), plain))
    expected = trained(plain, step, lambda state: state).trainable
    np.testing.assert_allclose(ends[1]["params"]["kernel"], expected["params"]["kernel"], rtol=1e-5)
    state = init_state({"params": {"kernel": jnp.array(kernel)}}, tx, jax.random.key(0))
    with pytest.raises(ValueError, match=r"\['rate'\] are not among"):
        with_values(state, {"rate": 1.0})
    state = init_state({"params": {"kernel": jnp.array(kernel)}}, plain, jax.random.key(0))
    with pytest.raises(ValueError, match="holds 0 tunable"):
        with_values(state, {"learning_rate": 1.0})


def test_bad_settings_are_refused(tmp_path, monkeypatch):
    odd = {"rate": 2.0, "layers": 3, "kind": "a"}
    with (
        pytest.raises(ValueError, match="5 problems") as error,
        study_in(
            tmp_path, direction="up", pruning="odd", earliest=9, startup=0,
            defaults=[odd],
        ),
    ):  # fmt: skip
        pass
    assert "outside the space in ['rate']" in str(error.value)
    (tmp_path / "study.db").write_text("no database at all")
    with pytest.raises(ValueError, match="not a SQLite file"), study_in(tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "optuna.distributions", None)
    with pytest.raises(ImportError, match=r"pip install 'fmjax\[search\]'"):
        distributions(SPACE)


@pytest.mark.slow
def test_plots(tmp_path):
    with study_in(tmp_path) as study:
        search(study, lambda trial: value_of(trial.params), trials=4)
        paths = draw(study, tmp_path)
    assert [path.name for path in paths] == [
        "history.png", "slices.png", "early.png", "importances.png",
    ]  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in paths)
