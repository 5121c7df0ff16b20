"""PyTorch as the peer, in a process of its own.

In one process the two runtimes would slow each other: each keeps a pool of threads that spins for
a while after its work, and their allocators share the heap. Here the peer waits, without using the
processor, while fmjax runs, and the other way round; steps still alternate.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from multiprocessing.connection import Connection
from typing import Any

import numpy as np


class Peer:
    """A case in PyTorch with scaled dot-product attention, with the same weights and batch.

    Use it in a ``with`` statement, which ends the process.

    Args:
        folder: what `fmjax.save` wrote.
        family: transformers' model type.
        model_class: the name of its class.
        dtype: "float32", or "bfloat16" for autocast.
        device: "cpu" or "cuda".
        batch: inputs, and labels for a train step.
        learning_rate, weight_decay: of AdamW.
    """

    def __init__(
        self,
        folder: str,
        *,
        family: str,
        model_class: str,
        dtype: str,
        device: str,
        batch: dict[str, np.ndarray],
        learning_rate: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(
                far_end,
                folder,
                family,
                model_class,
                dtype,
                device,
                batch,
                learning_rate,
                weight_decay,
            ),
            daemon=True,
        )
        self._process.start()
        far_end.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()

    def _ask(self, *what: Any) -> Any:
        self._connection.send(what)
        return self._connection.recv()

    def logits(self) -> np.ndarray:
        """The logits (or the last hidden state of the bare model), without dropout."""
        return self._ask("logits")

    def forward(self) -> None:
        """One forward pass."""
        self._ask("forward")

    def train_step(self) -> None:
        """One AdamW step with dropout on."""
        self._ask("train_step")

    def generate(self, max_new_tokens: int) -> np.ndarray:
        """The tokens, prompt included, of greedy search that no token ends."""
        return self._ask("generate", max_new_tokens)


def _serve(
    connection: Connection,
    folder: str,
    family: str,
    model_class: str,
    dtype: str,
    device: str,
    batch: dict[str, np.ndarray],
    learning_rate: float,
    weight_decay: float,
) -> None:
    """The peer's process: answers until the other end closes."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("highest")
    classes = vars(importlib.import_module(f"transformers.models.{family}.modeling_{family}"))
    chosen = classes[model_class]
    attention = {"attn_implementation": "sdpa"} if chosen._supports_sdpa else {}
    model = chosen.from_pretrained(folder, **attention)
    model = model.to(device).eval()

    def tensor(value: np.ndarray) -> torch.Tensor:
        if value.dtype.kind == "f":  # pictures, channels last on our side
            return torch.from_numpy(value).movedim(-1, 1).contiguous().to(device)
        return torch.from_numpy(value).long().to(device)

    tensors = {name: tensor(value) for name, value in batch.items()}
    inputs = {name: value for name, value in tensors.items() if name != "labels"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    low = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16")

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def forward() -> Any:
        with torch.no_grad(), low:
            output = model(**inputs)[0]
        wait()
        return output

    def train_step() -> None:
        model.train()
        optimizer.zero_grad()
        with low:
            loss = model(**tensors).loss
        loss.backward()
        optimizer.step()
        wait()

    def generate(max_new_tokens: int) -> np.ndarray:
        with torch.no_grad(), low:
            tokens = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return tokens.cpu().numpy()

    while True:
        try:
            what, *args = connection.recv()
        except EOFError:
            return
        if what == "logits":
            connection.send(forward().float().cpu().numpy())
        elif what == "forward":
            forward()
            connection.send(None)
        elif what == "generate":
            connection.send(generate(*args))
        else:
            train_step()
            connection.send(None)
