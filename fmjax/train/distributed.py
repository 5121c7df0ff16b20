"""Several processes as one: their devices are one mesh, and each gives its own rows of a batch.

Every process runs the same program, and `start` is the first thing in it::

    start()                              # under SLURM, mpirun, Kubernetes or on a TPU pod
    mesh = make_mesh(data=jax.process_count(), fsdp=jax.local_device_count())
    stream = batches(..., process_index=jax.process_index(), process_count=jax.process_count())
    step = jit_step(..., mesh)           # each process calls it with its own rows

What every device has (metrics, the step) is read as in one process; what is divided stays so, and
`Checkpoints` writes and restores it from all processes together.
"""

from __future__ import annotations

import logging

import jax
import numpy as np
from jax.sharding import NamedSharding

from fmjax.types import Batch

logger = logging.getLogger(__name__)


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    index: int | None = None,
    *,
    heartbeat: int = 60,
) -> None:
    """Joins the processes of a run; to be called before any other use of JAX.

    A process that dies ends the run: the others find out when it has not been heard of for
    `heartbeat` seconds, say its number ("tasks are unhealthy: 1"), and abort, wherever they are
    waiting for it. The run goes on from its newest checkpoint when all are started again, by the
    same command.

    Args:
        coordinator: host and port of process 0, such as "10.0.0.1:1234"; None asks the
            environment, which SLURM, Open MPI, Kubernetes and TPU pods tell.
        processes: how many there are; None asks the environment.
        index: which of them this is; None asks the environment.
        heartbeat: seconds.

    Raises:
        ValueError: some of the three are given and others not, or they contradict each other.
        RuntimeError: JAX has been used already, or the others do not come.
    """
    given = (coordinator, processes, index)
    if None in given and any(value is not None for value in given):
        raise ValueError(
            f"coordinator={coordinator!r}, processes={processes}, index={index}: give all three, "
            "or none where the environment says them"
        )
    if processes is not None and index is not None and not 0 <= index < processes:
        raise ValueError(f"index={index} must be at least 0 and below processes={processes}")
    if heartbeat < 1:
        raise ValueError(f"heartbeat={heartbeat} must be at least 1 second")
    jax.distributed.initialize(coordinator, processes, index, heartbeat_timeout_seconds=heartbeat)
    logger.warning(
        "process %d of %d; if one dies, all end within %d seconds and name it: start all again by "
        "the same command, and the run goes on from its newest checkpoint",
        *(jax.process_index(), jax.process_count(), heartbeat),
    )


def global_batch(batch: Batch, rows: NamedSharding) -> Batch:
    """The batch of all processes, of which each gives its own rows; of a single one, as it is.

    Args:
        batch: this process's rows, [B / processes, ...], or arrays of all processes already.
        rows: how the rows of all are laid over the mesh.

    Raises:
        ValueError: the mesh does not give each process rows of its own.
    """
    if jax.process_count() == 1:
        return batch
    return {name: _global(leaf, rows) for name, leaf in batch.items()}


def _global(leaf: jax.Array | np.ndarray, rows: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf
    shape = (leaf.shape[0] * jax.process_count(), *leaf.shape[1:])
    places = rows.addressable_devices_indices_map(shape).values()
    held = {place[0].indices(shape[0]) for place in places if place is not None}
    own = sum(len(range(*piece)) for piece in held)
    if own != leaf.shape[0]:
        raise ValueError(
            f"process {jax.process_index()} gave {leaf.shape[0]} rows and its devices hold {own} "
            f"of {shape[0]}: the axes that divide a batch must come first in the mesh "
            f"{dict(rows.mesh.shape)}, so that processes share no rows"
        )
    return jax.make_array_from_process_local_data(rows, leaf, shape)
