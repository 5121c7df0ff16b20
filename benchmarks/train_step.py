"""How fast is a train step, next to PyTorch sdpa in the same run?

    python benchmarks/train_step.py                       about 13 minutes on 2 cores
    python benchmarks/train_step.py --cases base-mlm-float32 --repeats 9
    python benchmarks/train_step.py --smoke               a tiny model, seconds

BERT-base masked language modelling (8 x 128 tokens, every position labelled on both sides), GPT-2
small causal language modelling (4 x 256 tokens) and fine-tuning a MiniLM-sized classifier (6
layers, width 384, 32 x 64 tokens). AdamW, dropout 0.1, float32 master weights; bfloat16 is
`cast(loss, bfloat16)` here and autocast there. PyTorch's AdamW is `torch.optim.AdamW` with its
defaults. On some CPUs the gradient of its Conv1D in bfloat16 goes through a plain loop, minutes a
step: leave "gpt2-clm-bfloat16" out there. Run it on an idle machine: other load slows the two
sides unequally.

The case "minilm-ways-float32" has the same step in other ways beside: by jit over a mesh of all
devices ("mesh") and by pmap over them, both dividing the batch, and accumulated over 4 pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any
from typing import cast as cast_type

import jax
import jax.numpy as jnp
import optax
import tyro
from cases import (
    BASE,
    MINILM,
    Case,
    compare,
    create,
    make_batch,
    peers_of,
)
from record import Row
from run import Settings, rows_of, run, turn

from fmjax.models import gpt2
from fmjax.perf.energy import joules_per_call
from fmjax.perf.flops import count_flops
from fmjax.perf.timing import compile_time, peak_memory_bytes, time_alternately
from fmjax.tasks import causal_lm, seq2seq, sequence_classification
from fmjax.tasks.apply import apply_fn
from fmjax.tasks.vocabulary_loss import unembed_fn, vocabulary_loss
from fmjax.train import (
    accumulate,
    cast,
    gradient,
    init_state,
    jit_step,
    make_mesh,
    make_train_step,
    pmap_step,
)
from fmjax.types import Aux, Batch, GradFn, LossFn, StepFn, TrainState, Variables

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
STEPS_BETWEEN_WAITS = 5
PIECES = 4

CASES = (
    *(
        Case(f"{name}-{dtype}", config, head, batch_size, length, dtype)
        for name, config, head, batch_size, length in (
            ("base-mlm", BASE, "masked_lm", 8, 128),
            ("minilm-classification", MINILM, "sequence_classification", 32, 64),
            ("gpt2-clm", gpt2.VARIANTS["base"], "causal_lm", 4, 256),
        )
        for dtype in ("float32", "bfloat16")
    ),
    Case("minilm-ways-float32", MINILM, "sequence_classification", 32, 64, "float32", ways=True),
)


def masked_lm_loss(model: Any, *, chunk_size: int) -> LossFn:
    """Cross-entropy (nats) over all positions, as the peer computes it."""
    apply = apply_fn(model, output_logits=False)

    def loss_fn(variables: Variables, batch: Batch, rng: jax.Array | None):
        output, updates = apply(variables, batch, rng, train=True)
        assert output.last_hidden_state is not None
        found = vocabulary_loss(
            unembed_fn(model, variables),
            output.last_hidden_state,
            jnp.asarray(batch["labels"]),
            jnp.ones(batch["labels"].shape),
            chunk_size=chunk_size,
        )
        return found.loss.value, Aux(found.loss.weight, {}, updates)

    return loss_fn


def loss_of(case: Case, model: Any) -> LossFn:
    """The case's loss, in its precision."""
    losses = {
        "masked_lm": partial(masked_lm_loss, chunk_size=case.chunk_size),
        "causal_lm": partial(causal_lm.loss, chunk_size=case.chunk_size),
        "seq2seq_lm": partial(seq2seq.loss, chunk_size=case.chunk_size),
        "sequence_classification": sequence_classification.loss,
        "image_classification": sequence_classification.loss,
    }
    loss_fn = losses[case.head](model)
    return loss_fn if case.dtype == "float32" else cast(loss_fn, jnp.dtype(case.dtype))


