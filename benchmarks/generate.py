"""How fast is generation, next to PyTorch sdpa in the same run?

    python benchmarks/generate.py                         about 3 minutes on 2 cores
    python benchmarks/generate.py --cases gpt2-batch-1 --repeats 9
    python benchmarks/generate.py --smoke                 a tiny model, seconds

GPT-2 small (12 layers, width 768, random weights), greedy, float32, a prompt of 16 tokens and 64
new ones, one text and eight: `fmjax.generate` beside PyTorch's `generate` with its cache. Before
anything is timed both must give the same text, and while it is timed nothing may be compiled.

A text alone is bound by memory: every token reads all weights once. So the table also has the
weights' bytes per second, beside those of a plain matrix-vector product in the same run. Run it on
an idle machine: other load slows the two sides unequally.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import tyro
from cases import Case, compare, create, inputs_of, make_batch, peers_of
from record import Row
from record import row as make_row
from run import Settings, difference_of, run

import fmjax
from fmjax.models import gpt2
from fmjax.perf.device import measure_matvec_bandwidth
from fmjax.perf.flops import count_flops
from fmjax.perf.timing import compile_events, time_alternately
from fmjax.tree import flatten
from fmjax.types import Variables

PROMPT = 16
CASES = tuple(
    Case(f"gpt2-batch-{batch_size}", gpt2.VARIANTS["base"], "causal_lm", batch_size, 64, "float32")
    for batch_size in (1, 8)
)


def model_flops(model: Any, variables: Variables, case: Case) -> int:
    """FLOPs of one run: all tokens but the last through the blocks, the new ones unembedded."""
    ids = jax.ShapeDtypeStruct((case.batch_size, PROMPT + case.length - 1), np.int32)
    new = jax.ShapeDtypeStruct((case.batch_size, case.length, case.config.hidden_size), np.float32)
    blocks = count_flops(
        lambda v, ids: model.apply(v, input_ids=ids, output_logits=False), variables, ids
    )
    head = count_flops(lambda v, x: model.apply(v, x, method="unembed"), variables, new)
    return blocks.total + head.total


def weight_bytes(variables: Variables) -> int:
    """What each token reads: every weight but the table of positions, of which it takes a row."""
    leaves = flatten(variables).items()
    return sum(leaf.nbytes for path, leaf in leaves if "embed/position" not in path)


def check_same_text(
    model: Any,
    variables: Variables,
    case: Case,
    ours: np.ndarray,
    side: str,
    theirs: np.ndarray,
) -> None:
    """Our texts [B, P + N] and a side's are the same, or part where two tokens are equally likely.

    Raises:
        ValueError: they are not: their times are not comparable.
    """
    for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if (mine == other).all():
            continue
        at = int(np.flatnonzero(mine != other)[0])
        logits = np.asarray(model.apply(variables, input_ids=mine[None, :at]).logits[0, -1])
        gap = abs(logits[mine[at]] - logits[other[at]]) / np.abs(logits).max()
        if gap > 1e-5:
            raise ValueError(
                f"{case.name}: fmjax and {side} generate different texts in row {row} from token "
                f"{at} on, and their likelihoods differ; their times are not comparable"
            )


def run_case(case: Case, settings: Settings, peak: float) -> list[Row]:
    """Compare, compile and time one case."""
    model, variables = create(case)
    prompts = dataclasses.replace(case, length=PROMPT)
    batch = make_batch(prompts)
    # Without a mask, transformers would take the tokens that are its padding token for padding.
    batch["attention_mask"] = np.ones(batch["input_ids"].shape, np.int32)

    def generate() -> np.ndarray:
        out = fmjax.generate(model, variables, **inputs_of(batch), max_new_tokens=case.length)
        return out.sequences

    with compile_events() as first:
        text = generate()
    thunks: dict[str, Any] = {"fmjax": generate}
    others = peers_of(
        prompts, model, variables, batch, torch=settings.peer, flax_python=settings.flax_python
    )
    with others as peers:
        differences = compare(prompts, model, variables, batch, peers)
        for side, peer in peers.items():
            check_same_text(model, variables, case, text, side, peer.generate(case.length))
            thunks[side] = partial(peer.generate, case.length)
        with compile_events() as later:
            timings = time_alternately(thunks, repeats=settings.repeats)
    if later.compilations:
        raise ValueError(f"{case.name}: {later.compilations} compilations while it was timed")
    bandwidth = measure_matvec_bandwidth(size=256 if settings.smoke else 4096)
    read = weight_bytes(variables) * case.length
    flops = model_flops(model, variables, case)
    rows = []
    for side, timing in timings.items():
        entry = make_row(
            timing,
            case=case.name,
            side=side,
            dtype=case.dtype,
            batch_size=case.batch_size,
            length=case.length,
            model_flops=flops,
            matmul_peak=peak,
            compiled=None,
            max_difference=difference_of(side, differences),
        )
        rate = read / timing.median
        rows.append(
            dataclasses.replace(
                entry,
                compile_seconds=first.seconds if side == "fmjax" else None,
                weight_bytes_per_second=rate,
                bandwidth_share=rate / bandwidth,
            )
        )
    return rows


if __name__ == "__main__":
    run("generate", CASES, tyro.cli(Settings, description=__doc__), run_case)
