"""Fine-tuning a text classifier from any source of texts, with everything a run leaves behind."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import fmjax.hub as hub
from fmjax.config import write_json
from fmjax.data import TextExamples
from fmjax.data.batches import batches
from fmjax.perf.device import describe_machine
from fmjax.recipes.linear_probe import probe
from fmjax.recipes.texts import (
    TextData,
    encode_splits,
    evaluation_batches,
    labels_of,
    load_splits,
    model_source,
    shared_buckets,
)
from fmjax.report import save_predictions, write_report
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.apply import collect
from fmjax.train import (
    accumulate,
    adamw,
    cast,
    gradient,
    init_state,
    jit_step,
    make_mesh,
    make_train_step,
    warmup_linear,
)
from fmjax.train.checkpoint import Checkpoints, saving
from fmjax.train.loop import Memory, evaluation, fit
from fmjax.train.recording import Recorder, progress, recording, writable_folder
from fmjax.train.signals import stop_signals
from fmjax.tree import count, merge
from fmjax.types import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(TextData):
    """Fine-tune a text classifier."""

    output: Path
    """The run's folder; a run that was interrupted there is continued."""
    model: str = "minilm"
    """A folder, a hub id, or "minilm" (all-MiniLM-L6-v2 from its package)."""
    new: tuple[str, ...] = ("head/",)
    """Parameters to initialise afresh, by the start of their path."""
    epochs: float = 3.0
    """Passes over the training texts."""
    batch_size: int = 32
    """Texts a step, over all devices."""
    microbatches: int = 1
    """Pieces a batch is computed in, to save memory."""
    learning_rate: float = 5e-5
    """Peak of a schedule that warms up and then falls linearly to 0."""
    warmup: float = 0.1
    """Share of the steps that warm up."""
    weight_decay: float = 0.01
    """Of kernels and embeddings."""
    label_smoothing: float = 0.0
    """Share of probability spread over all classes."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; the weights stay float32."""
    scan: bool = False
    """Compile one layer and scan it."""
    remat: bool = False
    """Recompute layers in the backward pass, to save memory."""
    evaluations: int = 2
    """Evaluations an epoch; each may set the best checkpoint."""
    patience: int | None = None
    """Evaluations without improvement after which the run ends; never if None."""
    seed: int = 0
    """Of the new head, the order of texts, and dropout."""
    baseline: bool = True
    """Also fit a logistic regression on the frozen model's features, for comparison."""


SELECTED_BY = {
    task.SINGLE: "accuracy",
    task.MULTI: "micro_f1",
    task.REGRESSION: "mse",
}
"""What the best checkpoint is chosen by."""


def plain_settings(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(settings).items()
    }


def trained_with(settings: Settings) -> dict[str, Any]:
    """The settings that a continued run must share with the one that was interrupted."""
    elsewhere = ("output", "baseline")
    return {k: v for k, v in plain_settings(settings).items() if k not in elsewhere}


def describe_run(
    settings: Settings, model: Any, examples: Mapping[str, TextExamples], state: TrainState
) -> dict[str, Any]:
    """What run.json says: the model, the data, the settings and the machine."""
    return {
        "name": settings.output.absolute().name,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "source": settings.model,
            "model_type": hub.family_module(model).__name__.rsplit(".", 1)[-1],
            "head": model.head,
            "num_params": count(state.trainable) + count(state.non_trainable),
            "num_trainable": count(state.trainable),
        },
        "data": {
            "source": settings.data,
            "splits": {split: len(texts) for split, texts in examples.items()},
            "label_names": list(examples["train"].label_names),
            "problem_type": settings.problem_type,
        },
        "settings": plain_settings(settings),
        "environment": describe_machine(),
    }


