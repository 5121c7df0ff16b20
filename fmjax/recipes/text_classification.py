"""Fine-tuning a text classifier from any source of texts, with everything a run leaves behind."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fmjax.hub as hub
from fmjax.config import write_json
from fmjax.data.batches import batches, shared_buckets
from fmjax.models import fields_of
from fmjax.recipes.linear_probe import probe
from fmjax.recipes.texts import (
    TextData,
    encode_splits,
    evaluation_batches,
    labels_of,
    load_splits,
    model_source,
    padding_of,
    text_length,
)
from fmjax.recipes.training import (
    STOPPED,
    Training,
    plain_numbers,
    train,
    weights_of,
)
from fmjax.report import save_predictions, write_report
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.apply import collect
from fmjax.types import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(TextData, Training):
    """Fine-tune a text classifier."""

    model: str = "minilm"
    """A folder, a hub id, or "minilm" (all-MiniLM-L6-v2 from its package)."""
    new: tuple[str, ...] = ("head/",)
    """Parameters to initialise afresh, by the start of their path."""
    label_smoothing: float = 0.0
    """Share of probability spread over all classes."""
    baseline: bool = True
    """Also fit a logistic regression on the frozen model's features, for comparison."""


SELECTED_BY = {
    task.SINGLE: "accuracy",
    task.MULTI: "micro_f1",
    task.REGRESSION: "mse",
}
"""What the best checkpoint is chosen by."""


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
    run = settings.output
    examples = load_splits(settings)
    source = model_source(settings.model)
    names = examples["train"].label_names
    if settings.problem_type == task.SINGLE and len(names) < 2:
        raise ValueError(
            f"all {len(examples['train'])} training texts have the label {next(iter(names))!r}; "
            "a classifier needs texts of at least two"
        )
    model, variables = hub.load(
        source,
        head="sequence_classification",
        num_labels=names or 1,
        new=settings.new,
        scan=settings.scan,
        remat=settings.remat,
        rng=jax.random.key(settings.seed),
    )
    tokenizer = hub.load_tokenizer(source)
    pad_id = padding_of(tokenizer, model)
    config = dataclasses.replace(model.config, problem_type=settings.problem_type)
    if fields_of(config).get("pad_token_id", pad_id) is None:
        # Without it PyTorch's causal classifiers do not find the last token of a row.
        config = dataclasses.replace(config, pad_token_id=pad_id)
    model = model.clone(config=config)
    encoded = encode_splits(
        tokenizer,
        examples,
        max_length=text_length(model, settings.max_length),
        vocab_size=config.vocab_size,
    )
    loaded = time.time()

    buckets = shared_buckets(*encoded.values())
    stream = batches(
        encoded["train"],
        buckets=buckets,
        batch_size=settings.batch_size,
        pad_id=pad_id,
        seed=settings.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    predict = jax.jit(task.predict(model))

    def predictions(state: TrainState, split: str) -> np.ndarray:
        return collect(
            predict,
            weights_of(state),
            evaluation_batches(encoded[split], pad_id, buckets=buckets),
            size=len(examples[split]),
        )

    def evaluate(state: TrainState) -> dict[str, float]:
        metrics = task.metrics_of(model, predictions(state, "val"), labels_of(examples["val"]))
        return plain_numbers(metrics)

    metric = SELECTED_BY[settings.problem_type]
    state = train(
        settings,
        model,
        variables,
        task.loss(model, label_smoothing=settings.label_smoothing),
        stream,
        evaluate=evaluate,
        metric=metric,
        mode="min" if metric == "mse" else "max",
        about={
            "source": settings.model,
            "data": {
                "source": settings.data,
                "splits": {split: len(texts) for split, texts in examples.items()},
                "label_names": list(names),
                "problem_type": settings.problem_type,
            },
        },
        elsewhere=("baseline",),
    )
    if state is None:
        return STOPPED
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
        results["baselines"] = {"linear probe": probe(source, examples, encoded, pad_id)}
    hub.save(run / "export", model, weights_of(state), tokenizer=tokenizer)
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
