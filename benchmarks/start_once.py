"""The beginning of a training run, in a process that does nothing else.

    python benchmarks/start_once.py FOLDER HEAD BATCH LENGTH

`compile_time.py` starts it. It prints, as JSON, by the clock and in seconds of processors:
"imports" (with the start of Python in the latter), "load", "state", "trace" (and lowering),
"compile" (or reading what was compiled), and "step", the first one.
"""

from __future__ import annotations

import json
import sys
import time


def main(folder: str, head: str, batch_size: int, length: int) -> None:
    """Begin, and print how long it took."""
    stages: dict[str, list[float]] = {}
    clock, processors = time.perf_counter(), 0.0

    def lap(name: str) -> None:
        nonlocal clock, processors
        now, used = time.perf_counter(), time.process_time()
        stages[name] = [now - clock, used - processors]
        clock, processors = now, used

    import jax
    import numpy as np

    import fmjax
    from fmjax.cli import keep_what_is_compiled
    from fmjax.recipes.planned_step import LOSSES
    from fmjax.train import adamw, gradient, init_state, jit_step, make_train_step

    lap("imports")
    keep_what_is_compiled()
    model, variables = fmjax.load(folder, head=head)
    jax.block_until_ready(variables)
    lap("load")
    tx = adamw(1e-4)
    state = jax.block_until_ready(init_state(variables, tx, jax.random.key(0)))
    lap("state")
    ids = np.ones((batch_size, length), np.int32)
    batch = {"input_ids": ids, "labels": ids, "weight": np.ones(batch_size, np.float32)}
    step: jax.stages.Wrapped = jit_step(make_train_step(gradient(LOSSES[head](model)), tx))  # pyright: ignore
    lowered = step.lower(state, batch)
    lap("trace")
    compiled = lowered.compile()
    lap("compile")
    jax.block_until_ready(compiled(state, batch))
    lap("step")
    print(json.dumps(stages))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
