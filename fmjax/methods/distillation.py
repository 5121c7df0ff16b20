"""Distillation: a student learns what a trained teacher gives for the same inputs.

What it follows is said by the terms of `fmjax.methods.distillation_terms`: soft labels (Hinton et
al. 2015, arXiv:1503.02531), hidden states, attention. A student of the teacher's own kind is a
born-again network (Furlanello et al. 2018, arXiv:1805.04770). `fmjax.methods.shallower` makes a
student of a teacher's layers; in `fmjax.methods.mean_teacher` the teacher follows the student.

    loss = distilled(
        task.loss, student, teacher, (0.5, soft_labels(temperature=2.0)), (1.0, last_directions()),
        hard=0.5,
    )
    variables = with_teacher(student_variables, teacher_variables)
    state = init_state(variables, tx, rng, is_student)
    fmjax.save(folder, student, student_only(state.trainable | state.non_trainable))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.methods.distillation_terms import Both, Term
from fmjax.tasks.apply import apply_fn, row_weights
from fmjax.tasks.causal_lm import padded_behind
from fmjax.tasks.vocabulary_loss import unembed_fn
from fmjax.tasks.watched import Watched, run
from fmjax.train import is_param
from fmjax.tree import flatten
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

ATTACHES = ("variables", "loss")

TEACHER, PROJECTIONS = "teacher", "projections"
"""The collections of the teacher's variables and of the learned projections."""


def distilled(
    task_loss: Callable[[Any], LossFn],
    student: Any,
    teacher: Any,
    *terms: tuple[float, Term],
    hard: float = 1.0,
) -> LossFn:
    """``hard * task's loss + sum of coefficient * term``, from one pass of each model.

    The task's loss is built around a stand-in for the student that remembers what it was given and
    what it gave: so there is no second pass, its dropout is the same in every term, and the teacher
    (without dropout, in whatever dtype its variables have) sees the very same inputs, masked or
    shifted as the task does it.

    The sum has the weight of the task's loss: accumulated over pieces it is exact where a term
    counts the same rows or tokens as the task.

    Args:
        task_loss: ``model -> LossFn`` that runs the model once: a task's ``loss``, with
            `functools.partial` for its settings; `unlabelled` where there are no labels.
        student: the model that learns.
        teacher: the model whose variables are the collection "teacher" (`with_teacher`).
        terms: coefficients and terms.
        hard: coefficient of the task's loss; Hinton et al. 2015 (section 2) give it much less
            weight than the soft labels.

    Raises:
        ValueError: models that cannot be compared: another vocabulary or other classes; negative
            coefficients; no term; when called, variables without a teacher.
    """
    problems = _incomparable(student, teacher)
    if not terms:
        problems.append("there are no terms: give at least one, such as (0.5, soft_labels())")
    names = ["hard", *(term.name for _, term in terms)]
    if len(set(names)) < len(names):
        problems.append(f"terms {names[1:]} must have different names, and none is hard")
    for name, coefficient in zip(names, [hard, *(c for c, _ in terms)], strict=True):
        if not 0 <= coefficient < math.inf:
            problems.append(f"the coefficient of {name} is {coefficient}; it must be at least 0")
    for _, term in terms:
        problems += term.problems(student, teacher)
    if problems:
        raise ValueError("; ".join(problems))
    asks = {option: True for _, term in terms for option in term.asks}
    values = any(term.values for _, term in terms)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        if TEACHER not in variables:
            raise ValueError(
                f"the variables have the collections {sorted(variables)} and no {TEACHER!r}; make "
                "them by with_teacher(student_variables, teacher_variables)"
            )
        given = {name: tree for name, tree in variables.items() if name != TEACHER}
        taught = jax.lax.stop_gradient(variables[TEACHER])
        if student.head == "causal_lm":
            batch = padded_behind(batch)  # as its loss does: terms weigh tokens where it has them
        watched = Watched(student, asks, values)
        value, aux = task_loss(watched)(given, batch, rng)
        passed = watched.passed()
        (output, made), _ = run(
            teacher, taught, passed.inputs, passed.flags, values, train=False, rngs={}, mutable=[]
        )
        both = Both(
            batch,
            student.head,
            passed.output,
            jax.lax.stop_gradient(output),
            unembed_fn(student, given),
            unembed_fn(teacher, taught),
            passed.values,
            jax.lax.stop_gradient(made),
            flatten(variables.get(PROJECTIONS, {})),
        )
        metrics = {**aux.metrics, "hard": Mean(value * aux.weight, aux.weight)}
        total = hard * value
        for coefficient, term in terms:
            metrics[term.name] = mean = term.loss(both)
            total += coefficient * mean.value
        return total, aux._replace(metrics=metrics)

    return loss_fn


def unlabelled(model: Any, *, train: bool = True) -> LossFn:
    """No loss of its own: for `distilled` on inputs without labels, rows counted by ``weight``."""
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        _, updates = apply(variables, batch, rng, train=train)
        weight = jnp.sum(row_weights(batch))
        return jnp.zeros(()), Aux(weight, {}, updates)

    return loss_fn


def with_teacher(student_variables: Variables, teacher_variables: Variables) -> Variables:
    """The student's collections and the teacher's as one more, "teacher"."""
    return {**student_variables, TEACHER: teacher_variables}


def with_projections(
    variables: Variables, layers: Mapping[int, int], *, widths: tuple[int, int], rng: Array
) -> Variables:
    """The variables with a kernel for each student layer of the map, which train (`is_student`).

    Args:
        variables: the student's, with or without a teacher.
        layers: of `same_hidden_states`.
        widths: the student's and the teacher's.
        rng: a typed key.
    """
    init = jax.nn.initializers.lecun_normal()
    kernels = {
        f"hidden_{layer}": {"kernel": init(key, widths)}
        for layer, key in zip(layers, jax.random.split(rng, len(layers)), strict=True)
    }
    return {**variables, PROJECTIONS: kernels}


def is_student(path: str) -> bool:
    """What trains, by leaf path: the student's parameters and the projections."""
    return is_param(path) or path.startswith(f"{PROJECTIONS}/")


def student_only(variables: Variables) -> Variables:
    """The variables without teacher and projections: what is evaluated and exported."""
    return {name: tree for name, tree in variables.items() if name not in (TEACHER, PROJECTIONS)}


def _incomparable(student: Any, teacher: Any) -> list[str]:
    """What keeps the same inputs and classes from meaning the same to both."""
    problems = []
    ours, theirs = vars(student.config), vars(teacher.config)
    sizes = ours.get("vocab_size"), theirs.get("vocab_size")
    if sizes[0] != sizes[1]:
        problems.append(
            f"the student's vocabulary has {sizes[0]} words, the teacher's {sizes[1]}; distil "
            "between models of one tokenizer"
        )
    if student.head == teacher.head and student.head.endswith("classification"):
        classes = ours["id2label"], theirs["id2label"]
        if classes[0] != classes[1]:
            problems.append(
                f"the student's classes are {classes[0]}, the teacher's {classes[1]}; give the "
                "student the teacher's (num_labels=teacher.config.id2label)"
            )
    return problems
