"""Pictures as bytes into losses and predictions: normalised, and augmented, on the device.

Batches carry uint8 pixels, a quarter of the traffic of float32, and every function of a batch can
be given them: ``normalised(task.loss(model), mean, std)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.data.augment import BatchFn
from fmjax.types import Aux, Batch, LossFn, Variables

Function = TypeVar("Function", bound=Callable[..., Any])


def to_floats(pixel_values: Any) -> Array:
    """Bytes as float32 from 0 to 1; floats as they are.

    Raises:
        ValueError: other integers, of which nobody knows the largest.
    """
    pixels = jnp.asarray(pixel_values)
    if pixels.dtype == jnp.uint8:
        return pixels.astype(jnp.float32) / 255
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ValueError(f"pixels are {pixels.dtype}; they must be uint8, or floats from 0 to 1")
    return pixels


def normalised(function: Function, mean: Sequence[float], std: Sequence[float]) -> Function:
    """A loss or a prediction, ``(variables, batch, ...)``, of batches with pixels as they are.

    Where a batch has a ``pixel_mask``, 1 for the pixels of a picture, the others become 0.

    Args:
        function: expects ``pixel_values`` less the mean, divided by the standard deviation.
        mean, std: of pixels from 0 to 1, a number a channel, or one for all.

    Raises:
        ValueError: a standard deviation that is not positive.
    """
    if min(std) <= 0:
        raise ValueError(f"std is {std}; it must be positive")

    def of_pixels(variables: Variables, batch: Batch, *rest: Any) -> Any:
        pixels = (to_floats(batch["pixel_values"]) - jnp.array(mean)) / jnp.array(std)
        if "pixel_mask" in batch:
            pixels *= jnp.asarray(batch["pixel_mask"])[..., None]
        return function(variables, {**batch, "pixel_values": pixels}, *rest)

    return of_pixels  # pyright: ignore[reportReturnType]


def augmented(loss: LossFn, *functions: BatchFn) -> LossFn:
    """The loss of batches that have passed `functions`, each with a key of its own.

    Pixels are floats from 0 to 1 for the functions and the loss; see `fmjax.data.augment`.
    """

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        if rng is None:
            raise ValueError("an augmented loss draws random numbers: give it a key")
        batch = {**batch, "pixel_values": to_floats(batch["pixel_values"])}
        *keys, rng = jax.random.split(rng, len(functions) + 1)
        for key, function in zip(keys, functions, strict=True):
            batch = function(key, batch)
        return loss(variables, batch, rng)

    return loss_fn


View = Callable[[Array], Array]
"""Pictures [B, X, Y, C] seen otherwise, all views of a list in one size."""


def mirrored() -> list[View]:
    """Pictures as they are, and left for right."""
    return [lambda pixels: pixels, lambda pixels: pixels[:, :, ::-1]]


def ten_crops(rows: int, columns: int) -> list[View]:
    """The corners and the middle, and left for right (Krizhevsky et al. 2012, section 4.1).

    Args:
        rows, columns: of each part; a picture must have as many.
    """

    def crop(down: float, right: float) -> View:
        def view(pixels: Array) -> Array:
            spare = (pixels.shape[1] - rows, pixels.shape[2] - columns)
            if min(spare) < 0:
                raise ValueError(
                    f"pictures of {pixels.shape[1]} x {pixels.shape[2]} pixels have no part of "
                    f"{rows} x {columns}; crop less"
                )
            top, left = (
                int(share * side) for share, side in zip((down, right), spare, strict=True)
            )
            return pixels[:, top : top + rows, left : left + columns]

        return view

    parts = [crop(*place) for place in ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))]
    return [*parts, *(lambda pixels, part=part: part(pixels)[:, :, ::-1] for part in parts)]


def averaged(
    function: Callable[[Variables, Batch], Array], views: Sequence[View]
) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B, ...]``: the mean over views of the pictures.

    Of logits, ``predict(model, through=lambda logits: averaged(logits, mirrored()))``.

    Args:
        function: of the same kind; it is compiled once for all views.
        views: see `mirrored`, `ten_crops`.
    """

    def of_views(variables: Variables, batch: Batch) -> Array:
        pixels = jnp.asarray(batch["pixel_values"])
        seen = jnp.stack([view(pixels) for view in views])  # [W, B, X, Y, C]
        results = jax.lax.map(
            lambda part: function(variables, {**batch, "pixel_values": part}), seen
        )
        return jnp.mean(results, axis=0)

    return of_views
