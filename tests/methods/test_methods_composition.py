"""Every row of `compositions`: compiled once, it learns, leaves what is frozen, goes on bitwise."""

import importlib
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from composition import check_trains
from compositions import COMPOSITIONS, table
from made_up import made, pictures

import fmjax
from fmjax.methods import lora, prefix_tuning, prompt_tuning
from fmjax.methods.distillation import distilled
from fmjax.methods.distillation_terms import soft_labels
from fmjax.methods.privacy import private_gradient
from fmjax.tasks import sequence_classification
from fmjax.train import accumulate, gradient

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.name, marks=[pytest.mark.slow] * row.slow) for row in COMPOSITIONS],
)
def test_they_train_together(row):
    made = row.make()
    check_trains(made.pop("variables"), made.pop("loss"), made.pop("tx"), made.pop("batch"), **made)


def methods_that_train():
    """Names of files in methods/ whose functions attach to a step."""
    # Files and terms of another method have tests of their own.
    parts = {
        "adapted_layers", "advantages", "compressed_files", "distillation_terms", "lora_files",
        "peft_files", "policy_gradient", "weight_matrices",
    }  # fmt: skip
    for path in (ROOT / "fmjax" / "methods").glob("*.py"):
        if path.stem != "__init__" and path.stem not in parts:
            attaches = importlib.import_module(f"fmjax.methods.{path.stem}").ATTACHES
            # Programs around steps: test_methods_heard_and_seen.py and their own tests.
            if attaches != ("program",):
                yield path.stem


def test_every_method_that_trains_is_there_twice():
    """In rows that `make test` runs."""
    count = Counter(name for row in COMPOSITIONS if not row.slow for name in row.methods)
    assert [name for name in methods_that_train() if count[name] < 2] == []


AGENTS = "an agent's steps in an environment, which are neither sounds nor pictures with texts"
SENSELESS = {
    "compositions_speech": {
        "dqn": AGENTS, "ppo": AGENTS, "reinforce": AGENTS,
        "prompt_tuning": "its vectors are among the words an encoder reads; those of sounds do not",
    },
    "compositions_captions": {"dqn": AGENTS, "ppo": AGENTS, "reinforce": AGENTS},
}  # fmt: skip


@pytest.mark.parametrize("kind", SENSELESS)
def test_every_method_that_makes_sense_hears_and_sees(kind):
    """Every method is in a row on sounds and in one on pictures with texts, or is named above."""
    rows = [row for row in COMPOSITIONS if row.make.__module__ == kind]
    there = {name for row in rows for name in row.methods}
    assert set(methods_that_train()) - there == set(SENSELESS[kind])


def test_readme_has_the_table():
    readme = (ROOT / "README.md").read_text("utf-8")
    for line in table().splitlines():
        assert line in readme, f"run `python tests/compositions.py` and put this in README: {line}"


def noise_twice():
    model, variables = made("vit", "image_classification")
    private = private_gradient(
        sequence_classification.loss(model), clip_norm=1.0, noise_multiplier=1.0,
        expected_batch_size=8, microbatch_size=4,
    )  # fmt: skip
    accumulate(private, 2)(variables, {}, pictures(), jax.random.key(0))


def two_updates_of_one_kernel():
    _, variables = made("vit", "image_classification")
    once = lora.add(variables, jax.random.key(0), rank=2, alpha=1.0)
    lora.add(once, jax.random.key(0), rank=2, alpha=1.0)


def two_prompts():
    _, variables = made("bert", "sequence_classification")
    once = prompt_tuning.create(variables, jax.random.key(0), length=2)
    prompt_tuning.create(once, jax.random.key(0), length=2)


def two_prefixes():
    model, variables = made("bert", "sequence_classification")
    once = prefix_tuning.create(model, variables, jax.random.key(0), length=2)
    prefix_tuning.create(model, once, jax.random.key(0), length=2)


def a_teacher_of_other_classes():
    model, _ = made("bert", "sequence_classification")
    config = fmjax.models.family_of("bert").Config(id2label=("a", "b", "c"))
    teacher = model.clone(config=config)
    distilled(sequence_classification.loss, model, teacher, (1.0, soft_labels()))


def no_teacher():
    model, variables = made("bert", "sequence_classification")
    loss = distilled(sequence_classification.loss, model, model, (1.0, soft_labels()))
    gradient(loss)(variables, {}, {"input_ids": np.ones((2, 3), int)}, jax.random.key(0))


@pytest.mark.parametrize(
    ("contradiction", "said"),
    [
        (noise_twice, "do not accumulate"),
        (two_updates_of_one_kernel, "already"),
        (two_prompts, "already"),
        (two_prefixes, "already"),
        (a_teacher_of_other_classes, "classes"),
        (no_teacher, "teacher"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_contradictions_are_refused(contradiction, said):
    with pytest.raises(ValueError, match=said):
        contradiction()
