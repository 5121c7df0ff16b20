"""Embedding tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import PartitionSpec as P

from fmjax.nn.compact import Compact, rows
from fmjax.nn.parameter import kept
from fmjax.nn.placement import constrain
from fmjax.nn.product import matmul


def token_shape(ids: Array | None, embeds: Array | None, prefix: str = "") -> tuple[int, ...]:
    """The shape of the tokens a model was given, as ids [B, T] or as their vectors [B, T, D].

    Args:
        ids, embeds: exactly one of them.
        prefix: what the arguments' names start with, such as "decoder_".

    Raises:
        ValueError: both are given, or neither.
    """
    if ids is not None and embeds is None:
        return ids.shape
    if embeds is not None and ids is None:
        return embeds.shape[:-1]
    raise ValueError(f"give exactly one of {prefix}input_ids and {prefix}inputs_embeds")


FEW = 64
"""Rows of a table up to which an accelerator compares ids with all of them."""


def look_up(table: Array, ids: Array) -> Array:
    """Rows [..., D] of a table [V, D] by their numbers, in the table's dtype."""
    return jax.lax.platform_dependent(
        table, ids, cpu=partial(jnp.take, axis=0), default=_look_up_on_accelerators
    )


def _look_up_on_accelerators(table: Array, ids: Array) -> Array:
    """The same, for the sake of its gradient: a sum over the tokens that read a row.

    Thousands of threads that add to one of few rows wait for each other (measured on an H200:
    a table of 2 rows took more than half of BERT-large's step), and they can add to float32 only.
    """
    exact = table.astype(jnp.float32)
    if table.shape[0] <= FEW:
        vectors = jnp.zeros((*ids.shape, table.shape[1]))
        for i in range(table.shape[0]):
            vectors = jnp.where((ids == i)[..., None], exact[i], vectors)
    else:
        vectors = jnp.take(exact, ids, axis=0)
    return vectors.astype(table.dtype)


class Embed(nn.Module):
    """A table of vectors [V, D], looked up by integer or, tied, multiplied for logits.

    Where there is a collection "adapters", its ``prompt`` [P, D] here has the rows V, V + 1, ... of
    lookups; for logits there are none.

    Args:
        num_embeddings: V.
        features: D.
        embedding_init: initializer of the table.
        padding_index: a row that starts at zero and that lookups do not train, as PyTorch's
            ``padding_idx``; below 0 it counts from the last; None for none.
    """

    num_embeddings: int
    features: int
    embedding_init: Callable[..., Array] = nn.initializers.normal(0.02)
    padding_index: int | None = None

    def setup(self) -> None:
        self.embedding = kept(self, "embedding", self._init, (self.num_embeddings, self.features))

    def _init(self, rng: Array, shape: tuple[int, ...]) -> Array:
        table = self.embedding_init(rng, shape, jnp.float32)
        return table if self.padding_index is None else table.at[self.padding_index].set(0.0)

    def __call__(self, ids: Array) -> Array:  # [...] -> [..., D]
        if isinstance(self.embedding, Compact):
            vectors = rows(self.embedding, ids)
        else:
            # Of words that are divided each device looks up its own; their features must not be.
            vectors = look_up(constrain(self.embedding, P.UNCONSTRAINED, None), ids)
        if self.has_variable("adapters", "prompt"):
            prompt = self.get_variable("adapters", "prompt").astype(vectors.dtype)
            own = ids - self.num_embeddings
            virtual = own >= 0
            row = jnp.take(prompt, jnp.where(virtual, own, 0), axis=0)
            vectors = jnp.where(virtual[..., None], row, vectors)
        if self.padding_index is None:
            return vectors
        padding = (ids == self.padding_index % self.num_embeddings)[..., None]
        return jnp.where(padding, jax.lax.stop_gradient(vectors), vectors)

    def attend(self, x: Array) -> Array:  # [..., D] -> [..., V] float32
        return matmul(x, self.embedding, transposed=True)


@contextlib.contextmanager
def moved_vectors(table: str, ids: Array, move: Array) -> Iterator[list[str]]:
    """Models that are run within it have a move added to the vectors of these ids.

    Args:
        table: path of an `Embed`'s table, as "params/embed/word/embedding".
        ids: [...]; this very array, so that what else is looked up in the table does not move.
        move: [..., D], differentiable.

    Yields:
        The modules whose vectors have moved so far, to which they are added.
    """
    places: list[str] = []

    def look_up(lookup: Callable[..., Any], args: Any, options: Any, context: Any) -> Any:
        found = lookup(*args, **options)
        place = "/".join(context.module.path)
        called = isinstance(context.module, Embed) and context.method_name == "__call__"
        if not called or f"params/{place}/embedding" != table or args[0] is not ids:
            return found
        places.append(place)
        return found + move.astype(found.dtype)

    with nn.intercept_methods(look_up):
        yield places
