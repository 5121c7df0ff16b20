"""Texts seen otherwise, on the device: functions ``(rng, batch) -> batch``, as those of
`fmjax.data.augment` are of pictures. Labels stay what they were."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.data.augment import BatchFn, check_share
from fmjax.tasks.masking import Masking, mask_tokens
from fmjax.types import Batch


def masked_view(masking: Masking) -> BatchFn:
    """A share of each text's tokens masked, as for masked language modelling.

    Args:
        masking: which tokens, and what becomes of them.
    """

    def view(rng: Array, batch: Batch) -> Batch:
        return mask_tokens(rng, batch, masking).batch

    return view


def dropped_view(share: float, *, pad_id: int, special_ids: tuple[int, ...] = ()) -> BatchFn:
    """Each token left out with some chance, the others moved together (Wei & Zou 2019,
    arXiv:1901.11196, section 2: random deletion).

    The first token stays, so no text becomes empty. Whatever else the batch has [B, T] moves with
    the tokens; padding is on the right.

    Args:
        share: chance of each token.
        pad_id: the token id of padding.
        special_ids: tokens that stay.

    Raises:
        ValueError: a share that is no probability.
    """
    check_share("share", share)

    def view(rng: Array, batch: Batch) -> Batch:
        ids = jnp.asarray(batch["input_ids"])  # [B, T]
        real = jnp.asarray(batch.get("attention_mask", jnp.ones_like(ids))) != 0
        stays = real & (jnp.cumsum(real, axis=1) == 1)
        for special in special_ids:
            stays |= ids == special
        keep = real & (stays | (jax.random.uniform(rng, ids.shape) >= share))
        order = jnp.argsort(~keep, axis=1, stable=True)
        there = jnp.arange(ids.shape[1]) < keep.sum(axis=1, keepdims=True)
        moved = {
            name: jnp.take_along_axis(jnp.asarray(value), order, axis=1)
            for name, value in batch.items()
            if value.shape == ids.shape
        }
        moved["input_ids"] = jnp.where(there, moved["input_ids"], pad_id)
        return {**batch, **moved, "attention_mask": there.astype(jnp.int32)}

    return view
