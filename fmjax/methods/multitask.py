"""Several tasks on one trunk: shared parameters, a head for each, one loss or one gradient of all.

Hard parameter sharing (Caruana 1997, "Multitask Learning"), as MT-DNN shares BERT's trunk (Liu et
al. 2019, arXiv:1901.11504); losses weighed by trained uncertainties (Kendall et al. 2018,
arXiv:1705.07115); gradients without their conflicts (PCGrad: Yu et al. 2020, arXiv:2001.06782).

A batch is of one task or of several: its names begin with a task's, ``"tags/input_ids"``
(`fmjax.data.mixture`). A step is compiled once for each set of tasks that a batch has (and each
shape): the names are known when it is traced. Tasks differ in shapes and programs, so a switch
between them inside one program could not be.

    variables = join({"tags": tags_variables, "mood": mood_variables})
    loss = mix({"tags": token_classification.loss(tagger), "mood": sequence_classification.loss(m)})
    step = jit_step(make_train_step(gradient(loss), tx))
    fmjax.save(folder, tagger, view(state.trainable | state.non_trainable, "tags"))

A step without a task gives its head a gradient of 0, on which an optimizer with momentum or decay
still moves it a little, as it does any parameter that a batch does not touch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.data.mixture import part
from fmjax.train import gradient
from fmjax.tree import flatten, merge, override, split, unflatten
from fmjax.types import Aux, Batch, GradFn, LossFn, Mean, PyTree, Variables

ATTACHES = ("gradient", "loss", "variables")

HEADS = "heads"
"""Where each collection keeps what a task alone has: ``params/heads/<task>/...``; what is shared is
where the model has it."""
UNCERTAINTY = "uncertainty"
"""A task's own parameter: the logarithm of its loss's variance."""


def join(variables: Mapping[str, Variables], own: Sequence[str] = ("head/",)) -> Variables:
    """One tree of several models' variables: what all have is shared, the first task's.

    Args:
        variables: by task; the models' trunks have one form.
        own: leaves that no task shares, by the start of their path inside the collection. What only
            some models have (a pooler) is each one's own too.

    Raises:
        ValueError: names that do not fit, or leaves of different shapes that would be shared.
    """
    flat = {task: flatten(tree) for task, tree in variables.items()}
    problems = [f"task {task!r} must be a name without '/'" for task in flat if "/" in task]
    if not flat:
        problems.append("there are no tasks")
    joined: dict[str, Any] = {}
    for task, leaves in flat.items():
        for path, leaf in leaves.items():
            collection, _, rest = path.partition("/")
            if rest.startswith(f"{HEADS}/"):
                problems.append(f"{task}: {path} is where the tasks' own leaves go")
            apart = rest.startswith((*own, UNCERTAINTY))
            if apart or any(path not in others for others in flat.values()):
                joined[f"{collection}/{HEADS}/{task}/{rest}"] = leaf
            elif joined.setdefault(path, leaf).shape != leaf.shape:
                problems.append(
                    f"{path} is {joined[path].shape} and, of {task}, {leaf.shape}; name it in own"
                )
    if problems:
        raise ValueError("; ".join(problems))
    return unflatten(joined)


def view(variables: Variables, task: str) -> Variables:
    """One task's model: the trunk and its own head, to evaluate and export.

    Raises:
        ValueError: nothing there is of this task.
    """
    if not any(
        path.partition("/")[2].startswith(f"{HEADS}/{task}/") for path in flatten(variables)
    ):
        raise ValueError(f"no leaf is of task {task!r}, such as params/{HEADS}/{task}/head/...")
    return split(_seen(variables, task), lambda path: path != f"params/{UNCERTAINTY}")[0]


def _seen(variables: Variables, task: str) -> Variables:
    """What a task's loss reads."""
    found = {}
    for path, leaf in flatten(variables).items():
        collection, _, rest = path.partition("/")
        if not rest.startswith(f"{HEADS}/"):
            found[path] = leaf
        elif rest.startswith(f"{HEADS}/{task}/"):
            found[f"{collection}/{rest.removeprefix(f'{HEADS}/{task}/')}"] = leaf
    return unflatten(found)


