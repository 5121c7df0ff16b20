"""Choosing actions by values or logits, and the networks that give them.

A policy's network is any function ``(variables, observations [B, ...]) -> [B, A]``; an actor with
a critic gives ``(logits [B, A], values [B])``. The functions here make them of fmjax's models: a
perceptron of numbers, a CNN of pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.models import family_for
from fmjax.tasks.apply import apply_fn
from fmjax.tree import part
from fmjax.types import Variables

ATTACHES = ("program",)

Network = Callable[[Variables, Array], Array]
"""(variables, observations [B, ...]) -> logits or values [B, A]."""
ActorCritic = Callable[[Variables, Array], tuple[Array, Array]]
"""(variables, observations [B, ...]) -> (logits [B, A], values [B])."""


def greedy(values: Array, rng: Array) -> Array:
    """The action of the highest value [..., A], one of them at random where several are."""
    highest = values == jnp.max(values, axis=-1, keepdims=True)
    return jax.random.categorical(rng, jnp.where(highest, 0.0, -jnp.inf))


def epsilon_greedy(values: Array, epsilon: Array | float, rng: Array) -> Array:
    """`greedy`, or with probability epsilon any action (Sutton & Barto 2018, 2.2).

    Args:
        values: [..., A].
        epsilon: from 0 to 1.
        rng: a key.

    Returns:
        int32 [...].
    """
    coin, draw, best = jax.random.split(rng, 3)
    shape = values.shape[:-1]
    anything = jax.random.randint(draw, shape, 0, values.shape[-1])
    return jnp.where(jax.random.uniform(coin, shape) < epsilon, anything, greedy(values, best))


def boltzmann(values: Array, temperature: Array | float, rng: Array) -> Array:
    """An action by ``softmax(values / temperature)`` (Sutton & Barto 2018, 13.2; Luce 1959).

    Args:
        values: [..., A].
        temperature: above 0; towards 0 it is `greedy`.
        rng: a key.

    Returns:
        int32 [...].
    """
    # The highest value is taken away first: a tiny temperature must not overflow.
    ahead = values - jnp.max(values, axis=-1, keepdims=True)
    return jax.random.categorical(rng, ahead / jnp.maximum(temperature, 1e-30))


def log_probability(logits: Array, actions: Array) -> Array:
    """Log of the softmax of logits [..., A] at actions [...]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), actions[..., None], axis=-1)[..., 0]


def entropy(logits: Array) -> Array:
    """Of the softmax of logits [..., A], in nats."""
    log_p = jax.nn.log_softmax(logits)
    # An action of probability 0 adds nothing, though its logarithm is not finite.
    return -jnp.sum(jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * log_p), axis=-1)


def network(model: Any) -> Network:
    """A model with logits, applied as in evaluation: nothing is dropped.

    Args:
        model: from `fmjax.load` or `fmjax.create`, with one input (pixels, or numbers).

    Raises:
        ValueError: the model has several inputs.
    """
    names = list(family_for(model).inputs(model.config, model.head))
    if len(names) != 1:
        raise ValueError(f"the model has the inputs {names}; an observation is only one array")
    apply = apply_fn(model)

    def outputs(variables: Variables, observations: Array) -> Array:
        out, _ = apply(variables, {names[0]: observations}, None, train=False)
        if out.logits is None:
            raise ValueError(f"the model's head {model.head!r} has no logits; give it one that has")
        return out.logits

    return outputs


def actor_critic(policy: Any, value: Any) -> ActorCritic:
    """Two networks side by side, over the variables that `together` makes of ``policy`` and
    ``value``.

    Args:
        policy: a model with A logits.
        value: a model with one.
    """
    logits_of, values_of = network(policy), network(value)

    def both(variables: Variables, observations: Array) -> tuple[Array, Array]:
        logits = logits_of(part(variables, "policy"), observations)
        values = values_of(part(variables, "value"), observations)
        if values.shape[-1] != 1:
            raise ValueError(f"the value network has {values.shape[-1]} outputs; it must have one")
        return logits, values[..., 0]

    return both


def shared_actor_critic(model: Any) -> ActorCritic:
    """One network with A + 1 outputs, of which the last is the value."""
    outputs = network(model)

    def both(variables: Variables, observations: Array) -> tuple[Array, Array]:
        result = outputs(variables, observations)
        return result[..., :-1], result[..., -1]

    return both


def dueling(streams: ActorCritic) -> Network:
    """Q-values of two streams: ``V + A - mean A`` (Wang et al. 2016, arXiv:1511.06581, equation 9).

    Args:
        streams: gives the advantages [B, A], in the logits' place, and the values [B].
    """

    def q_values(variables: Variables, observations: Array) -> Array:
        advantages, values = streams(variables, observations)
        return values[..., None] + advantages - jnp.mean(advantages, axis=-1, keepdims=True)

    return q_values
