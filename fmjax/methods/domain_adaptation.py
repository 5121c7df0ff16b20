"""Unsupervised domain adaptation: labels of a source, features that fit an unlabelled target too.

DANN (Ganin et al. 2016, arXiv:1505.07818): a classifier of domains learns on the features, which
learn the reverse. Deep CORAL (Sun & Saenko 2016, arXiv:1607.01719): features of both domains get
the same covariance. Batches are those of `fmjax.methods.partly_labelled`: the source is "labelled",
the target "unlabelled".

    loss = dann(task.loss, model, strength=annealed(steps))
    variables = with_domain_classifier(variables, rng, width=model.config.hidden_size)
    variables = with_progress(variables)
    state = init_state(variables, tx, rng, is_adapted)
    step = jit_step(make_train_step(counting(gradient(loss)), tx))
    fmjax.save(folder, model, model_only(state.trainable | state.non_trainable))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.methods.partly_labelled import (
    PROGRESS,
    Features,
    Strength,
    TaskLoss,
    both,
    pooled,
    run_once,
    strength_now,
    strength_problems,
)
from fmjax.tasks.apply import row_weights
from fmjax.train import is_param
from fmjax.types import Aux, Batch, LossFn, Mean, Variables

ATTACHES = ("variables", "loss")

DOMAIN = "domain"
"""The collection of the domain classifier's parameters."""


@jax.custom_vjp
def reverse_gradient(x: Array, strength: Array) -> Array:
    """x itself, with a gradient times ``-strength`` (Ganin et al. 2016, equations 16 and 17).

    Args:
        x: any shape.
        strength: lambda, float []; it gets no gradient.
    """
    return x


def _forward(x: Array, strength: Array) -> tuple[Array, Array]:
    return x, strength


def _backward(strength: Array, gradient: Array) -> tuple[Array, Array]:
    return (-strength * gradient).astype(gradient.dtype), jnp.zeros_like(strength)


reverse_gradient.defvjp(_forward, _backward)


def annealed(steps: int, gamma: float = 10.0) -> optax.Schedule:
    """``2 / (1 + exp(-gamma p)) - 1`` with p the share of the steps that are done (Ganin et al.
    2016, section 5.2.2): from 0 towards 1.

    Args:
        steps: of the whole run.
        gamma: 10 in the paper.

    Raises:
        ValueError: numbers that are not positive.
    """
    if steps < 1 or not gamma > 0:
        raise ValueError(f"steps={steps} must be at least 1 and gamma={gamma} above 0")

    def strength(step: Any) -> Array:
        # The same, without 1 taken from a number that is almost 1.
        return jnp.tanh(gamma / 2 * jnp.minimum(step / steps, 1.0))

    return strength


def with_domain_classifier(
    variables: Variables, rng: Array, *, width: int, hidden: Sequence[int] = (100,)
) -> Variables:
    """The variables with a perceptron that tells domains apart, which trains (`is_adapted`).

    Its last layer begins at 0: a perceptron that has learnt nothing yet would turn round noise, and
    features run away from it faster than it follows.

    Args:
        variables: the model's.
        rng: a typed key.
        width: D, of the features: the model's ``hidden_size``.
        hidden: units of each hidden layer; 100 are the paper's for digits.

    Raises:
        ValueError: sizes that are none, or a domain classifier that is there already.
    """
    sizes = (width, *hidden, 1)
    problems = []
    if min(sizes) < 1:
        problems.append(f"width={width} and hidden={tuple(hidden)} must be at least 1")
    if DOMAIN in variables:
        problems.append("the variables have a domain classifier already")
    if problems:
        raise ValueError("; ".join(problems))
    init = jax.nn.initializers.he_normal()
    layers = {
        f"dense_{number}": {"kernel": init(key, (size, units)), "bias": jnp.zeros(units)}
        for number, (key, size, units) in enumerate(
            zip(jax.random.split(rng, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True)
        )
    }
    last = layers[f"dense_{len(sizes) - 2}"]
    last["kernel"] = jnp.zeros_like(last["kernel"])
    return {**variables, DOMAIN: layers}


def is_adapted(path: str) -> bool:
    """What trains, by leaf path: the model's parameters and the domain classifier's."""
    return is_param(path) or path.startswith(f"{DOMAIN}/")


def model_only(variables: Variables) -> Variables:
    """The variables without domain classifier and progress: what is evaluated and exported."""
    return {name: tree for name, tree in variables.items() if name not in (DOMAIN, PROGRESS)}


def _domain_logits(variables: Variables, x: Array) -> Array:
    """The target's log odds: [B, D] -> [B]."""
    layers = variables[DOMAIN]
    for number in range(len(layers)):
        layer = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), layers[f"dense_{number}"])
        if x.shape[-1] != layer["kernel"].shape[0]:
            raise ValueError(
                f"features have {x.shape[-1]} numbers, and the domain classifier reads "
                f"{layer['kernel'].shape[0]}: with_domain_classifier(..., width={x.shape[-1]})"
            )
        x = (jax.nn.relu(x) if number else x) @ layer["kernel"] + layer["bias"]
    return x[:, 0]


