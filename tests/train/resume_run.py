"""A small but complete run, to be killed: ``python resume_run.py FOLDER [DEATH]``.

DEATH says how this life of the run ends: ``before-save:20``, ``after-save:30``, ``evaluating:36``,
``saving:40:0.01`` (that many seconds after the save of step 40 began), ``sigterm:44``.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmjax.train import (
    gradient,
    init_state,
    jit_step,
    make_eval_step,
    make_train_step,
    track_ema,
    warmup_linear,
)
from fmjax.train.checkpoint import Checkpoints, saving
from fmjax.train.loop import Event, Memory, evaluation, fit
from fmjax.train.recording import Recorder, progress, recording
from fmjax.train.signals import stop_signals
from fmjax.types import Aux, Mean

STEPS, ROWS, BATCH, WIDTH = 66, 60, 8, 256
TX = optax.chain(optax.adamw(warmup_linear(0.02, steps=STEPS, warmup=6)), track_ema(0.9))


class Stream:
    """Shuffled batches for ever; the last of an epoch is padded with rows of index -1."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.inputs = rng.normal(size=(ROWS, 16)).astype(np.float32)
        # Labels that only memory can fit, so that the validation loss soon rises.
        self.labels = rng.integers(0, 2, ROWS).astype(np.int32)
        self.position = 0
        self.sigterm_at = -1

    def __next__(self) -> dict[str, np.ndarray]:
        if self.position + 1 == self.sigterm_at:
            os.kill(os.getpid(), signal.SIGTERM)
        epoch, batch = divmod(self.position, -(-ROWS // BATCH))
        order = np.random.default_rng([1, epoch]).permutation(ROWS)
        rows = order[batch * BATCH : (batch + 1) * BATCH]
        index = np.full(BATCH, -1, np.int32)
        index[: len(rows)] = rows
        self.position += 1
        return {
            "inputs": self.inputs[index],
            "labels": self.labels[index],
            "weight": (index >= 0).astype(np.float32),
            "attention_mask": np.arange(16)[None, :] < 3 + index[:, None] % 5,
            "index": index,
        }

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def loss_fn(variables, batch, rng):
    """A two-layer network with dropout (where there is a key), and running input statistics."""
    params, stats = variables["params"], variables["batch_stats"]
    hidden = jax.nn.relu((batch["inputs"] - stats["mean"]) @ params["up"])
    if rng is not None:
        hidden = hidden * jax.random.bernoulli(rng, 0.8, hidden.shape) / 0.8
    logits = hidden @ params["mix"] @ params["down"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    loss = Mean.of(losses, batch["weight"])
    accuracy = Mean.of(logits.argmax(-1) == batch["labels"], batch["weight"])
    mean = 0.9 * stats["mean"] + 0.1 * batch["inputs"].mean(0)
    return loss.value, Aux(loss.weight, {"accuracy": accuracy}, {"batch_stats": {"mean": mean}})


def init():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"up": (16, WIDTH), "mix": (WIDTH, WIDTH), "down": (WIDTH, 2)}
    params = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    variables = {"params": params, "batch_stats": {"mean": jnp.zeros(16)}}
    return init_state(variables, TX, jax.random.key(7))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, death: str = "never:0") -> None:
    kind, when, *rest = death.split(":")
    stream, evaluate_step = Stream(), jax.jit(make_eval_step(loss_fn))
    if kind == "sigterm":
        stream.sigterm_at = int(when)
    held_out = next(Stream())

    def evaluate(state):
        if kind == "evaluating" and int(state.step) == int(when):
            die()
        # Noise of which the held-out labels are made: what is learned does not carry over.
        batch = {**held_out, "labels": 1 - held_out["labels"]}
        return {name: float(mean.value) for name, mean in evaluate_step(state, batch).items()}

    with Checkpoints(folder / "checkpoints", settings={"steps": STEPS}) as checkpoints:
        restored = checkpoints.restore_last(jax.eval_shape(init))
        if restored is None:
            state, memory = init(), Memory()
        else:
            state, memory = restored.state, restored.memory
            stream.set_state(restored.data)
        print("start", int(state.step), flush=True)
        save = saving(checkpoints, stream.get_state, memory)

        def save_and_maybe_die(event: Event) -> None:
            mine = event.step == int(when)
            if mine and kind == "before-save":
                die()
            if mine and kind == "saving":
                checkpoints.wait()  # for the one before: it is in this one that we want to die
                threading.Thread(target=lambda: (time.sleep(float(rest[0])), die())).start()
            save(event)
            if mine and kind == "after-save":
                die()

        with (
            Recorder(folder, step=int(state.step)) as recorder,
            progress(STEPS, memory) as show,
            stop_signals() as should_stop,
        ):
            step = jit_step(make_train_step(gradient(loss_fn), TX))
            schedule = warmup_linear(0.02, steps=STEPS, warmup=6)
            hooks = [
                (7, recording(recorder, schedule)),
                (7, show),
                (6, evaluation(evaluate, memory, record=recorder.write, save=save, patience=7)),
                (10, save_and_maybe_die),
            ]
            state = fit(
                state, step, stream, steps=STEPS, hooks=hooks, memory=memory,
                should_stop=should_stop,
            )  # fmt: skip
        checkpoints.save(state, stream.get_state(), memory)
    print("end", int(state.step), json.dumps(dataclasses.asdict(memory)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
