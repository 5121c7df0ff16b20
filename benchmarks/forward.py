"""How fast is a BERT forward pass, next to PyTorch sdpa in the same run?

    python benchmarks/forward.py                          about 2 minutes on 2 cores
    python benchmarks/forward.py --cases base-float32 --repeats 11
    python benchmarks/forward.py --smoke                  a tiny model, seconds

BERT-base (12 layers, width 768), 8 sequences of 128 tokens, no dropout, the bare encoder with its
pooler. Weights are float32 on both sides; bfloat16 casts them inside the call, as PyTorch's
autocast does. Run it on an idle machine: other load slows the two sides unequally.
"""

from __future__ import annotations

import jax
import tyro
from cases import (
    BASE,
    Case,
    compare,
    create,
    forward_fn,
    inputs_of,
    make_batch,
    peers_of,
)
from record import Row
from run import Settings, rows_of, run

from fmjax.perf.flops import count_flops
from fmjax.perf.timing import compile_time, time_alternately

CASES = tuple(
    Case(f"base-{dtype}", BASE, "model", 8, 128, dtype) for dtype in ("float32", "bfloat16")
)


def run_case(case: Case, settings: Settings, peak: float) -> list[Row]:
    """Compare, compile and time one case."""
    model, variables = create(case)
    batch = make_batch(case)
    inputs = jax.device_put(inputs_of(batch))
    forward = forward_fn(model, case)
    compiled = compile_time(jax.jit(forward), variables, inputs)
    thunks = {"fmjax": lambda: jax.block_until_ready(compiled.call(variables, inputs))}
    others = peers_of(
        case, model, variables, batch, torch=settings.peer, flax_python=settings.flax_python
    )
    with others as peers:
        differences = compare(case, model, variables, batch, peers)
        thunks |= {side: peer.forward for side, peer in peers.items()}
        timings = time_alternately(thunks, repeats=settings.repeats)
    flops = count_flops(forward, variables, inputs).total
    return rows_of(
        case,
        timings,
        compiled={"fmjax": compiled},
        model_flops=flops,
        matmul_peak=peak,
        differences=differences,
    )


if __name__ == "__main__":
    run("forward", CASES, tyro.cli(Settings, description=__doc__), run_case)
