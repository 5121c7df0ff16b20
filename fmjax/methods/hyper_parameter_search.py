"""Search of hyper-parameters: a study that goes on where it stopped and ends bad trials early.

Values are proposed by the tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for
hyper-parameter optimization", section 4; over all values jointly as in Falkner et al. 2018,
arXiv:1807.01774) of Optuna (Akiba et al. 2019, arXiv:1907.10902; ``pip install 'fmjax[search]'``).
A trial is ended early by the median of those before it, by asynchronous successive halving (Li et
al. 2018, arXiv:1810.05934, algorithm 2) or by Hyperband (Li et al. 2016, arXiv:1603.06560)::

    space = {"learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}}
    tx = tunable(adamw, learning_rate=5e-5)
    step = jit_step(make_train_step(gradient(loss), tx))  # once for all trials

    def objective(trial):
        state = with_values(init_state(variables(), tx, jax.random.key(0)), trial.params)
        scored = reported(trial, evaluate, "accuracy")
        fit(state, step, batches(), steps=200, hooks=[(50, evaluation(scored, memory, ...))], ...)
        return memory.best_value

    with open_study("study.db", space, objective={"data": "..."}, latest=200) as study:
        search(study, objective, trials=40)
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmjax.data.files import raise_problems
from fmjax.methods.search_space import Space, distributions, holds, optuna_library
from fmjax.train.optim import states_of
from fmjax.types import TrainState

if TYPE_CHECKING:
    import optuna

ATTACHES = ("program",)

Pruning = Literal["median", "halving", "hyperband", "none"]
PRUNINGS = ("median", "halving", "hyperband", "none")
RECORD = "search"
"""The attribute of a study that says what it searches."""
RETRIES = 2
"""Times a trial that ended its process is tried again before it counts as failed."""


def _differences(stored: Any, given: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, by path."""
    if isinstance(stored, dict) and isinstance(given, dict):
        return [
            difference
            for name in sorted(stored.keys() | given.keys())
            for difference in _differences(
                stored.get(name), given.get(name), f"{path}/{name}".lstrip("/")
            )
        ]
    return [] if stored == given else [f"{path}: {stored!r} there, {given!r} here"]


def _pruner(said: Mapping[str, Any], startup: int) -> Any:
    pruners = optuna_library(".pruners")
    earliest, latest, reduction = said["earliest"], said["latest"], said["reduction"]
    match said["kind"]:
        case "median":
            return pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=earliest)
        case "halving":
            return pruners.SuccessiveHalvingPruner(earliest, reduction)
        case "hyperband":
            return pruners.HyperbandPruner(earliest, latest, reduction)
        case _:
            return pruners.NopPruner()


