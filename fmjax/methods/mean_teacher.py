"""A teacher that is the student's own moving average: mean teacher (Tarvainen and Valpola 2017,
arXiv:1703.01780).

    every_row = lambda batch: batch["index"] >= 0  # those of weight 0, which have no label, too
    loss = distilled(task.loss, model, model, (1.0, same_probabilities(weights=every_row)))
    grad_fn = mean_teacher(accumulate(gradient(loss), 4), decay=0.999)
    state = init_state(with_teacher(variables, variables), tx, rng, is_student)
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import Array

from fmjax.methods.distillation import TEACHER
from fmjax.tree import flatten, merge, override, unflatten
from fmjax.types import Aux, Batch, GradFn, Variables

ATTACHES = ("gradient",)


def mean_teacher(grad_fn: GradFn, decay: float = 0.999) -> GradFn:
    """The teacher becomes a moving average of the student (Tarvainen and Valpola 2017, section 2):
    ``teacher <- decay * teacher + (1 - decay) * student``, once a step.

    The student is the one that this step's gradient is of, one update behind the paper's; so are
    running statistics, averaged alike. Put it around everything else that makes the gradient
    (`accumulate`), so that it moves once a step. The average is kept in float32, since it would
    stand still in bfloat16, and read in the student's dtypes.

    Args:
        grad_fn: of a loss by `distilled`, whose teacher has the student's own form: begin with
            ``with_teacher(variables, variables)``; of a student in bfloat16 with
            ``with_teacher(variables, jax.tree.map(jnp.float32, variables))``.
        decay: 0.999 in the paper.

    Raises:
        ValueError: a decay out of range; when called, a teacher of another form, or in bfloat16.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}; it must be from 0 to 1")

    def averaged(
        trainable: Variables, non_trainable: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Variables, Array, Aux]:
        teacher = flatten(non_trainable.get(TEACHER, {}))
        own = flatten(trainable) | flatten(non_trainable)
        read = {
            f"{TEACHER}/{path}": x.astype(own.get(path, x).dtype) for path, x in teacher.items()
        }
        grads, loss, aux = grad_fn(trainable, override(non_trainable, unflatten(read)), batch, rng)
        student = flatten(merge(trainable, aux.updates))
        moving = {path: leaf for path, leaf in student.items() if path in teacher}
        if not moving or any(leaf.shape != teacher[path].shape for path, leaf in moving.items()):
            raise ValueError(
                "the teacher must have the student's own form to be its average: begin with "
                "with_teacher(variables, variables)"
            )
        dtypes = {teacher[path].dtype for path in moving}
        if short := [d.name for d in dtypes if jnp.issubdtype(d, jnp.floating) and d.itemsize < 4]:
            raise ValueError(
                f"the teacher is in {short}, where an average stands still: begin with "
                "with_teacher(variables, jax.tree.map(jnp.float32, variables))"
            )
        made = {
            f"{TEACHER}/{path}": optax.incremental_update(
                leaf.astype(teacher[path].dtype), teacher[path], 1 - decay
            )
            for path, leaf in moving.items()
        }
        return grads, loss, aux._replace(updates=merge(aux.updates, unflatten(made)))

    return averaged
