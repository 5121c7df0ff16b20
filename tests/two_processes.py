"""One of two processes of a run: ``python two_processes.py PORT INDEX FOLDER``.

It writes what it saw to FOLDER/INDEX.json; then process 1 dies, and process 0 goes on.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmjax.train import (
    Checkpoints,
    Memory,
    adamw,
    gradient,
    init_state,
    jit_init,
    jit_step,
    layout,
    make_mesh,
    make_train_step,
    start,
    track_ema,
)
from fmjax.types import Aux, Mean

PROCESSES, STEPS, ROWS, WIDTH = 2, 5, 16, 32
TX = optax.chain(adamw(1e-2), track_ema(0.9))


def loss_fn(variables, batch, rng):
    """Weighted least squares of a two-layer net."""
    params = variables["params"]
    hidden = jnp.tanh(batch["x"] @ params["up"]["kernel"])
    error = jnp.square((hidden @ params["head"]["kernel"])[:, 0] - batch["y"])
    mean = Mean.of(error, batch["weight"])
    return mean.value, Aux(mean.weight, {}, {})


def make_batch(step):
    rng = np.random.default_rng(step)
    return {
        "x": rng.normal(size=(ROWS, WIDTH)).astype(np.float32),
        "y": rng.normal(size=ROWS).astype(np.float32),
        "weight": rng.integers(0, 3, ROWS).astype(np.float32),
    }


def make_state():
    keys = jax.random.split(jax.random.key(0))
    kernels = {
        name: {"kernel": 0.3 * jax.random.normal(key, shape)}
        for name, key, shape in zip(("up", "head"), keys, ((WIDTH, WIDTH), (WIDTH, 1)), strict=True)
    }
    return init_state({"params": kernels}, TX, jax.random.key(1))


def train(step, state, mine=slice(None)):
    """(the state, the losses) of a few steps on the rows that this process has."""
    losses = []
    for i in range(STEPS):
        rows = {name: leaf[mine] for name, leaf in make_batch(i).items()}
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss"].value))
    return state, losses


def main(port, index, folder):
    start(f"127.0.0.1:{port}", PROCESSES, index, heartbeat=5)
    mesh = make_mesh(data=PROCESSES, fsdp=jax.local_device_count())
    places = partial(layout, threshold=WIDTH * WIDTH)
    init = jit_init(make_state, mesh, places)
    abstract = jax.eval_shape(init)
    step = jit_step(
        make_train_step(gradient(loss_fn), TX),
        mesh,
        state_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
    )
    state, losses = train(step, init(), slice(index, None, PROCESSES))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(state, {"position": STEPS}, Memory())
        checkpoints.wait()
        restored = checkpoints.restore_last(abstract)
    kept = zip(*map(jax.tree.leaves, (state.trainable, restored.state.trainable)), strict=True)
    same = all(
        np.array_equal(one.data, other.data)
        for leaf, again in kept
        for one, other in zip(leaf.addressable_shards, again.addressable_shards, strict=True)
    )
    refused = []
    apart = jit_step(make_train_step(gradient(loss_fn), TX), make_mesh(tensor=PROCESSES, data=4))
    for refusing, rows in ((step, 3), (apart, ROWS // PROCESSES)):
        try:
            refusing(state, {name: leaf[:rows] for name, leaf in make_batch(0).items()})
        except ValueError as error:
            refused.append(str(error))
    seen = {"losses": losses, "same": same, "step": int(restored.state.step), "refused": refused}
    (folder / f"{index}.json").write_text(json.dumps(seen))
    # Both have written before one dies.
    jax.experimental.multihost_utils.sync_global_devices("written")
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(step, restored.state, slice(index, None, PROCESSES))
    print("nobody noticed")


if __name__ == "__main__":
    import jax.experimental.multihost_utils

    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
