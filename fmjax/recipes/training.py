"""A whole training run of any loss: schedule, step, checkpoints, records, signals, best state."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

import fmjax.hub as hub
from fmjax.config import write_json
from fmjax.data import BatchStream
from fmjax.data.files import raise_problems
from fmjax.methods.optimizers import adafactor, lamb, lion, muon
from fmjax.perf.device import describe_machine
from fmjax.recipes.memory_errors import Setup, Watched, explained
from fmjax.report import write_report
from fmjax.train import (
    accumulate,
    adamw,
    cast,
    gradient,
    init_state,
    inverse_sqrt,
    is_param,
    jit_step,
    layout,
    make_mesh,
    make_train_step,
    parse_mesh,
    quantized_products,
    warmup_cosine,
    warmup_linear,
    warmup_stable_decay,
)
from fmjax.train.checkpoint import Checkpoints, saving
from fmjax.train.loop import Hook, Memory, evaluation, fit
from fmjax.train.moments import Moments
from fmjax.train.optim import ema_of, track_ema
from fmjax.train.profiling import parse_steps, profiled
from fmjax.train.quantized_products import Quantized
from fmjax.train.recording import Recorder, progress, recording, writable_folder
from fmjax.train.sharding import placed
from fmjax.train.signals import stop_signals
from fmjax.tree import cast_as, count, count_parameters, map_with_path, merge
from fmjax.types import GradFn, LossFn, Remat, StepFn, TrainState, Variables

Schedule = Literal["linear", "cosine", "inverse_sqrt", "stable"]
Optimizer = Literal["adamw", "muon", "lamb", "adafactor", "lion"]
Precision = Literal["float32", "bfloat16"]
Matmuls = Literal["float"] | Quantized
OPTIMIZERS = {"adamw": adamw, "muon": muon, "lamb": lamb, "adafactor": adafactor, "lion": lion}
SCHEDULES = {
    "linear": warmup_linear,
    "cosine": warmup_cosine,
    "inverse_sqrt": inverse_sqrt,
    "stable": warmup_stable_decay,
}
STOPPED = {"stopped": True}
"""The results of a run that a signal ended early; running again continues it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained, whatever it is trained on."""

    output: Path
    """The run's folder; a run that was interrupted there is continued."""
    epochs: float = 3.0
    """Passes over the training data."""
    max_steps: int | None = None
    """Ends the run, and its schedule, earlier."""
    batch_size: int = 32
    """Examples a step, over all devices."""
    microbatches: int = 1
    """Pieces a batch is computed in, to save memory."""
    learning_rate: float = 5e-5
    """Peak of the schedule."""
    schedule: Schedule = "linear"
    """After the warm-up: to 0 on a line or a cosine, with the square root of the step, or only in
    the last fifth of the run."""
    warmup: float = 0.1
    """Share of the steps that warm up."""
    optimizer: Optimizer = "adamw"
    """Muon learns from fewer tokens, at more computation a step; Adafactor and Lion keep less."""
    moments: Moments = "float32"
    """As what the optimizer keeps its moments; bfloat16, rounded at random, is half the memory."""
    weight_decay: float = 0.01
    """Of kernels and embeddings."""
    ema: float | None = None
    """Decay of a moving average of the weights, which is then what is evaluated and left; None for
    the weights themselves."""
    precision: Precision = "float32"
    """Of the computation; weights that train are float32, whatever a checkpoint has them in."""
    matmuls: Matmuls = "float"
    """As what dense layers multiply, forward and backward: of the precision, or rounded to 8 bits
    (`pip install fmjax[qwix]`)."""
    scan: bool = False
    """Compile one layer and scan it."""
    remat: Remat = "none"
    """What of layers the backward pass recomputes, to save memory: nothing; what lies between their
    products; all of them; or all, with their inputs kept in the host's memory."""
    evaluations: int = 2
    """Evaluations an epoch; each may set the best checkpoint."""
    patience: int | None = None
    """Evaluations without improvement after which the run ends; never if None."""
    mesh: str | None = None
    """Devices by axis, as in data=4,fsdp=2,tensor=2 (and expert=): examples are divided over data,
    parameters too over fsdp, heads and inner widths over tensor. None divides examples alone."""
    profile: str | None = None
    """START:STOP, steps of which a trace is left in the run's folder, for xprof or Perfetto."""
    seed: int = 0
    """Of new weights, the order of examples, and dropout."""


def plain_settings(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as JSON values."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(settings).items()
    }


def describe_run(
    settings: RunSettings, model: Any, state: TrainState, about: Mapping[str, Any]
) -> dict[str, Any]:
    """What run.json says: the model, the data, the settings and the machine."""
    return {
        "name": settings.output.absolute().name,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "source": about["source"],
            "model_type": hub.family_for(model).MODEL_TYPE,
            "head": model.head,
            "num_params": count_parameters(weights_of(state)),
            "num_trainable": count(state.trainable),
        },
        "data": dict(about["data"]),
        "settings": plain_settings(settings),
        "environment": describe_machine(),
    }