def _of_task(loss_fn: LossFn, task: str) -> LossFn:
    """A task's loss as a function of the joined variables and a batch with its names in front."""

    def seen_loss(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        loss, aux = loss_fn(_seen(variables, task), part(batch, task), rng)
        flat, updates = flatten(variables), {}
        for path, leaf in flatten(aux.updates).items():
            collection, _, rest = path.partition("/")
            updates[path if path in flat else f"{collection}/{HEADS}/{task}/{rest}"] = leaf
        metrics = {"loss": Mean(loss * aux.weight, aux.weight), **aux.metrics}
        named = {f"{task}/{name}": mean for name, mean in metrics.items()}
        return loss, Aux(aux.weight, named, unflatten(updates))

    return seen_loss


def mix(losses: Mapping[str, LossFn], coefficients: Mapping[str, float] | None = None) -> LossFn:
    """``sum of coefficient * loss`` over the tasks that a batch has.

    The sum weighs what its parts do together: accumulated over pieces it is exact for batches of
    one task; for several use `mix_gradients`, which accumulates each.

    Args:
        losses: of each task, as a function of its own model's variables and batch.
        coefficients: of each; None is 1.

    Raises:
        ValueError: coefficients that do not fit; when called, a batch of no known task.
    """
    scales = _scales(losses, coefficients)
    parts = {task: _of_task(loss_fn, task) for task, loss_fn in losses.items()}

    def mixed(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        total, weight = jnp.zeros(()), jnp.zeros(())
        metrics, updates = {}, {}
        for task, key in _keys(parts, batch, rng).items():
            # What one task makes of running statistics, the next goes on from.
            loss, aux = parts[task](override(variables, updates), batch, key)
            total, weight = total + scales[task] * loss, weight + aux.weight
            metrics |= aux.metrics
            updates = unflatten(flatten(updates) | flatten(aux.updates))
        return total, Aux(weight, metrics, updates)

    return mixed


Combine = Callable[[list[Variables], Array | None], Variables]
"""(a gradient of each task, rng) -> the gradient that is used."""


def summed(grads: list[Variables], rng: Array | None) -> Variables:
    """The sum: the gradient of the sum of losses."""
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *grads)


def mix_gradients(
    losses: Mapping[str, LossFn],
    coefficients: Mapping[str, float] | None = None,
    *,
    differentiate: Callable[[LossFn], GradFn] = gradient,
    combine: Combine = summed,
) -> GradFn:
    """As the gradient of `mix`, each task's computed for itself.

    Args:
        losses, coefficients: see `mix`.
        differentiate: LossFn -> GradFn, such as one that accumulates.
        combine: what is made of the tasks' gradients, times their coefficients: `summed`, or
            `without_conflicts`.

    Raises:
        ValueError: see `mix`.
    """
    scales = _scales(losses, coefficients)
    parts = {task: differentiate(_of_task(loss_fn, task)) for task, loss_fn in losses.items()}

    def mixed(
        trainable: Variables, non_trainable: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Variables, Array, Aux]:
        gradients, loss, weight = [], jnp.zeros(()), jnp.zeros(())
        metrics, updates = {}, {}
        for task, key in _keys(parts, batch, rng).items():
            own = {name: x for name, x in batch.items() if name.startswith(f"{task}/")}
            grads, value, aux = parts[task](trainable, override(non_trainable, updates), own, key)
            gradients.append(optax.tree.scale(scales[task], grads))
            loss, weight = loss + scales[task] * value, weight + aux.weight
            metrics |= aux.metrics
            updates = unflatten(flatten(updates) | flatten(aux.updates))
        # The tasks have the keys of 0 to K - 1.
        order = None if rng is None else jax.random.fold_in(rng, len(parts))
        return combine(gradients, order), loss, Aux(weight, metrics, updates)

    return mixed


def without_conflicts(grads: list[Variables], rng: Array | None) -> Variables:
    """PCGrad (Yu et al. 2020, algorithm 1): each task's gradient of the trunk loses, one other
    after the other in random order, what points against that one's; then the sum.

    Args:
        grads: of each task.
        rng: of the orders; None takes the tasks as they come.
    """
    shared, own = zip(*(split(tree, _is_shared) for tree in grads), strict=True)
    count = len(grads)
    stacked: PyTree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *shared)  # [K, ...]
    squares = jnp.stack([optax.tree.vdot(tree, tree) for tree in shared])

    def projected(index: Array) -> PyTree:
        order = jnp.arange(count)
        if rng is not None:
            order = jax.random.permutation(jax.random.fold_in(rng, index), count)

        def against(grad: PyTree, other: Array) -> tuple[PyTree, None]:
            theirs = jax.tree.map(lambda leaf: leaf[other], stacked)
            dot = jnp.asarray(optax.tree.vdot(grad, theirs))
            conflict = (dot < 0) & (other != index)
            share = jnp.where(conflict, dot / jnp.where(conflict, squares[other], 1.0), 0.0)
            return jax.tree.map(lambda a, b: a - (share * b).astype(a.dtype), grad, theirs), None

        return jax.lax.scan(against, jax.tree.map(lambda leaf: leaf[index], stacked), order)[0]

    kept = jax.lax.map(projected, jnp.arange(count))
    trunk = jax.tree.map(lambda leaf: leaf.sum(axis=0).astype(leaf.dtype), kept)
    return merge(trunk, summed([*own], None))


