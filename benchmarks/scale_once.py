"""Steps of one training run as one of its processes takes them.

    python benchmarks/scale_once.py VARIANT BATCH LENGTH data|fsdp REPEATS PROCESSES INDEX PORT

`scaling.py` starts it, with as many devices as XLA_FLAGS say. It prints, as JSON, seconds of each
step by the clock and of processors, the first loss, how many devices all processes have, and the
bytes of the state on the first of them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import jax
import numpy as np

import fmjax
from fmjax.models import bert
from fmjax.perf.memory import bytes_per_chip
from fmjax.tasks import masked_lm
from fmjax.train import (
    adamw,
    gradient,
    init_state,
    jit_step,
    layout,
    make_mesh,
    make_train_step,
    start,
)


def main(
    variant: str, batch_size: int, length: int, axis: str, repeats: int, processes: int, index: int,
    port: str,
) -> None:  # fmt: skip
    """Train, and print how long it took."""
    if processes > 1:
        start(f"127.0.0.1:{port}", processes, index)
    # Dropout is drawn alike on any mesh, but costs what is not asked for here.
    config = dataclasses.replace(
        bert.VARIANTS[variant], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model, variables = fmjax.create("bert", config, head="masked_lm", rng=jax.random.key(0))
    mesh = make_mesh(**{axis: jax.device_count()})
    variables = jax.device_put(variables, layout(variables, mesh))
    tx = adamw(1e-4)
    state: Any = init_state(variables, tx, jax.random.key(1))
    places = layout(state, mesh)
    step = jit_step(
        make_train_step(gradient(masked_lm.loss(model)), tx), mesh, state_shardings=places
    )
    ids = np.random.default_rng(0).integers(
        0, config.vocab_size, (batch_size, length), dtype=np.int32
    )
    own = batch_size // processes
    rows = ids[index * own : (index + 1) * own]
    batch = {"input_ids": rows, "labels": rows, "weight": np.ones(own, np.float32)}
    state, metrics = step(state, batch)
    loss = float(metrics["loss"].value)
    seconds, used = [], []
    for _ in range(repeats):
        clock, processors = time.perf_counter(), time.process_time()
        state, _ = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - clock)
        used.append(time.process_time() - processors)
    found = {
        "seconds": seconds,
        "cpu_seconds": used,
        "loss": loss,
        "devices": jax.device_count(),
        "state_bytes": bytes_per_chip(state),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    variant, batch_size, length, axis, repeats, processes, index, port = sys.argv[1:]
    main(
        variant, int(batch_size), int(length), axis, int(repeats), int(processes), int(index), port
    )
