"""Masked autoencoding: pixels of patches that the encoder did not see (He et al. 2021,
arXiv:2111.06377).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.nn.vision import grid_of, pair, patchify, unpatchify
from fmjax.tasks.apply import apply_fn, means, once, row_weights
from fmjax.types import Aux, Batch, LossFn, Mean, Variables


def draw_noise(model: Any, rng: Array, pixel_values: Any) -> Array:
    """Uniform numbers [B, N] by which the model masks patches."""
    rows, columns = grid_of(pixel_values.shape[1:3], pair(model.config.patch_size))
    return jax.random.uniform(rng, (pixel_values.shape[0], rows * columns))


def targets(model: Any, pixel_values: Array) -> Array:
    """What the decoder is to say of each patch: [B, N, P * Q * C].

    With ``norm_pix_loss``, less the patch's mean and divided by its standard deviation (section
    4.1, "Reconstruction target").
    """
    patches = patchify(pixel_values.astype(jnp.float32), pair(model.config.patch_size))
    if not model.config.norm_pix_loss:
        return patches
    mean = patches.mean(axis=-1, keepdims=True)
    variance = patches.var(axis=-1, ddof=1, keepdims=True)
    return (patches - mean) / jnp.sqrt(variance + 1e-6)


def loss(model: Any, *, train: bool = True) -> LossFn:
    """The mean squared error of masked patches' pixels, averaged over them.

    Batches have ``pixel_values`` float [B, X, Y, C], perhaps ``weight`` float [B], 0 for padding
    rows, and perhaps ``noise`` [B, N]; without it the call's key draws which patches are masked.

    Args:
        model: a ViT-MAE with the head ``pretraining``.
        train: whether dropout is on.
    """
    apply = apply_fn(model)

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        pixels = jnp.asarray(batch["pixel_values"])
        if "noise" not in batch:
            if rng is None:
                raise ValueError("which patches are masked is random: give a key, or noise")
            rng, key = jax.random.split(rng)
            batch = {**batch, "noise": draw_noise(model, key, pixels)}
        output, updates = apply(variables, batch, rng, train=train)
        assert output.logits is not None
        assert output.mask is not None
        errors = jnp.square(output.logits - targets(model, pixels)).mean(axis=-1)  # [B, N]
        weights = output.mask * row_weights(batch, len(pixels))[:, None]
        mean = Mean.of(errors, weights)
        return mean.value, Aux(mean.weight, {}, updates)

    return loss_fn


def reconstruct(model: Any) -> Callable[[Variables, Batch], tuple[Array, Array]]:
    """``(variables, batch with noise) -> (images, seen)``, both [B, X, Y, C].

    The images have the seen patches as they are and the others as the decoder says, from the mean
    and deviation of the true patch where the model knows normalised pixels only; ``seen`` has the
    others gray. Pixels past the last whole patch are left out.
    """
    apply = apply_fn(model)

    def reconstruct_fn(variables: Variables, batch: Batch) -> tuple[Array, Array]:
        output, _ = apply(variables, batch, None, train=False)
        assert output.logits is not None
        assert output.mask is not None
        pixels = jnp.asarray(batch["pixel_values"]).astype(jnp.float32)
        patch = pair(model.config.patch_size)
        patches, said = patchify(pixels, patch), output.logits
        if model.config.norm_pix_loss:
            spread = jnp.sqrt(patches.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
            said = said * spread + patches.mean(axis=-1, keepdims=True)
        grid = grid_of((pixels.shape[1], pixels.shape[2]), patch)
        hidden = output.mask[..., None] > 0
        images = unpatchify(jnp.where(hidden, said, patches), grid, patch)
        return images, unpatchify(jnp.where(hidden, 0.0, patches), grid, patch)

    return reconstruct_fn


def evaluate(
    model: Any, variables: Variables, batches: Iterable[Batch], seed: int = 0
) -> dict[str, float]:
    """The loss over a whole set, each batch masked by the same numbers in every evaluation.

    Args:
        model: a ViT-MAE with the head ``pretraining``.
        variables: its variables.
        batches: one epoch, with ``pixel_values`` and ``weight``.
        seed: of the masks.
    """

    def masked() -> Iterable[Batch]:
        for number, batch in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(seed), number)
            yield {**batch, "noise": draw_noise(model, key, batch["pixel_values"])}

    totals = means(once(loss, model, train=False), variables, masked())
    return {name: total.value for name, total in totals.items()}