def dann(
    task_loss: TaskLoss,
    model: Any,
    *,
    strength: Strength = 1.0,
    features: Features | None = None,
) -> LossFn:
    """Domain-adversarial training (Ganin et al. 2016, equation 18): the task's loss of the source,
    plus the domain classifier's mean losses of source and target, whose gradient turns round where
    it enters the features.

    The reversal alone has the strength, so that the domain classifier learns at full rate from the
    first step on (section 5.2.2), and not as in equation 15.

    Accumulated over pieces, each piece counts by its labelled rows' weight.

    Args:
        task_loss: model -> LossFn of labelled rows.
        model: what is adapted.
        strength: lambda: a number, or `annealed`, which needs `with_progress` and `counting`.
        features: [B, D] that both domains are to have alike; None is `pooled()`.

    Raises:
        ValueError: a negative strength; when called, rows of one domain only, or variables without
            a domain classifier.
    """
    if problems := strength_problems("strength", strength):
        raise ValueError("; ".join(problems))
    features = pooled() if features is None else features

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        if DOMAIN not in variables:
            raise ValueError(
                f"the variables have the collections {sorted(variables)} and no {DOMAIN!r}; make "
                "them by with_domain_classifier"
            )
        parts = both(batch)
        loss, aux, found = run_once(task_loss, model, features, variables, parts, rng)
        scale = strength_now(strength, variables)
        total, domains, right = loss, [], []
        for domain, (rows, x) in enumerate(zip(parts, found, strict=True)):
            logits = _domain_logits(variables, reverse_gradient(x, scale))
            losses = optax.sigmoid_binary_cross_entropy(logits, jnp.full(logits.shape, domain))
            domains.append(Mean.of(losses, row_weights(rows)))
            right.append(Mean.of((logits > 0) == (domain == 1), row_weights(rows)))
            total += domains[-1].value
        metrics = {
            **aux.metrics,
            "task": Mean(loss * aux.weight, aux.weight),
            "domain": domains[0] + domains[1],
            "domain_accuracy": right[0] + right[1],
            "strength": Mean(scale * aux.weight, aux.weight),
        }
        return total, aux._replace(metrics=metrics)

    return loss_fn


def covariance(x: Array, weight: Array) -> Array:
    """The covariance of features, unbiased (Sun & Saenko 2016, equations 2 and 3).

    Args:
        x: [B, D].
        weight: [B], how often each row counts; padding 0.

    Returns:
        [D, D] float32; 0 where fewer than two rows count.
    """
    weight = jnp.asarray(weight, jnp.float32)[:, None]
    x = jnp.where(weight == 0, 0.0, x.astype(jnp.float32))
    count = jnp.sum(weight)
    # From the mean, and not equation 2's difference of two large numbers.
    centred = (x - jnp.sum(weight * x, axis=0) / jnp.where(count == 0, 1.0, count)) * (weight != 0)
    product = jnp.einsum("BD,BE->DE", weight * centred, centred)
    return jnp.where(count > 1, product / jnp.where(count > 1, count - 1, 1.0), 0.0)


def coral_distance(
    source: Array, target: Array, source_weight: Array, target_weight: Array
) -> Array:
    """``||C_S - C_T||^2 / (4 D^2)`` of the covariances (Sun & Saenko 2016, equation 1): float32 [].

    Args:
        source, target: [B, D]; the numbers of rows may differ.
        source_weight, target_weight: [B], padding 0.
    """
    apart = covariance(source, source_weight) - covariance(target, target_weight)
    return jnp.sum(jnp.square(apart)) / (4 * source.shape[-1] ** 2)


def coral(
    task_loss: TaskLoss,
    model: Any,
    *,
    strength: Strength = 1.0,
    features: Features | None = None,
) -> LossFn:
    """Deep CORAL (Sun & Saenko 2016, equation 6): the task's loss of the source plus ``strength``
    times the distance of the domains' covariances.

    A covariance is of the rows that are together: accumulated over pieces, it is a mean over
    pieces. The paper takes the classifier's logits (``features=LOGITS``), and a strength at which
    both losses are about the same in the end.

    Args:
        task_loss: model -> LossFn of labelled rows.
        model: what is adapted.
        strength: lambda: a number, or a schedule, which needs `with_progress` and `counting`.
        features: [B, D]; None is `pooled()`.

    Raises:
        ValueError: a negative strength; when called, rows of one domain only.
    """
    if problems := strength_problems("strength", strength):
        raise ValueError("; ".join(problems))
    features = pooled() if features is None else features

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        source, target = both(batch)
        loss, aux, found = run_once(task_loss, model, features, variables, (source, target), rng)
        apart = coral_distance(found[0], found[1], row_weights(source), row_weights(target))
        metrics = {
            **aux.metrics,
            "task": Mean(loss * aux.weight, aux.weight),
            "coral": Mean(apart * aux.weight, aux.weight),
        }
        scale = strength_now(strength, variables)
        return loss + scale * apart, aux._replace(metrics=metrics)

    return loss_fn
