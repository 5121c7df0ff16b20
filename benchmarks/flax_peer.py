"""Hugging Face's own Flax classes as the peer, in an environment that still has them.

`peer.FlaxPeer` runs this by another Python, which has transformers 4.57.6, the last with Flax
classes, JAX and Flax. It is as quick as their users make it: every call is compiled, train steps
donate their state, and `dtype` is the classes' own.

    python3.11 -m venv hf-flax
    hf-flax/bin/pip install transformers==4.57.6 jax flax
    python benchmarks/train_step.py --flax-python hf-flax/bin/python
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np


class Flax:
    """A case by a Flax class of transformers; the methods are `peer.Peer`'s."""

    def __init__(
        self,
        folder: str,
        *,
        model_class: str,
        dtype: str,
        batch: dict[str, np.ndarray],
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        import jax
        import optax
        import transformers

        chosen = getattr(transformers, f"Flax{model_class}", None)
        if chosen is None:
            raise ValueError(
                f"transformers {transformers.__version__} of {sys.executable} has no "
                f"Flax{model_class}; install transformers==4.57.6 with JAX and Flax there"
            )
        self._model = chosen.from_pretrained(folder, from_pt=True, dtype=dtype)
        if "pixel_values" in batch:
            batch = {**batch, "pixel_values": np.moveaxis(batch["pixel_values"], -1, 1)}
        self._batch = jax.device_put(batch)
        self._inputs = {name: value for name, value in self._batch.items() if name != "labels"}
        self._params = jax.device_put(self._model.params)
        self._key = jax.random.key(0)
        self._optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)
        self._state: tuple[Any, Any] | None = None
        self._shifted = model_class.endswith("LMHeadModel") or model_class.endswith("CausalLM")
        self._apply = jax.jit(lambda params, inputs: self._model(**inputs, params=params)[0])
        self._step = jax.jit(self._train_step, donate_argnums=(0, 1))
        self._texts: dict[int, Callable[..., Any]] = {}

    def _loss(self, trained: Any, rest: Any, batch: dict[str, Any], key: Any) -> Any:
        """Cross-entropy (nats), and what the model keeps besides its parameters."""
        import jax.numpy as jnp
        import optax

        inputs = {name: value for name, value in batch.items() if name != "labels"}
        params = {**rest, "params": trained} if rest else trained
        if rest:  # statistics of a batch normalisation; these classes drop nothing
            output, rest = self._model(**inputs, params=params, train=True)
        else:
            output = self._model(**inputs, params=params, dropout_rng=key, train=True)
        logits, labels = output[0], batch["labels"]
        if self._shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        return losses.mean(), rest

    def _train_step(self, params: Any, moments: Any, batch: dict[str, Any], key: Any) -> Any:
        import jax
        import optax

        trained = _trained(params)
        rest = {"batch_stats": params["batch_stats"]} if "batch_stats" in params else {}
        differentiate: Any = jax.grad(self._loss, has_aux=True)
        gradient, rest = differentiate(trained, rest, batch, key)
        updates, moments = self._optimizer.update(gradient, moments, trained)
        trained = optax.apply_updates(trained, updates)
        return ({**rest, "params": trained} if rest else trained), moments

    def logits(self, rows: int) -> np.ndarray:
        few = {name: value[:rows] for name, value in self._inputs.items()}
        return np.asarray(self._apply(self._params, few), np.float32)

    def forward(self) -> None:
        self._apply(self._params, self._inputs).block_until_ready()

    def train_steps(self, count: int) -> None:
        import jax

        if self._state is None:
            params = jax.tree.map(lambda leaf: leaf.copy(), self._params)
            self._state = params, self._optimizer.init(_trained(params))
        params, moments = self._state
        for _ in range(count):
            self._key, key = jax.random.split(self._key)
            params, moments = self._step(params, moments, self._batch, key)
        self._state = jax.block_until_ready((params, moments))

    def generate(self, max_new_tokens: int) -> np.ndarray:
        import jax

        if max_new_tokens not in self._texts:  # compiled by hand: it compiles every call anew
            search = partial(
                self._model.generate,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            self._texts[max_new_tokens] = jax.jit(
                lambda params, inputs: search(**inputs, params=params).sequences
            )
        return np.asarray(self._texts[max_new_tokens](self._params, self._inputs))

    def free(self) -> None:
        """Nothing is held besides what is used."""

    def peak_bytes(self) -> int | None:
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _trained(params: Any) -> Any:
    """What a class trains of its `params`, which may have statistics beside."""
    return params["params"] if "batch_stats" in params else params


def main() -> None:
    """Answers, over the connection whose number is the argument, until its other end closes."""
    connection = Connection(int(sys.argv[1]))
    peer = Flax(**connection.recv())
    while True:
        try:
            what, *args = connection.recv()
        except EOFError:
            return
        connection.send(getattr(peer, what)(*args))


if __name__ == "__main__":
    main()