@contextlib.contextmanager
def open_study(
    file: str | os.PathLike[str],
    space: Space,
    *,
    objective: Mapping[str, Any],
    latest: int,
    direction: Literal["maximize", "minimize"] = "maximize",
    pruning: Pruning = "median",
    earliest: int = 1,
    reduction: int = 3,
    startup: int = 8,
    defaults: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
) -> Iterator[optuna.Study]:
    """A study in a SQLite file, new or as it was left; for one process at a time.

    Within the context the file is locked (by FILE.lock), so that whatever is found running was
    interrupted.

    Args:
        file: of the study.
        space: what is searched.
        objective: what a trial's value depends on besides: data, model, steps, metric. Plain JSON;
            it is kept so that no study goes on with another.
        latest: the last report of a whole trial, see `reported`; there no trial is ended.
        direction: of better values.
        pruning: what ends trials early.
        earliest: the first report at which it may.
        reduction: "halving" and "hyperband" keep one in so many trials at each rung (eta).
        startup: trials that are drawn at random, and before which the median ends none.
        defaults: values that are tried first: what one would take without a search.
        seed: of the proposals; proposal n depends on it, on n and on the trials before, wherever
            the study was interrupted.

    Raises:
        ValueError: settings out of range, all listed; a study of other settings, with the
            differences; a file that is no study, or that another process has open.
        ImportError: Optuna is not installed.
    """
    distributions(space)
    problems = []
    if direction not in ("maximize", "minimize"):
        problems.append(f"direction={direction!r} is not 'maximize' or 'minimize'")
    if pruning not in PRUNINGS:
        problems.append(f"pruning={pruning!r} is not one of {PRUNINGS}")
    if not 1 <= earliest <= latest:
        problems.append(f"earliest={earliest} must be from 1 to latest={latest}")
    if reduction < 2 or startup < 1:
        problems.append(f"reduction={reduction} must be at least 2 and startup={startup} 1")
    for values in defaults:
        if values.keys() != space.keys():
            problems.append(f"defaults {dict(values)} must have the space's names {list(space)}")
        elif wrong := [n for n, value in values.items() if not holds(space[n], value)]:
            problems.append(f"defaults {dict(values)} are outside the space in {wrong}")
    raise_problems("open_study", problems)
    ending = {"kind": pruning, "earliest": earliest, "latest": latest, "reduction": reduction}
    record = {
        "space": {name: dict(said) for name, said in space.items()},
        "objective": dict(objective),
        "direction": direction,
        "pruning": ending,
        "startup": startup,
        "defaults": [dict(values) for values in defaults],
        "seed": seed,
    }
    record = json.loads(json.dumps(record))  # as it is read back
    path = Path(file).absolute()
    with _locked(path):
        storage = optuna_library(".storages").RDBStorage(f"sqlite:///{path}")
        try:
            study = optuna_library().create_study(
                storage=storage,
                study_name="search",
                direction=direction,
                load_if_exists=True,
                pruner=_pruner(ending, startup),
            )
            stored = study.user_attrs.get(RECORD)
            if stored is None:
                study.set_user_attr(RECORD, record)
            elif changed := _differences(stored, record):
                raise_problems(
                    f"{path} is a study of other settings; choose another file, or the same",
                    changed,
                )
            for values in record["defaults"][len(study.trials) :]:
                study.enqueue_trial(values, user_attrs={"given": values})
            yield study
        finally:
            storage.remove_session()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the study's lock, which the system frees however the process ends.

    Raises:
        ValueError: another process holds it, or the file is not SQLite's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open("rb") as stream:
            if stream.read(16) not in (b"", b"SQLite format 3\0"):
                raise ValueError(f"{path} is not a SQLite file; give the file of a study")
    connection = sqlite3.connect(f"{path}.lock", timeout=0, isolation_level=None)
    try:
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise ValueError(
                f"another process has {path} open ({error}); wait for it, or take another file"
            ) from error
        yield
    finally:
        connection.close()


