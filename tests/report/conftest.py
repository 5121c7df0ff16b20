"""Run folders as a training run leaves them behind, drawn from a seed."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fmjax.metrics import (
    classification_metrics,
    multi_label_metrics,
    probabilities_from_logits,
    regression_metrics,
)
from fmjax.report import save_predictions

PHRASES = [
    "a quiet, patient film that earns its last ten minutes",
    "two hours that feel like four, with a score that never stops explaining the jokes",
    "not bad, if you forgive the ending",
    "the cast deserves a better script than this",
    "I laughed once, at the credits",
    "sharp, funny and a little cruel, exactly as the book was",
    "it looks expensive and says nothing",
    "hard to love, harder to forget",
    "a sequel nobody asked for that turns out to be the best of the three",
    "the kind of movie you admire more than enjoy",
]
HOSTILE = "<script>alert('pwned')</script> & \"quoted\" </td></table>"
LONG = "a very long review, " * 40 + "END-OF-LONG-TEXT"


def run_json(problem_type: str, label_names: list[str] | None) -> dict:
    return {
        "name": "movie-reviews <b>first</b>",
        "command": "fmjax finetune --model all-MiniLM-L6-v2 --data movie --epochs 3 && echo <done>",
        "started": "2026-03-14T09:26:53+00:00",
        "model": {
            "source": "sentence-transformers/all-MiniLM-L6-v2",
            "model_type": "bert",
            "head": "sequence_classification",
            "num_params": 22_713_986,
            "num_trainable": 22_713_986,
        },
        "data": {
            "source": "movie review sentences",
            "splits": {"train": 8484, "val": 1061, "test": 400},
            "label_names": label_names,
            "problem_type": problem_type,
        },
        "settings": {
            "epochs": 3,
            "batch_size": 32,
            "optimizer": {"name": "adamw", "learning_rate": 5e-5, "weight_decay": 0.01},
            "buckets": [16, 32, 64],
            "freeze": None,
            "resume": True,
        },
        "environment": {
            "python": "3.11.9",
            "platform": "Linux-6.1-x86_64",
            "cpu": "Some CPU @ 2.60GHz",
            "cores": 2,
            "memory_bytes": 8 * 2**30,
            "devices": [
                {"platform": "gpu", "kind": "NVIDIA H200", "count": 2, "memory_bytes": 150 * 10**9},
                {"platform": "cpu", "kind": "cpu", "count": 1, "memory_bytes": None},
            ],
            "versions": {"jax": "0.10.2", "flax": "0.12.8", "fmjax": "0.1.0", "numpy": "2.4.6"},
        },
    }


def metric_rows(metric: str) -> list[dict]:
    """Three epochs of 265 steps, logged every 5, evaluated every 50."""
    rng = np.random.default_rng(0)
    rows = []
    for step in range(5, 796, 5):
        loss = 0.16 + 0.53 * math.exp(-step / 180) + 0.05 * rng.standard_normal()
        rows.append(
            {
                "step": step,
                "split": "train",
                "loss": max(loss, 0.02),
                "learning_rate": 5e-5 * min(step / 80, (800 - step) / 720),
                "grad_norm": float(np.exp(rng.normal(0.6, 0.5))),
                metric: min(0.99, 0.95 - 0.4 * math.exp(-step / 150) + rng.normal(0, 0.03)),
                "examples_per_second": float(rng.normal(118, 5)),
                "tokens_per_second": float(rng.normal(3100, 140)),
                "seconds": 1.35,
            }
        )
        if step % 50 == 0:
            val = 0.43 + 0.26 * math.exp(-step / 100) + 0.00012 * step
            rows.append(
                {
                    "step": step,
                    "split": "val",
                    "loss": val,
                    metric: 0.82 - 0.3 * math.exp(-step / 110) + rng.normal(0, 0.006),
                }
            )
    return rows


def write_run(
    folder: Path, *, problem_type: str = "single_label_classification", classes: int = 2
) -> Path:
    """A finished run with predictions, results and a linear probe."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    size = 400
    texts = [f"{PHRASES[i % len(PHRASES)]} ({i})" for i in range(size)]
    names = ["negative", "positive"] if classes == 2 else [f"class {c}" for c in range(classes)]
    metric = "accuracy"
    if problem_type == "regression":
        names, metric = None, "pearson"
        labels = rng.uniform(0, 5, size).astype(np.float32)
        arrays = {"predictions": labels * 0.8 + 0.5 + rng.normal(0, 0.5, size)}
        scores = regression_metrics(arrays["predictions"].astype(np.float32), labels)
        texts[int(np.argmax(np.abs(arrays["predictions"] - labels)))] = HOSTILE
    elif problem_type == "multi_label_classification":
        metric = "micro_f1"
        labels = (rng.random((size, classes)) < 0.35).astype(np.int64)
        logits = 2.5 * (2 * labels - 1) + 2.0 * rng.standard_normal((size, classes))
        arrays = {"probabilities": probabilities_from_logits(logits, problem_type=problem_type)}
        scores = multi_label_metrics(arrays["probabilities"], labels, label_names=names)
        wrong = np.where(
            (arrays["probabilities"] >= 0.5) != labels, abs(arrays["probabilities"] - 0.5), 0
        )
        texts[int(wrong.max(axis=1).argmax())] = HOSTILE
    else:
        labels = rng.integers(0, classes, size)
        logits = 1.9 * np.eye(classes)[labels] + 1.4 * rng.standard_normal((size, classes))
        probabilities = probabilities_from_logits(
            2.2 * logits, problem_type="single_label_classification"
        )
        arrays = {"probabilities": probabilities}
        scores = classification_metrics(probabilities, labels, label_names=names)
        predicted = probabilities.argmax(axis=1)
        wrong = np.flatnonzero(predicted != labels)
        order = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")]
        texts[order[0]], texts[order[1]] = HOSTILE, LONG
    (folder / "run.json").write_text(json.dumps(run_json(problem_type, names)))
    lines = [json.dumps(row) for row in metric_rows(metric)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    save_predictions(folder, "test", labels=labels, texts=texts, **arrays)
    results = {
        "test": scores,
        "val": {metric: 0.8134, "loss": 0.4402},
        "baselines": {"linear probe": {"test": {metric: 0.7712}, "val": {metric: 0.7655}}},
        "seconds": {"load": 0.9, "train": 214.6, "evaluate": 6.4},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="session")
def example() -> SimpleNamespace:
    """What the run folders of these tests are made of."""
    return SimpleNamespace(hostile=HOSTILE, metric_rows=metric_rows, write_run=write_run)


@pytest.fixture
def make_run(tmp_path):
    """The function that writes a run folder below this test's own folder."""

    def make(**options) -> Path:
        return write_run(tmp_path / "run", **options)

    return make