def by_uncertainty(loss_fn: LossFn, *, regression: bool = False) -> LossFn:
    """A task's loss weighed by its uncertainty, which trains with it (Kendall et al. 2018).

    ``exp(-s) loss + s / 2`` with s the logarithm of the variance (equation 10; of squared errors
    ``exp(-s) loss / 2 + s / 2``, equation 7), which is least where the variance is twice the loss
    (of squared errors, the loss).

    Args:
        loss_fn: of one task, to be given to `mix`.
        regression: whether the loss is a mean squared error.

    Raises:
        ValueError: when called, variables without their s (`with_uncertainty`).
    """
    scale = 0.5 if regression else 1.0

    def weighed(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        if UNCERTAINTY not in variables["params"]:
            raise ValueError(f"the variables have no params/{UNCERTAINTY}; use with_uncertainty")
        log_variance = variables["params"][UNCERTAINTY]
        rest = split(variables, lambda path: path != f"params/{UNCERTAINTY}")[0]
        loss, aux = loss_fn(rest, batch, rng)
        metrics = {
            **aux.metrics,
            "unweighed": Mean(loss * aux.weight, aux.weight),
            "deviation": Mean(jnp.exp(log_variance / 2) * aux.weight, aux.weight),
        }
        value = scale * jnp.exp(-log_variance) * loss + log_variance / 2
        return value, aux._replace(metrics=metrics)

    return weighed


def with_uncertainty(variables: Variables) -> Variables:
    """A task's variables, before they are joined, with a variance of 1."""
    return {**variables, "params": {**variables["params"], UNCERTAINTY: jnp.zeros(())}}


def _is_shared(path: str) -> bool:
    return not path.partition("/")[2].startswith(f"{HEADS}/")


def _scales(
    losses: Mapping[str, LossFn], coefficients: Mapping[str, float] | None
) -> dict[str, float]:
    scales = dict.fromkeys(losses, 1.0) if coefficients is None else dict(coefficients)
    problems = []
    if scales.keys() != losses.keys() or not losses:
        problems.append(f"coefficients are of {list(scales)}, losses of {list(losses)}")
    if wrong := {task: c for task, c in scales.items() if not 0 <= c < math.inf}:
        problems.append(f"coefficients {wrong} must be at least 0")
    if problems:
        raise ValueError("; ".join(problems))
    return scales


def _keys(parts: Mapping[str, Any], batch: Batch, rng: Array | None) -> dict[str, Array | None]:
    """The tasks that a batch has, and the key of each: the step's own where there is but one."""
    there = {name.partition("/")[0] for name in batch}
    if unknown := there - parts.keys():
        raise ValueError(
            f"the batch has {sorted(unknown)}, which are none of the tasks {list(parts)}; names "
            "begin with the task's: 'tags/input_ids'"
        )
    tasks = [task for task in parts if task in there]
    if rng is None or len(tasks) == 1:
        return dict.fromkeys(tasks, rng)
    return {task: jax.random.fold_in(rng, list(parts).index(task)) for task in tasks}