def finetune(settings: Settings) -> dict[str, Any]:
    """Runs (or continues) a fine-tuning run and returns its results.

    The run's folder gets run.json, metrics.jsonl, tb/, checkpoints/, predictions, results.json,
    report.html and export/.

    Returns:
        The contents of results.json, and "stopped": True (alone) where a signal ended the run
        early; running again then continues it.

    Raises:
        ValueError: settings or data that do not fit; everything wrong is listed.
        OSError: files that cannot be read or written.
        FloatingPointError: the loss is not finite.
    """
    started = time.time()
    run = writable_folder(settings.output)
    examples = load_splits(settings)
    source = model_source(settings.model)
    names = examples["train"].label_names
    model, variables = hub.load(
        source,
        head="sequence_classification",
        num_labels=names or 1,
        new=settings.new,
        scan=settings.scan,
        remat=settings.remat,
        rng=jax.random.key(settings.seed),
    )
    config = dataclasses.replace(model.config, problem_type=settings.problem_type)
    model = model.clone(config=config)
    tokenizer = hub.load_tokenizer(source)
    encoded = encode_splits(
        tokenizer,
        examples,
        max_length=min(settings.max_length, config.max_position_embeddings),
        vocab_size=config.vocab_size,
    )
    loaded = time.time()

    buckets = shared_buckets(encoded)
    train = batches(
        encoded["train"],
        buckets=buckets,
        batch_size=settings.batch_size,
        pad_id=tokenizer.pad_token_id,
        seed=settings.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    steps = max(1, math.ceil(settings.epochs * train.batches_per_epoch))
    schedule = warmup_linear(
        settings.learning_rate, steps=steps, warmup=int(settings.warmup * steps)
    )
    tx = adamw(schedule, weight_decay=settings.weight_decay)
    loss = task.loss(model, label_smoothing=settings.label_smoothing)
    if settings.precision == "bfloat16":
        loss = cast(loss, jnp.bfloat16)
    grad_fn = accumulate(gradient(loss), settings.microbatches)
    mesh = make_mesh(data=jax.device_count()) if jax.device_count() > 1 else None
    step = jit_step(make_train_step(grad_fn, tx), mesh)
    predict = jax.jit(task.predict(model))
    state = init_state(variables, tx, jax.random.key(settings.seed))
    del variables  # the state owns them now

    def predictions(state: TrainState, split: str) -> np.ndarray:
        return collect(
            predict,
            merge(state.trainable, state.non_trainable),
            evaluation_batches(encoded[split], tokenizer.pad_token_id, buckets=buckets),
            size=len(examples[split]),
        )

    def evaluate(state: TrainState) -> dict[str, float]:
        metrics = task.metrics_of(model, predictions(state, "val"), labels_of(examples["val"]))
        return {name: value for name, value in metrics.items() if isinstance(value, float)}

    write_json(run / "run.json", describe_run(settings, model, examples, state))
    every = max(1, train.batches_per_epoch // max(1, settings.evaluations))
    metric = SELECTED_BY[settings.problem_type]
    with Checkpoints(run / "checkpoints", settings=trained_with(settings)) as checkpoints:
        restored, memory = checkpoints.restore_last(jax.eval_shape(lambda: state)), Memory()
        if restored is not None:
            state, memory = restored.state, restored.memory
            train.set_state(restored.data)
        save = saving(checkpoints, train.get_state, memory)
        with (
            Recorder(run, step=int(state.step)) as recorder,
            progress(steps, memory) as show,
            stop_signals() as should_stop,
        ):
            hooks = [
                (20, recording(recorder, schedule)),
                (20, show),
                (
                    every,
                    evaluation(
                        evaluate,
                        memory,
                        metric=metric,
                        mode="min" if metric == "mse" else "max",
                        record=recorder.write,
                        save=save,
                        patience=settings.patience,
                    ),
                ),
                (every, save),
            ]
            state = fit(
                state,
                step,
                train,
                steps=steps,
                hooks=hooks,
                memory=memory,
                should_stop=should_stop,
            )
        if int(state.step) < steps and not memory.stopped:
            checkpoints.save(state, train.get_state(), memory)
            return {"stopped": True}
        best = checkpoints.restore_best(jax.eval_shape(lambda: state))
        state = state if best is None else best.state
    trained = time.time()

    results: dict[str, Any] = {"best_step": int(state.step)}
    for split in ("val", "test"):
        if split not in examples:
            continue
        rows, labels = predictions(state, split), labels_of(examples[split])
        results[split] = task.metrics_of(model, rows, labels)
        kind = "predictions" if settings.problem_type == "regression" else "probabilities"
        values = rows.reshape(labels.shape) if kind == "predictions" else rows
        save_predictions(
            run, split, labels=labels, texts=list(examples[split].texts), **{kind: values}
        )
    if settings.baseline and settings.problem_type == "single_label_classification":
        results["baselines"] = {
            "linear probe": probe(source, examples, encoded, tokenizer.pad_token_id)
        }
    hub.save(
        run / "export", model, merge(state.trainable, state.non_trainable), tokenizer=tokenizer
    )
    results["seconds"] = {
        "load": loaded - started,
        "train": trained - loaded,
        "total": time.time() - started,
    }
    write_json(run / "results.json", results)
    write_report(run)
    return results


def results_table(run: Path, results: dict[str, Any]) -> str:
    """The results of a run and of its baseline, a row each, as text."""
    if results.get("stopped"):
        return f"stopped; run the same command again to continue {run}"
    rows = {"fine-tuned": results, **results.get("baselines", {})}
    columns = {
        f"{split} {metric}": [row[split][metric] for row in rows.values()]
        for split in ("val", "test")
        for metric in ("accuracy", "macro_f1", "f1", "mse", "pearson")
        if all(metric in row.get(split, {}) for row in rows.values())
    }
    width = max(len(name) for name in rows)
    lines = ["  ".join([" " * width, *columns])]
    for i, name in enumerate(rows):
        cells = [f"{values[i]:{len(column)}.4f}" for column, values in columns.items()]
        lines.append("  ".join([name.ljust(width), *cells]))
    return "\n".join([*lines, "", f"report: {run / 'report.html'}", f"model:  {run / 'export'}"])
