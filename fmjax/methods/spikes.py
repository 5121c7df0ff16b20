"""Steps left out where the loss or the gradient jumps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fmjax.types import PyTree

ATTACHES = ("update",)

LEAST_SPREAD = 1e-3
"""The least standard deviation that is reckoned with, as a share of the mean."""


class SpikeState(NamedTuple):
    """What is remembered.

    Args:
        losses, norms: [N], of the last N steps, the next one's place first overwritten.
        count: steps so far, int32 [].
        skipped: how many of them were left out, int32 [].
        inner: the optimizer's own state.
    """

    losses: Array
    norms: Array
    count: Array
    skipped: Array
    inner: Any


def skip_spikes(
    tx: optax.GradientTransformation, *, deviations: float = 6.0, window: int = 128
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, but for steps whose loss or gradient norm is far above those before.

    A step is left out, weights and optimizer state as they were, where either number is more than
    `deviations` standard deviations above its mean over the last `window` steps, or not finite
    (OLMo Team 2025, arXiv:2501.00656, section 3; OLMo-core's defaults). A deviation counts as a
    thousandth of the mean at least, so that after steps that are all alike not every rise is a
    spike. Until half the window is known only what is not finite is left out. `make_train_step`
    gives the loss; `fmjax.train.fit` goes on behind losses that are not finite only as far as its
    `forgiven` says. Running statistics of batch normalisation are no update, and have moved.

    Args:
        tx: the whole chain; clipping belongs inside, or norms would never jump.
        deviations: how far above the mean is too far.
        window: N, how many steps are remembered.

    Raises:
        ValueError: `deviations` is not above 0, or `window` is below 4.
    """
    if deviations <= 0 or window < 4:
        raise ValueError(
            f"deviations={deviations} must be above 0 and window={window} at least 4 steps"
        )
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> SpikeState:
        return SpikeState(
            jnp.zeros(window),
            jnp.zeros(window),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32),
            inner.init(params),
        )

    def update(updates, state, params=None, *, value=None, **others):
        if value is None:
            raise ValueError("skip_spikes needs the loss: tx.update(..., value=loss)")
        norm = optax.tree.norm(updates)
        known = jnp.arange(window) < state.count
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        spike = ~finite
        for now, before in ((value, state.losses), (norm, state.norms)):
            mean = jnp.mean(before, where=known)
            spread = jnp.maximum(jnp.std(before, where=known), LEAST_SPREAD * jnp.abs(mean))
            jump = now - mean > deviations * spread
            spike = spike | (jump & (state.count >= window // 2))

        def go(_: None) -> tuple[PyTree, Any]:
            return inner.update(updates, state.inner, params, value=value, **others)

        def stay(_: None) -> tuple[PyTree, Any]:
            # An update need not have the gradient's dtype.
            like = jax.eval_shape(go, None)[0]
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), state.inner

        new_updates, new_inner = jax.lax.cond(spike, stay, go, None)
        place = state.count % window

        def remembered(before: Array, now: Array) -> Array:
            # A spike counts among what later steps are compared with: a new level is not one.
            return before.at[place].set(jnp.where(finite, now, before[place]))

        return new_updates, SpikeState(
            remembered(state.losses, value),
            remembered(state.norms, norm),
            state.count + finite,
            state.skipped + spike,
            new_inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)