def other_ways(grad_fn: GradFn, tx: optax.GradientTransformation) -> dict[str, StepFn]:
    """The same step, compiled otherwise than by jit for one device."""
    step = make_train_step(grad_fn, tx)
    return {
        "mesh": jit_step(step, make_mesh(data=jax.device_count())),
        "pmap": pmap_step(grad_fn, tx),
        f"accumulate-{PIECES}": jit_step(make_train_step(accumulate(grad_fn, PIECES), tx)),
    }


def stepper(
    step: Callable[[TrainState, Batch], tuple[TrainState, Any]],
    state: TrainState,
    batch: Batch,
    steps: int,
) -> Callable[[], None]:
    """A thunk that takes steps and then waits; it keeps the state, whose buffers each donates."""

    def thunk() -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = step(state, batch)
        jax.block_until_ready(state)

    return thunk


def run_case(case: Case, settings: Settings, peak: float) -> list[Row]:
    """Compare, compile and time one case."""
    on_cpu = jax.default_backend() == "cpu"
    # An accelerator is given its next step while it takes this one, as in training.
    steps = 1 if on_cpu else STEPS_BETWEEN_WAITS
    with contextlib.ExitStack() as stack:
        with turn(settings.wait_for, alone=False):
            model, variables = create(case)
            batch = make_batch(case)
            peers = stack.enter_context(
                peers_of(
                    case, model, variables, batch,
                    torch=settings.peer, flax_python=settings.flax_python,
                    learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
                )
            )  # fmt: skip
            differences = compare(case, model, variables, batch, peers)
            if not on_cpu:
                for peer in peers.values():
                    peer.warm_up()
            tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
            grad_fn = gradient(loss_of(case, model))
            state = init_state(variables, tx, jax.random.key(0))
            device_batch = jax.device_put({**batch, "weight": jnp.ones(case.batch_size)})
            flops = count_flops(
                grad_fn, state.trainable, state.non_trainable, device_batch, state.rng
            ).total
            step = cast_type(jax.stages.Wrapped, jit_step(make_train_step(grad_fn, tx)))
            compiled = compile_time(step, state, device_batch)
            all_compiled = {"fmjax": compiled}
            thunks = {}
            if case.ways:
                for way, other in other_ways(grad_fn, tx).items():
                    # None has run yet, so the buffers are still there to be copied.
                    own = init_state(jax.tree.map(jnp.copy, variables), tx, jax.random.key(0))
                    call: Any = other
                    if way.startswith("accumulate"):
                        all_compiled[way] = compile_time(call, own, device_batch)
                        call = all_compiled[way].call
                    thunks[way] = stepper(call, own, device_batch, steps)
            thunks = {"fmjax": stepper(compiled.call, state, device_batch, steps), **thunks}
            for side, peer in peers.items():
                thunks[side] = partial(peer.train_steps, steps)
                peer.wait()
        with turn(settings.wait_for, alone=True):
            timings = time_alternately(thunks, repeats=settings.repeats)
            joules = {side: joules_per_call(thunk) for side, thunk in thunks.items()}
            if settings.profile is not None:
                with jax.profiler.trace(str(settings.profile / case.name)):
                    thunks["fmjax"]()
            peaks = {"fmjax": peak_memory_bytes().device}
            peaks |= {side: peer.peak_bytes() for side, peer in peers.items()}
    return rows_of(
        case,
        {side: timing.of_each(steps) for side, timing in timings.items()},
        compiled=all_compiled,
        model_flops=flops,
        matmul_peak=peak,
        differences=differences,
        peak_bytes=peaks,
        joules={side: energy and energy / steps for side, energy in joules.items()},
    )


if __name__ == "__main__":
    run("train_step", CASES, tyro.cli(Settings, description=__doc__), run_case)
