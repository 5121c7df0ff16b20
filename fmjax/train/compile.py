"""Compiling a step: for one device, for a mesh, or by pmap; always donating the state.

On a mesh, in full, for a state that no host has room for::

    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    init = jit_init(lambda: init_state(model.init(rng, **inputs), tx, rng), mesh)
    abstract = jax.eval_shape(init)  # with shardings: what `Checkpoints.restore_last` takes
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = jit_step(make_train_step(gradient(loss), tx), mesh, state_shardings=places)
    state = init()

or, of a checkpoint, ``fmjax.load(folder, shardings=partial(layout, mesh=mesh))``: the state that
`init_state` makes of such variables lies as they do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax.train.distributed import global_batch
from fmjax.train.sharding import batch_spec as examples_over
from fmjax.train.sharding import layout
from fmjax.train.step import all_reduce, make_train_step
from fmjax.types import Batch, GradFn, PyTree, StepFn, TrainState

_ON_GPU = {
    # What is rounded to bfloat16 stays so: kept in float32 by whoever reads it next, a gradient
    # would be written and read again at twice the bytes.
    "xla_allow_excess_precision": False,
    # Products of one input are not made one: their results would be cut and joined by copies.
    "xla_gpu_dot_merger_threshold_mb": 0,
}


def compiler_options(platform: str) -> dict[str, Any] | None:
    """What XLA is told for steps on a platform as JAX names it; None is its own defaults."""
    return _ON_GPU if platform in ("gpu", "cuda") else None


def jit_init(
    make: Callable[[], TrainState],
    mesh: Mesh,
    places: Callable[[PyTree, Mesh], PyTree] = layout,
) -> Callable[[], TrainState]:
    """`make` compiled so that each device computes and holds its parts of a state alone.

    Args:
        make: draws the variables and makes the state.
        mesh: the devices.
        places: of the abstract state and the mesh, the shardings.

    Returns:
        What is called as `make` is; its ``jax.eval_shape`` has the shardings.
    """
    return jax.jit(make, out_shardings=places(jax.eval_shape(make), mesh))


def jit_step(
    step: StepFn,
    mesh: Mesh | None = None,
    *,
    state_shardings: PyTree = None,
    batch_spec: P | None = None,
) -> StepFn:
    """The step compiled once per batch shape; the state's buffers are donated to the next state.

    Each of several processes gives its own rows of the batch.

    Args:
        step: from `make_train_step`.
        mesh: the devices to run on; None is the default device. Models find it as
            `fmjax.nn.placement` says.
        state_shardings: from `layout` or `shardings`; None keeps the whole state on every device.
        batch_spec: how every batch leaf is laid over the mesh; None is over all its axes but
            ``tensor``.

    Raises:
        ValueError: when called with a batch that does not divide by the devices.
    """
    if mesh is None:
        return jit_alone(step, jax.default_backend())
    replicated = NamedSharding(mesh, P())
    states = replicated if state_shardings is None else state_shardings
    batch_spec = examples_over(mesh) if batch_spec is None else batch_spec
    rows = NamedSharding(mesh, batch_spec)
    compiled = jit_over(step, mesh, states, rows)
    over = batch_spec[0] if batch_spec else None
    names = over if isinstance(over, tuple) else () if over is None else (over,)
    parts = math.prod(mesh.shape[name] for name in names)

    def placed(state: Any, batch: Batch) -> Any:
        # A first state that is elsewhere would have the step traced and compiled for it alone.
        if not state.step.sharding.is_equivalent_to(replicated, state.step.ndim):
            state = _put(state, states)
        with jax.set_mesh(mesh):
            return compiled(state, global_batch(batch, rows))

    return _checked(placed, max(1, parts // jax.process_count()))


def _put(state: TrainState, places: PyTree) -> TrainState:
    """The state where it belongs, on other hosts too. Of keys ``jax.device_put`` does not do that;
    their words it does."""
    impl, words = jax.random.key_impl(state.rng), jax.random.key_data(state.rng)
    put = jax.device_put(dataclasses.replace(state, rng=words), places)
    return dataclasses.replace(put, rng=jax.random.wrap_key_data(put.rng, impl=impl))


def jit_alone(step: StepFn, platform: str) -> Any:
    """``jax.jit`` of a step on one device of a platform, to be called or lowered.

    Args:
        step: from `make_train_step`.
        platform: "cpu", "gpu" or "tpu"; the device need not be there if the step is only compiled.
    """
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(platform))


def jit_over(step: StepFn, mesh: Mesh, states: PyTree, rows: NamedSharding) -> Any:
    """``jax.jit`` of a step over a mesh, to be called or lowered under ``jax.set_mesh(mesh)``.

    Args:
        step: from `make_train_step`.
        mesh: the devices, which need not be there if the step is only lowered and compiled.
        states: shardings of the state.
        rows: the sharding of every batch leaf.
    """
    return jax.jit(
        step,
        in_shardings=(states, rows),
        out_shardings=(states, NamedSharding(mesh, P())),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def lower_step(
    step: StepFn,
    abstract_state: TrainState,
    abstract_batch: PyTree,
    mesh: Mesh | None = None,
    *,
    state_shardings: PyTree = None,
) -> jax.stages.Lowered:
    """The program of `jit_step` with its own `batch_spec`, not compiled and not run.

    Args:
        step: from `make_train_step`.
        abstract_state, abstract_batch: arrays or ``jax.ShapeDtypeStruct``.
        mesh, state_shardings: as there.
    """
    if mesh is None:
        return jit_alone(step, jax.default_backend()).lower(abstract_state, abstract_batch)
    states = NamedSharding(mesh, P()) if state_shardings is None else state_shardings
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, examples_over(mesh))
        return jit_over(step, mesh, states, rows).lower(abstract_state, abstract_batch)


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
    """The step of batches of which this process's rows divide by `parts`."""

    def checked(state: Any, batch: Batch) -> Any:
        if odd := [
            name
            for name, leaf in batch.items()
            if not (isinstance(leaf, np.ndarray | jax.Array) and leaf.ndim)
        ]:
            raise ValueError(
                f"batch {odd} are no arrays with an axis of examples to divide over devices; give "
                "every leaf one"
            )
        uneven = {name: leaf.shape[0] for name, leaf in batch.items() if leaf.shape[0] % parts}
        if uneven:
            size = next(iter(uneven.values()))
            nearest = [n for n in (size - size % parts, size - size % parts + parts) if n]
            raise ValueError(
                f"batch sizes {uneven} do not divide by the {parts} devices that share a batch; "
                f"choose a batch size that is a multiple of {parts}, such as "
                f"{' or '.join(map(str, nearest))}"
            )
        return step(state, batch)

    return checked
