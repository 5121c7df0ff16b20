"""PyTorch, and Hugging Face's Flax classes, as the peers: each in a process of its own.

In one process the two runtimes would slow each other: each keeps a pool of threads that spins for
a while after its work, and their allocators share the heap. Here the peer waits, without using the
processor, while fmjax runs, and the other way round; steps still alternate.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np


class Served:
    """A function in a process of its own that answers what it is asked, until a ``with`` statement
    ends.

    Args:
        serve: called there with a connection and the arguments.
        args: whatever can be pickled.
    """

    def __init__(self, serve: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        self._process = context.Process(target=serve, args=(far_end, *args), daemon=True)
        self._process.start()
        far_end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()

    def _ask(self, *what: Any) -> Any:
        try:
            self._connection.send(what)
            return self._connection.recv()
        except (EOFError, ConnectionError):
            raise ValueError(f"the peer ended before it answered {what[0]!r}: see above") from None


class Peer(Served):
    """A case with the same weights and batch, in PyTorch with scaled dot-product attention.

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
        self._begun = False
        super().__init__(
            _serve, folder, family, model_class, dtype, device, batch, learning_rate, weight_decay
        )

    def logits(self, rows: int) -> np.ndarray:
        """The logits (or the last hidden state of the bare model) of the first examples of the
        batch, without dropout."""
        return self._ask("logits", rows)

    def forward(self) -> None:
        """One forward pass."""
        self._ask("forward")

    def train_steps(self, count: int) -> None:
        """AdamW steps with dropout on, one after the other, and a wait for the last."""
        self._ask("train_steps", count)

    def warm_up(self) -> None:
        """Begins a train step, for which a GPU's peer compiles, and does not wait for it; `wait`
        does, before anything else is asked."""
        self._connection.send(("train_steps", 1))
        self._begun = True

    def wait(self) -> None:
        """Until what `warm_up` began is done, if it did, and its memory is free for others."""
        if self._begun:
            self._connection.recv()
            self._begun = False
            self._ask("free")

    def peak_bytes(self) -> int | None:
        """The most memory it has held on a GPU; None on a CPU."""
        return self._ask("peak_bytes")

    def generate(self, max_new_tokens: int) -> np.ndarray:
        """The tokens, prompt included, of greedy search that no token ends."""
        return self._ask("generate", max_new_tokens)


class FlaxPeer(Peer):
    """A case with the same weights and batch, by the Flax classes that transformers once had.

    Args:
        python: of an environment that has them; see `flax_peer.py`.
        folder, model_class, dtype, batch, learning_rate, weight_decay: as of `Peer`.
    """

    def __init__(self, python: Path, folder: str, **case: Any) -> None:
        self._begun = False
        Served.__init__(self, _become_flax, str(python))
        self._connection.send({"folder": folder, **case})


def _become_flax(connection: Connection, python: str) -> None:
    """This process goes on as another Python, which finds nothing of ours but the connection."""
    os.set_inheritable(connection.fileno(), True)
    script = str(Path(__file__).with_name("flax_peer.py"))
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [python, script, str(connection.fileno())]
    os.execve(python, command, {**environment, "USE_TORCH": "0", "USE_TF": "0"})


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
    """The peer's process: answers until the other end closes.

    On a GPU it is as quick as PyTorch's own tuning guide makes it: `torch.compile`, a fused
    optimizer, convolutions with channels last.
    """
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("highest")
    classes = vars(importlib.import_module(f"transformers.models.{family}.modeling_{family}"))
    chosen = classes[model_class]
    attention = {"attn_implementation": "sdpa"} if chosen._supports_sdpa else {}
    model = chosen.from_pretrained(folder, **attention)
    model = model.to(device).eval()
    on_gpu = device == "cuda"
    if on_gpu and "pixel_values" in batch:
        model = model.to(memory_format=torch.channels_last)
    trained = torch.compile(model) if on_gpu else model

    def tensor(value: np.ndarray) -> torch.Tensor:
        if value.dtype.kind == "f":  # pictures, channels last on our side
            value_first = torch.from_numpy(value).movedim(-1, 1)
            # As it lies in memory, channels are last.
            return (value_first if on_gpu else value_first.contiguous()).to(device)
        return torch.from_numpy(value).long().to(device)

    tensors = {name: tensor(value) for name, value in batch.items()}
    inputs = {name: value for name, value in tensors.items() if name != "labels"}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=on_gpu
    )
    low = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16")

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def forward(rows: int | None = None) -> Any:
        with torch.no_grad(), low:
            output = model(**{name: value[:rows] for name, value in inputs.items()})[0]
        wait()
        return output

    def train_steps(count: int) -> None:
        model.train()
        for _ in range(count):
            optimizer.zero_grad()
            with low:
                loss = trained(**tensors).loss
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
            connection.send(forward(*args).float().cpu().numpy())
        elif what == "free":
            torch.cuda.empty_cache()
            connection.send(None)
        elif what == "peak_bytes":
            connection.send(torch.cuda.max_memory_allocated() if on_gpu else None)
        elif what == "forward":
            forward()
            connection.send(None)
        elif what == "generate":
            connection.send(generate(*args))
        else:
            train_steps(*args)
            connection.send(None)
