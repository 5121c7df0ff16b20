"""Sharpness-aware minimisation: the gradient where the loss nearby is highest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.types import Aux, Batch, GradFn, Variables

ATTACHES = ("gradient",)


def sharpness_aware(grad_fn: GradFn, *, rho: float = 0.05, adaptive: bool = False) -> GradFn:
    """SAM (Foret et al. 2021, arXiv:2010.01412, algorithm 1, eq. 2 and 3): the gradient at the
    weights plus `rho` times the gradient's direction.

    The loss, its metrics and the updates of mutable collections are those at the weights
    themselves. Around `accumulate` the direction is the whole batch's; inside, each piece's own,
    as in the paper's "m-sharpness" (section 4.1). Both passes draw the same dropout.

    Args:
        grad_fn: gives both gradients.
        rho: how far away; 0 changes nothing.
        adaptive: whether distances are relative to each weight's size (ASAM, Kwon et al. 2021,
            arXiv:2102.11600, eq. 8; rho is then about 10 times larger).

    Raises:
        ValueError: `rho` is negative.
    """
    if rho < 0:
        raise ValueError(f"rho is {rho}; it must be at least 0")

    def sharp(
        trainable: Variables, non_trainable: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Variables, Array, Aux]:
        grads, loss, aux = grad_fn(trainable, non_trainable, batch, rng)
        size = jax.tree.map(jnp.abs, trainable) if adaptive else None
        scaled = grads if size is None else jax.tree.map(jnp.multiply, size, grads)
        norm = optax.tree.norm(scaled)
        # Where there is no gradient there is no direction.
        distance = rho / jnp.where(norm == 0, 1.0, norm)
        away = scaled if size is None else jax.tree.map(jnp.multiply, size, scaled)
        near = jax.tree.map(lambda w, e: w + (distance * e).astype(w.dtype), trainable, away)
        return grad_fn(near, non_trainable, batch, rng)[0], loss, aux

    return sharp
