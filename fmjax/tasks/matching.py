"""Which prediction is which target: the cheapest one-to-one matching, on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

UNKNOWN = 1e6
"""The cost of a pair whose cost is not finite: a broken prediction is matched last."""


def match(costs: Array, mask: Array) -> Array:
    """The queries of each example's targets, no two the same, of the least total cost.

    The Hungarian algorithm (Kuhn 1955), from Optax, inside jit and batched. Targets that are
    padding cost nothing wherever they go, and as there is a query for each, they take what the
    others leave: the matching of the others is the one without them.

    Args:
        costs: [B, N, M], of N queries and M targets.
        mask: [B, M], which targets are no padding.

    Returns:
        int32 [B, M], the query of each target; a padding target has one too.

    Raises:
        ValueError: there are more targets than queries.
    """
    batch, queries, targets = costs.shape
    if targets > queries:
        raise ValueError(
            f"there is room for {targets} targets and only {queries} queries; each target needs "
            "one: give the model more, or pad to fewer"
        )
    if not targets:
        return jnp.zeros((batch, 0), jnp.int32)
    costs = jnp.where(jnp.isfinite(costs), costs, UNKNOWN).astype(jnp.float32)
    costs = jnp.where(jnp.asarray(mask, bool)[:, None, :], costs, 0.0)

    def of_example(costs: Array) -> Array:
        chosen, target = optax.assignment.hungarian_algorithm(costs)
        return jnp.zeros(targets, jnp.int32).at[target].set(chosen.astype(jnp.int32))

    return jax.vmap(of_example)(jax.lax.stop_gradient(costs))