def train(
    settings: Training,
    model: Any,
    variables: Variables,
    loss: LossFn,
    stream: BatchStream,
    *,
    evaluate: Callable[[TrainState], Mapping[str, float]],
    metric: str,
    mode: Literal["min", "max"],
    about: Mapping[str, Any],
    is_trainable: Callable[[str], bool] = is_param,
    differentiate: Callable[[LossFn], GradFn] | None = None,
    through: Callable[[optax.GradientTransformation], optax.GradientTransformation] | None = None,
    elsewhere: tuple[str, ...] = (),
) -> TrainState | None:
    """Trains (or goes on training) and returns the state of the best evaluation.

    The run's folder gets run.json, metrics.jsonl, tb/ and checkpoints/.

    Args:
        settings: how to train.
        model: what is trained, for the record.
        variables: its variables; the run takes them over.
        loss: float32; `settings.precision` is applied here.
        stream: of training batches.
        evaluate: state -> metrics on held-out data.
        metric, mode: which of them is best where.
        about: for run.json: ``source`` (where the model is from) and ``data`` (its ``source`` and
            ``splits``; of a classifier also ``label_names`` and ``problem_type``), see
            `fmjax.report.run_folder`.
        is_trainable: by leaf path; see `init_state`.
        differentiate: LossFn -> GradFn; None is `gradient`, accumulated over the settings'
            microbatches.
        through: what makes of the settings' optimizer another one; None leaves it.
        elsewhere: settings that a continued run may have otherwise, beside its folder.

    Returns:
        The best state, with `settings.ema` the averages; None where a signal ended the run early.

    Raises:
        ValueError: settings that do not fit, or those of another run in the folder.
        OSError: files that cannot be read or written.
        FloatingPointError: the loss is not finite.
        MemoryError: the step does not fit; it says what fills the device and what would need less.
    """
    problems = []
    if not 0 < settings.epochs < math.inf:
        problems.append(f"epochs={settings.epochs} must be a number above 0")
    if settings.max_steps is not None and settings.max_steps < 1:
        problems.append(f"max_steps={settings.max_steps} must be at least 1, or None")
    if settings.evaluations < 1:
        problems.append(f"evaluations={settings.evaluations} must be at least 1")
    if not 0 <= settings.learning_rate < math.inf:  # below 0 the loss would be raised
        problems.append(f"learning_rate={settings.learning_rate} must be a number, and not below 0")
    if not 0 <= settings.weight_decay < math.inf:
        problems.append(f"weight_decay={settings.weight_decay} must be a number, and not below 0")
    if not 0 <= settings.warmup < 1:
        problems.append(f"warmup={settings.warmup} must be a share of the steps, from 0 to below 1")
    raise_problems("training", problems)
    traced = None if settings.profile is None else parse_steps(settings.profile)
    run = writable_folder(settings.output)
    steps = max(1, math.ceil(settings.epochs * stream.batches_per_epoch))
    if settings.max_steps is not None:
        steps = min(steps, settings.max_steps)
    schedule = SCHEDULES[settings.schedule](
        settings.learning_rate, steps=steps, warmup=int(settings.warmup * steps)
    )
    tx = OPTIMIZERS[settings.optimizer](
        schedule, weight_decay=settings.weight_decay, moments=settings.moments
    )
    if through is not None:
        tx = through(tx)
    if settings.ema is not None:
        tx = optax.chain(tx, track_ema(settings.ema))
    loss = computed(loss, settings.precision, settings.matmuls)
    if differentiate is None:
        grad_fn = accumulate(gradient(loss), settings.microbatches)
    else:
        grad_fn = differentiate(loss)
    mesh = make_mesh(data=jax.device_count()) if jax.device_count() > 1 else None
    if settings.mesh is not None:
        mesh = parse_mesh(settings.mesh)
        variables = jax.device_put(variables, layout(variables, mesh))
    variables = map_with_path(
        lambda path, leaf: masters(leaf) if is_trainable(path) else leaf, variables
    )
    state = init_state(variables, tx, jax.random.key(settings.seed), is_trainable)
    del variables  # the state owns them now
    abstract, places = jax.eval_shape(lambda: state), None
    if settings.mesh is not None and mesh is not None:
        places = layout(abstract, mesh)
        abstract = placed(abstract, places)
    plain = make_train_step(grad_fn, tx)
    step = watched = Watched(jit_step(plain, mesh, state_shardings=places))
    if traced is not None:
        step = profiled(step, *traced, run / "profile")
    setup = Setup(
        batch_size=settings.batch_size,
        microbatches=settings.microbatches,
        remat=settings.remat,
        scan=settings.scan,
        precision=settings.precision,
        optimizer=settings.optimizer,
        moments=settings.moments,
        parts=1 if mesh is None else mesh.shape.get("fsdp", 1) * mesh.shape.get("tensor", 1),
        rows=1 if mesh is None else mesh.devices.size // mesh.shape.get("tensor", 1),
        devices=jax.device_count(),
    )
    with explained(watched, plain, abstract, setup, mesh, places):
        return carry_out(
            settings,
            model,
            state,
            step,
            stream,
            steps=steps,
            every=max(1, min(steps, stream.batches_per_epoch) // settings.evaluations),
            evaluate=evaluate,
            metric=metric,
            mode=mode,
            about=about,
            abstract=abstract,
            schedule=schedule,
            shown=averages if settings.ema is not None else lambda state: state,
            patience=settings.patience,
            elsewhere=("mesh", "profile", "remat", *elsewhere),
        )


def computed(loss: LossFn, precision: Precision, matmuls: Matmuls = "float") -> LossFn:
    """The loss computed as `Training.precision` and `Training.matmuls` say."""
    if matmuls != "float":
        loss = quantized_products(loss, matmuls)
    return cast(loss, jnp.bfloat16) if precision == "bfloat16" else loss


def masters(leaf: Array) -> Array:
    """Weights below float32 in it: updates of a thousandth would be lost in bfloat16."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if floating else leaf


class RunSettings(Protocol):
    """The dataclass of a run's settings, whatever else is in it."""

    @property
    def output(self) -> Path:
        """The run's folder."""
        ...


def carry_out(
    settings: RunSettings,
    model: Any,
    state: TrainState,
    step: StepFn,
    stream: BatchStream,
    *,
    steps: int,
    every: int,
    evaluate: Callable[[TrainState], Mapping[str, float]],
    metric: str,
    mode: Literal["min", "max"],
    about: Mapping[str, Any],
    abstract: TrainState | None = None,
    schedule: Callable[[int], Any] | None = None,
    shown: Callable[[TrainState], TrainState] = lambda state: state,
    patience: int | None = None,
    hooks: Sequence[tuple[int, Hook]] = (),
    elsewhere: tuple[str, ...] = (),
) -> TrainState | None:
    """Runs a compiled step to its end, or goes on with it, in a run's folder, as `train` says.

    Args:
        settings: all of them belong to the run's identity, but for its folder and `elsewhere`.
        model: what is trained, for the record.
        state, step: at the beginning of the run.
        stream: of training batches.
        steps: where the run ends.
        every: steps between evaluations, which are saved.
        evaluate, metric, mode, about, elsewhere: see `train`.
        abstract: the state's, with shardings; None is on the default device.
        schedule: of the learning rate, for the record.
        shown: what of a state is evaluated and returned.
        patience: evaluations without improvement after which the run ends; never if None.
        hooks: further ones, called before the state is saved.
    """
    run = writable_folder(settings.output)
    restorable = jax.eval_shape(lambda: state) if abstract is None else abstract
    unlabelled = {"label_names": None, "problem_type": None}
    about = {**about, "data": {**unlabelled, **about["data"], "metric": metric, "mode": mode}}
    identity = {
        k: v for k, v in plain_settings(settings).items() if k not in ("output", *elsewhere)
    }
    with Checkpoints(run / "checkpoints", settings=identity) as checkpoints:
        restored, memory = checkpoints.restore_last(restorable), Memory()
        if restored is not None:
            for leaf in jax.tree.leaves(state):
                leaf.delete()  # the caller's name for it would keep it in memory
            state, memory = restored.state, restored.memory
            stream.set_state(restored.data)
        # Only now: settings that are refused must leave the old run's.
        write_json(run / "run.json", describe_run(settings, model, state, about))
        save = saving(checkpoints, stream.get_state, memory)
        with (
            Recorder(run, step=int(state.step)) as recorder,
            progress(steps, memory) as show,
            stop_signals() as should_stop,
        ):
            best_kept = evaluation(
                lambda state: evaluate(shown(state)),
                memory,
                metric=metric,
                mode=mode,
                record=recorder.write,
                save=save,
                patience=patience,
            )
            state = fit(
                state,
                step,
                stream,
                steps=steps,
                hooks=[
                    (20, recording(recorder, schedule)),
                    (20, show),
                    *hooks,
                    (every, best_kept),
                    (every, save),
                ],
                memory=memory,
                should_stop=should_stop,
            )
        if int(state.step) < steps and not memory.stopped:
            checkpoints.save(state, stream.get_state(), memory)
            return None
        best = checkpoints.restore_best(restorable)
        return shown(state if best is None else best.state)


def averages(state: TrainState) -> TrainState:
    """The state with the moving averages as its weights; what is not trained stays, so the running
    statistics of batch normalisation are those of the weights themselves."""
    return dataclasses.replace(state, trainable=cast_as(ema_of(state.opt_state), state.trainable))


def finish(
    run: Path, results: Mapping[str, Any], model: Any, variables: Variables, tokenizer: Any
) -> Path:
    """What a run leaves at its end: results.json, report.html and export/, which is returned."""
    folder = hub.save(run / "export", model, variables, tokenizer)
    write_json(run / "results.json", results)
    write_report(run)
    return folder


def plain_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers of a task's metrics, without nested reports and words."""
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def weights_of(state: TrainState) -> Variables:
    """The model's variables in a state."""
    return merge(state.trainable, state.non_trainable)