def _sampler(record: Mapping[str, Any], proposal: int) -> Any:
    """Seeded anew for each proposal: a seed for all would begin again after an interruption."""
    seed = int(np.random.SeedSequence([record["seed"], proposal]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna_library(".exceptions").ExperimentalWarning)
        return optuna_library(".samplers").TPESampler(
            seed=seed, n_startup_trials=record["startup"], multivariate=True, constant_liar=False
        )


def _settle(study: optuna.Study) -> int:
    """Queues again what was interrupted; returns how many trials are done.

    Queued first and then failed, and not queued twice: whenever this is interrupted, no trial is
    lost.
    """
    states = optuna_library(".trial").TrialState
    trials = study.get_trials(deepcopy=False)
    retried = {trial.user_attrs.get("retry_of") for trial in trials}
    done = 0
    for trial in trials:
        attempt = trial.user_attrs.get("attempt", 1)
        if trial.state == states.RUNNING:
            if attempt <= RETRIES and trial.number not in retried:
                # It may have ended before it had its values.
                values = {**trial.user_attrs.get("given", {}), **trial.params}
                study.enqueue_trial(
                    values,
                    user_attrs={
                        "given": values,
                        "began_as": trial.user_attrs.get("began_as", trial.number),
                        "retry_of": trial.number,
                        "attempt": attempt + 1,
                    },
                )
            study.tell(trial.number, state=states.FAIL)
            done += attempt > RETRIES
        elif trial.state in (states.COMPLETE, states.PRUNED):
            done += 1
        elif trial.state == states.FAIL:
            done += attempt > RETRIES
    return done


def search(
    study: optuna.Study, objective: Callable[[optuna.Trial], float], *, trials: int
) -> optuna.Study:
    """Runs trials until the study has that many, and returns it.

    A trial whose training is not finite (FloatingPointError, or a value that is nan) counts as
    ended early: it tells where not to look. Any other error, a signal or a kill leaves the trial to
    be tried again by the next call, with the same values and another number; the number it first
    had is its user attribute ``began_as``, for a folder of checkpoints to go on from. Where a
    signal ends a training without an error (`fmjax.recipes.training.train` then gives None), the
    objective is to raise KeyboardInterrupt.

    Args:
        study: from `open_study`.
        objective: trial -> its value; ``trial.params`` has a value for each name of the space.
        trials: of the whole study, those of earlier calls included.

    Raises:
        ValueError: fewer than one trial.
    """
    if trials < 1:
        raise ValueError(f"trials={trials} must be at least 1")
    record = study.user_attrs[RECORD]
    space = distributions(record["space"])
    states, pruned = optuna_library(".trial").TrialState, optuna_library().TrialPruned
    while (done := _settle(study)) < trials:
        study.sampler = _sampler(record, done)
        trial = study.ask(space)
        try:
            value = float(objective(trial))
        except (pruned, FloatingPointError):
            value = math.nan
        if math.isnan(value):
            study.tell(trial, state=states.PRUNED)
        else:
            study.tell(trial, value)
    return study


def reported(
    trial: optuna.Trial,
    evaluate: Callable[[TrainState], Mapping[str, float]],
    metric: str,
    *,
    per_step: int = 1,
) -> Callable[[TrainState], Mapping[str, float]]:
    """The same evaluation, which also tells the study and ends a trial that is not worth going on.

    For `fmjax.train.evaluation` and `fmjax.recipes.training.train`, which let through the exception
    that ends the trial.

    Args:
        trial: the objective's.
        evaluate: state -> metrics on held-out data.
        metric: which of them is told.
        per_step: what a step counts in the study's reports (`earliest`, `latest`): 1 for steps, the
            batch size for examples, where trials differ in it.

    Raises:
        ValueError: when called, there is no such metric.
    """
    latest = trial.study.user_attrs[RECORD]["pruning"]["latest"]

    def evaluate_and_report(state: TrainState) -> Mapping[str, float]:
        metrics = evaluate(state)
        if metric not in metrics:
            raise ValueError(f"evaluate gave no {metric!r}; choose from {sorted(metrics)}")
        place = int(state.step) * per_step
        trial.report(float(metrics[metric]), place)
        if place < latest and trial.should_prune():
            raise optuna_library().TrialPruned(f"ended early at {place} of {latest}")
        return metrics

    return evaluate_and_report


def tunable(
    make: Callable[..., optax.GradientTransformation], **values: float
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose named numbers are part of its state: other ones compile nothing anew.

    Args:
        make: called with numbers by name that may be traced arrays: no Python branch may depend on
            them. Its other arguments keep their defaults.
        values: at the beginning; change them by `with_values`.
    """

    fixed = [name for name in inspect.signature(make).parameters if name not in values]
    # Python's floats, so that each state gets arrays of its own: a step donates them.
    floats = {name: float(value) for name, value in values.items()}
    return optax.inject_hyperparams(make, static_args=fixed)(**floats)


def with_values(state: TrainState, values: Mapping[str, float]) -> TrainState:
    """A state with other numbers in its `tunable` optimizer.

    Args:
        state: not yet trained, or in the middle.
        values: by name; those that are not said stay.

    Raises:
        ValueError: names that the optimizer does not have, or no tunable optimizer, or several.
    """

    def is_tunable(leaf: Any) -> bool:
        return isinstance(leaf, optax.InjectStatefulHyperparamsState)

    found = states_of(state.opt_state, optax.InjectStatefulHyperparamsState)
    if len(found) != 1:
        raise ValueError(
            f"the optimizer state holds {len(found)} tunable optimizers; make exactly one by "
            "tunable(...)"
        )
    current = found[0].hyperparams
    if unknown := sorted(values.keys() - current.keys()):
        raise ValueError(f"{unknown} are not among the optimizer's numbers {sorted(current)}")
    given = {name: jnp.asarray(value, current[name].dtype) for name, value in values.items()}
    opt_state = jax.tree.map(
        lambda x: x._replace(hyperparams={**current, **given}) if is_tunable(x) else x,
        state.opt_state,
        is_leaf=is_tunable,
    )
    return dataclasses.replace(state, opt_state=opt_state)


def draw(study: optuna.Study, folder: Path) -> list[Path]:
    """Optuna's plots as files: history.png, slices.png (a panel a name), early.png (reports along
    trials), and with two trials that went to their end importances.png (Watanabe et al. 2023,
    arXiv:2304.10255, where the version of Optuna has it)."""
    import matplotlib
    from matplotlib import pyplot

    plots = optuna_library(".visualization.matplotlib")
    kinds = {
        "history": plots.plot_optimization_history,
        "slices": plots.plot_slice,
        "early": plots.plot_intermediate_values,
    }
    complete = study.get_trials(
        deepcopy=False, states=(optuna_library(".trial").TrialState.COMPLETE,)
    )
    if len({trial.value for trial in complete}) > 1:
        kinds["importances"] = plots.plot_param_importances
    paths = []
    # Optuna sets a style for all plots, and says of each of these that it may change.
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna_library(".exceptions").ExperimentalWarning)
        for name, plot in kinds.items():
            figure = np.ravel(np.asarray(plot(study), dtype=object))[0].figure
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
            pyplot.close(figure)
    return paths
