"""How fast is a train step, next to PyTorch sdpa in the same run?

    python benchmarks/train_step.py                       about 11 minutes on 2 cores
    python benchmarks/train_step.py --cases base-mlm-float32 --repeats 9
    python benchmarks/train_step.py --smoke               a tiny model, seconds

BERT-base masked language modelling (8 x 128 tokens, every position labelled on both sides), GPT-2
small causal language modelling (4 x 256 tokens) and fine-tuning a MiniLM-sized classifier (6
layers, width 384, 32 x 64 tokens). AdamW, dropout 0.1, float32 master weights; bfloat16 is
`cast(loss, bfloat16)` here and autocast there. PyTorch's AdamW is `torch.optim.AdamW` with its
defaults. Run it on an idle machine: other load slows the two sides unequally.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
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
    start_peer,
    torch_is_there,
)
from record import Row
from run import Settings, rows_of, run

from fmjax.models import gpt2
from fmjax.perf.flops import count_flops
from fmjax.perf.timing import compile_time, time_alternately
from fmjax.tasks import causal_lm, sequence_classification
from fmjax.tasks.apply import apply_fn
from fmjax.train import cast, gradient, init_state, jit_step, make_train_step
from fmjax.types import Aux, Batch, LossFn, TrainState, Variables

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01

CASES = (
    *(
        Case(f"{name}-{dtype}", config, head, batch_size, length, dtype)
        for name, config, head, batch_size, length in (
            ("base-mlm", BASE, "masked_lm", 8, 128),
            ("minilm-classification", MINILM, "sequence_classification", 32, 64),
        )
        for dtype in ("float32", "bfloat16")
    ),
    # In float32 alone: on a CPU the gradient of PyTorch's Conv1D in bfloat16 goes through a plain
    # loop, minutes a step, which says nothing about either side.
    Case("gpt2-clm-float32", gpt2.VARIANTS["base"], "causal_lm", 4, 256, "float32"),
)


def masked_lm_loss(model: Any) -> LossFn:
    """Cross-entropy (nats) over all positions, as the peer computes it."""
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: jax.Array | None):
        output, updates = apply(variables, batch, rng, train=True)
        assert output.logits is not None
        losses = optax.softmax_cross_entropy_with_integer_labels(output.logits, batch["labels"])
        return losses.mean(), Aux(jnp.float32(losses.size), {}, updates)

    return loss_fn


def loss_of(case: Case, model: Any) -> LossFn:
    """The case's loss, in its precision."""
    losses = {
        "masked_lm": masked_lm_loss,
        "causal_lm": causal_lm.loss,
        "sequence_classification": sequence_classification.loss,
        "image_classification": sequence_classification.loss,
    }
    loss_fn = losses[case.head](model)
    return loss_fn if case.dtype == "float32" else cast(loss_fn, jnp.dtype(case.dtype))


def stepper(
    step: Callable[[TrainState, Batch], tuple[TrainState, Any]], state: TrainState, batch: Batch
) -> Callable[[], None]:
    """A thunk that takes one step and keeps the state, whose buffers each step donates."""

    def thunk() -> None:
        nonlocal state
        state, _ = step(state, batch)
        jax.block_until_ready(state)

    return thunk


def run_case(case: Case, settings: Settings, peak: float) -> list[Row]:
    """Compare, compile and time one case."""
    model, variables = create(case)
    batch = make_batch(case)
    difference, peer = None, None
    if settings.peer and torch_is_there():
        peer = start_peer(
            case,
            model,
            variables,
            batch,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
        )
        difference = compare(case, model, variables, batch, peer)
    tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    grad_fn = gradient(loss_of(case, model))
    state = init_state(variables, tx, jax.random.key(0))
    device_batch = jax.device_put({**batch, "weight": jnp.ones(case.batch_size)})
    flops = count_flops(
        grad_fn, state.trainable, state.non_trainable, device_batch, state.rng
    ).total
    step = cast_type(jax.stages.Wrapped, jit_step(make_train_step(grad_fn, tx)))
    compiled = compile_time(step, state, device_batch)
    thunks = {"fmjax": stepper(compiled.call, state, device_batch)}
    with contextlib.nullcontext() if peer is None else peer:
        if peer is not None:
            thunks["torch"] = peer.train_step
        timings = time_alternately(thunks, repeats=settings.repeats)
    return rows_of(
        case,
        timings,
        compiled=compiled,
        model_flops=flops,
        matmul_peak=peak,
        max_difference=difference,
    )


if __name__ == "__main__":
    run("train_step", CASES, tyro.cli(Settings, description=__doc__), run_case)
