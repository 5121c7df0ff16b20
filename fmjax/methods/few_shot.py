"""Learning from a few examples a class: by prototypes, or from weights that a few steps adapt.

A batch is of episodes: its leading axis is tasks. Of each it has a few examples to learn from,
``support``, and others to be measured on, ``query`` (`fmjax.data.episodes.Episodes`)::

    {"support": {"pixel_values": [B, S, ...], "labels": [B, S]},
     "query": {"pixel_values": [B, Q, ...], "labels": [B, Q], "weight": [B, Q]}, ...}

flattened to "support/pixel_values" and so on, as batches are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.data.mixture import part
from fmjax.methods.federated import client_update, pseudo_gradient
from fmjax.tasks.feature_extraction import Encode
from fmjax.train.step import is_param
from fmjax.tree import flatten, merge, override, split
from fmjax.types import Aux, Batch, GradFn, LossFn, Mean, Variables

ATTACHES = ("loss", "gradient")


def prototypical(encode: Encode, ways: int, *, train: bool = True) -> LossFn:
    """Prototypical networks (Snell et al. 2017, arXiv:1703.05175, eq. 1 and 2): a class is the mean
    of its examples' vectors, and a query belongs to the nearest, by squared Euclidean distance.

    Args:
        encode: gives vectors, see `fmjax.tasks.feature_extraction.encoder`; of support and queries
            in one call.
        ways: N, classes of an episode, whose labels are 0 to N - 1.
        train: whether dropout is on.

    Returns:
        The cross-entropy of queries in nats, with their accuracy.

    Raises:
        ValueError: fewer than two ways.
    """
    if ways < 2:
        raise ValueError(f"ways is {ways}; an episode needs at least 2 classes to tell apart")

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        support, query = part(batch, "support"), part(batch, "query")
        tasks, shots = support["labels"].shape
        queries = query["labels"].shape[1]
        weight = jnp.asarray(query.get("weight", jnp.ones((tasks, queries))))
        every = {
            name: jnp.concatenate([x, query[name]], axis=1).reshape(-1, *x.shape[2:])
            for name, x in support.items()
            if name in query
        }
        vectors, updates = encode(variables, every, rng, train=train)
        vectors = vectors.astype(jnp.float32).reshape(tasks, shots + queries, -1)
        known, asked = vectors[:, :shots], vectors[:, shots:]  # [B, S, D], [B, Q, D]
        members = jax.nn.one_hot(support["labels"], ways)  # [B, S, N]
        counts = jnp.maximum(members.sum(axis=1), 1)[..., None]  # [B, N, 1]
        prototypes = jnp.einsum("BSN,BSD->BND", members, known) / counts
        distance = jnp.sum(jnp.square(asked[:, :, None] - prototypes[:, None]), axis=-1)
        losses = optax.softmax_cross_entropy_with_integer_labels(-distance, query["labels"])
        mean = Mean.of(losses, weight)
        right = jnp.argmin(distance, axis=-1) == query["labels"]
        return mean.value, Aux(mean.weight, {"accuracy": Mean.of(right, weight)}, updates)

    return loss_fn


def maml(
    loss_fn: LossFn,
    *,
    inner_rate: float,
    inner_steps: int,
    first_order: bool = False,
    adapts: Callable[[str], bool] = is_param,
) -> LossFn:
    """Model-agnostic meta-learning (Finn et al. 2017, arXiv:1703.03400, algorithm 2): the loss on
    the queries of weights that gradient descent on the support has led to.

    Args:
        loss_fn: of one task's examples.
        inner_rate: alpha, the rate of the inner steps.
        inner_steps: how many, each on the whole support.
        first_order: whether the inner gradient counts as a constant (section 5.2), at half the
            cost.
        adapts: says by leaf path which weights the inner steps move; the head alone is ANIL
            (Raghu et al. 2020, arXiv:1909.09157).

    Raises:
        ValueError: numbers out of range; when called, a loss with running statistics.
    """
    if inner_steps < 0 or not inner_rate > 0:
        raise ValueError(
            f"inner_steps={inner_steps} must be at least 0 and inner_rate={inner_rate} above 0"
        )

    def meta_loss(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        support, query = part(batch, "support"), part(batch, "query")
        tasks = query["labels"].shape[0]
        keys = None if rng is None else jax.random.split(rng, tasks)

        def one(known: dict[str, Any], asked: dict[str, Any], key: Array | None):
            adapted = adapt(
                loss_fn, variables, known, key, rate=inner_rate, steps=inner_steps,
                first_order=first_order, adapts=adapts,
            )  # fmt: skip
            key = None if key is None else jax.random.fold_in(key, inner_steps)
            loss, aux = loss_fn(adapted, asked, key)
            _check_updates(aux)
            return loss * aux.weight, aux.weight, aux.metrics

        losses, weights, metrics = jax.vmap(one)(support, query, keys)
        metrics = jax.tree.map(lambda x: x.sum(axis=0), metrics)
        mean = Mean(losses.sum(), weights.sum())
        return mean.value, Aux(mean.weight, metrics, {})

    return meta_loss


def adapt(
    loss_fn: LossFn,
    variables: Variables,
    support: Batch,
    rng: Array | None,
    *,
    rate: float,
    steps: int,
    first_order: bool = False,
    adapts: Callable[[str], bool] = is_param,
) -> Variables:
    """Variables after gradient descent on one task's support; differentiable.

    Args:
        loss_fn, rate, steps, first_order, adapts: see `maml`.
        variables: where it begins.
        support: examples [S, ...]; without a ``weight`` all count alike.
        rng: for dropout.
    """
    support = {"weight": jnp.ones(support["labels"].shape[:1]), **support}
    moving, fixed = split(variables, adapts)
    if not moving:
        raise ValueError(
            f"adapts holds for none of the {len(flatten(variables))} leaves; paths look like "
            f"{next(iter(flatten(variables)), '(no leaves)')!r}"
        )

    def step(moving: Variables, number: Array) -> tuple[Variables, None]:
        key = None if rng is None else jax.random.fold_in(rng, number)

        def of_moving(moving: Variables) -> tuple[Array, Aux]:
            return loss_fn(merge(moving, fixed), support, key)

        grads, aux = jax.grad(of_moving, has_aux=True)(moving)
        _check_updates(aux)
        if first_order:
            grads = jax.lax.stop_gradient(grads)
        return jax.tree.map(lambda w, g: w - rate * g.astype(w.dtype), moving, grads), None

    moving, _ = jax.lax.scan(step, moving, jnp.arange(steps))
    return override(variables, moving)


def _check_updates(aux: Aux) -> None:
    if running := sorted(flatten(aux.updates)):
        raise ValueError(
            f"the loss updates {running[:3]}, which inner steps would each move elsewhere: take a "
            "loss with train=False, or a model with layer or group normalisation"
        )


def reptile(loss_fn: LossFn, tx: optax.GradientTransformation, *, tasks_at_once: int = 4) -> GradFn:
    """Reptile (Nichol et al. 2018, arXiv:1803.02999, algorithm 2): the weights less their mean
    after a few ordinary steps on each task. Its outer rate is that of ``optax.sgd``.

    It is federated averaging with tasks for clients, all of one weight. Batches are
    [tasks, steps, examples, ...], with ``weight``.

    Args:
        loss_fn: of one task's examples.
        tx: of the inner steps; the paper's is Adam without momentum, ``optax.adam(rate, b1=0)``.
        tasks_at_once: a divisor of the tasks in a batch.
    """
    return pseudo_gradient(
        client_update(loss_fn, tx), clients_at_once=tasks_at_once, weigh=jnp.sign
    )
