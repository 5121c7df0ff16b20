"""Compiling a step: for one device, for a mesh, or by pmap; always donating the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax.train.step import all_reduce, make_train_step
from fmjax.types import Batch, GradFn, PyTree, StepFn


def jit_step(
    step: StepFn,
    mesh: Mesh | None = None,
    *,
    state_shardings: PyTree = None,
    batch_spec: P = P("data"),
) -> StepFn:
    """The step compiled once per batch shape; the state's buffers are donated to the next state.

    Args:
        step: from `make_train_step`.
        mesh: the devices to run on; None is the default device.
        state_shardings: from `shardings`; None keeps the whole state on every device.
        batch_spec: how every batch leaf is laid over the mesh.

    Raises:
        ValueError: when called with a batch that does not divide by the devices.
    """
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    replicated = NamedSharding(mesh, P())
    states = replicated if state_shardings is None else state_shardings
    compiled = jax.jit(
        step,
        in_shardings=(states, NamedSharding(mesh, batch_spec)),
        out_shardings=(states, replicated),
        donate_argnums=0,
    )
    names = batch_spec[0] if isinstance(batch_spec[0], tuple) else (batch_spec[0],)
    parts = 1
    for name in names:
        parts *= mesh.shape[name]

    def placed(state: Any, batch: Batch) -> Any:
        # A first state that is elsewhere would have the step traced and compiled for it alone.
        if not state.step.sharding.is_equivalent_to(replicated, state.step.ndim):
            state = jax.device_put(state, states)
        return compiled(state, batch)

    return _checked(placed, parts)


def pmap_step(
    grad_fn: GradFn, tx: optax.GradientTransformation, axis_name: str = "batch"
) -> StepFn:
    """The step by ``jax.pmap`` over all local devices: the compatibility path, same results.

    The batch comes whole ([B, ...], as for `jit_step`) and the state is replicated.

    Raises:
        ValueError: when called with a batch that does not divide by the devices.
    """
    devices = jax.local_device_count()
    mapped = jax.pmap(
        make_train_step(all_reduce(grad_fn, axis_name), tx),
        axis_name=axis_name,
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=0,
    )

    def split_and_step(state: Any, batch: Batch) -> Any:
        pieces = {
            name: leaf.reshape(devices, leaf.shape[0] // devices, *leaf.shape[1:])
            for name, leaf in batch.items()
        }
        return mapped(state, pieces)

    return _checked(split_and_step, devices)


def _checked(step: Callable[..., Any], parts: int) -> StepFn:
    def checked(state: Any, batch: Batch) -> Any:
        uneven = {name: leaf.shape[0] for name, leaf in batch.items() if leaf.shape[0] % parts}
        if uneven:
            raise ValueError(
                f"batch sizes {uneven} do not divide by the {parts} devices that share a batch; "
                f"choose a batch size that is a multiple of {parts}"
            )
        return step(state, batch)

    return checked
