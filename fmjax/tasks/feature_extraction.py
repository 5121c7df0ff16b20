"""Feature extraction: one vector for each text or picture from a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array

from fmjax.nn.norm import unit_length
from fmjax.tasks.apply import apply_fn
from fmjax.types import Batch, Output, Variables

POOLINGS = ("mean", "cls", "max", "pooler")


class Encode(Protocol):
    """(variables, batch, rng | None, train=...) -> (vectors [B, D] float32, new values of mutable
    collections)."""

    def __call__(
        self, variables: Variables, batch: Batch, rng: Array | None, *, train: bool
    ) -> tuple[Array, Variables]: ...


def encoder(model: Any, *, pooling: str = "mean", normalize: bool = False) -> Encode:
    """The pooled last hidden state, to be trained; see `embed` for the arguments."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; it must be one of {POOLINGS}")
    apply = apply_fn(model)

    def encode(
        variables: Variables, batch: Batch, rng: Array | None, *, train: bool
    ) -> tuple[Array, Variables]:
        output, updates = apply(variables, batch, rng, train=train)
        hidden = output.last_hidden_state
        if hidden is None:
            raise ValueError(
                f"the model has the head {model.head!r}, which returns no last_hidden_state; load "
                'it with head="model"'
            )
        if pooling != "pooler":
            vectors = pool(hidden, states_mask(output, batch), pooling)
        elif output.pooler_output is not None:
            vectors = output.pooler_output.astype(jnp.float32)
        else:
            raise ValueError('this model has no pooler; use pooling="mean"')
        if normalize:
            vectors = unit_length(vectors)
        return vectors, updates

    return encode


def states_mask(output: Output, inputs: Batch) -> Any:
    """[B, T], 0 for states of padding: what the model says, which has other lengths inside than its
    inputs (of sounds, and of words with regions), else the inputs' mask; None keeps all."""
    return inputs.get("attention_mask") if output.state_mask is None else output.state_mask


def pool(hidden: Array, mask: Any, pooling: str) -> Array:
    """One vector a row of hidden states [B, T, D] or [B, X, Y, D]: [B, D] float32.

    Args:
        hidden: of pictures, T are patches, or the places of a grid, and all are kept.
        mask: [B, T], 0 for padding; None keeps all.
        pooling: "mean", "cls" or "max"; see `embed`.

    Raises:
        ValueError: a mask that is not one of these states.
    """
    hidden = hidden.astype(jnp.float32).reshape(hidden.shape[0], -1, hidden.shape[-1])
    if mask is not None and mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"the mask has the shape {mask.shape} and the states are {hidden.shape[:2]}: states of "
            "this layer have no mask"
        )
    if pooling == "cls":
        return hidden[:, 0]
    keep = jnp.ones(hidden.shape[:2], bool) if mask is None else jnp.asarray(mask).astype(bool)
    keep = keep[..., None]  # [B, T, 1]
    if pooling == "max":
        return jnp.where(keep, hidden, -jnp.inf).max(axis=1)
    return jnp.where(keep, hidden, 0.0).sum(axis=1) / jnp.maximum(keep.sum(axis=1), 1)


def embed(
    model: Any, *, pooling: str = "mean", normalize: bool = False
) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, D]`` float32: the pooled last hidden state.

    Args:
        model: with the head ``model``.
        pooling: "mean" over tokens that are not padding (Reimers & Gurevych 2019,
            arXiv:1908.10084), "max" over them, "cls" (the first token), or "pooler" (the model's
            own pooled output).
        normalize: whether vectors are scaled to length 1.

    Raises:
        ValueError: an unknown pooling, or "pooler" of a model that has none.
    """
    encode = encoder(model, pooling=pooling, normalize=normalize)
    return lambda variables, batch: encode(variables, batch, None, train=False)[0]
