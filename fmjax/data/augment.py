"""Augmentation as pure functions that run on the device, on whole batches of pictures.

Two kinds of function, each made by one that takes its strength:

- of a picture: ``(rng, image [X, Y, C]) -> image``, pixels from 0 to 1 (`flip`, `shift_crop`,
  `resized_crop`, `erase`); `each_image` makes a batch's of several.
- of a batch: ``(rng, batch) -> batch`` (`mixup`, `cutmix`), where labels become shares [B, C];
  `flip_objects` and `flip_segments` turn boxes and labels of pixels with the pictures.

`fmjax.tasks.pixels.augmented` puts them before a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.data.columns import IGNORED_LABEL
from fmjax.types import Batch

ImageFn = Callable[[Array, Array], Array]
"""(typed key, image [X, Y, C]) -> image."""
BatchFn = Callable[[Array, Batch], Batch]
"""(typed key, batch with ``pixel_values`` [B, X, Y, C]) -> batch."""


def each_image(*functions: ImageFn) -> BatchFn:
    """Applies functions of a picture to every picture, one after another, each with its own key.

    Nothing but ``pixel_values`` changes: what is known of places in the picture is turned with it
    by `flip_objects` and `flip_segments` alone.

    Raises:
        ValueError: when called, pictures that are not floats.
    """

    def of_image(rng: Array, image: Array) -> Array:
        for key, function in zip(jax.random.split(rng, len(functions)), functions, strict=True):
            image = function(key, image)
        return image

    def of_batch(rng: Array, batch: Batch) -> Batch:
        images = _floats(batch)
        keys = jax.random.split(rng, len(images))
        return {**batch, "pixel_values": jax.vmap(of_image)(keys, images)}

    return of_batch


def each_clip(*functions: ImageFn) -> BatchFn:
    """Applies functions of a picture to every video [T, X, Y, C], all frames with one key."""

    def of_clip(function: ImageFn) -> ImageFn:
        return lambda rng, clip: jax.vmap(function, (None, 0))(rng, clip)

    return each_image(*map(of_clip, functions))


def flip(share: float = 0.5) -> ImageFn:
    """Left becomes right for a share of the pictures."""
    check_share("share", share)

    def of_image(rng: Array, image: Array) -> Array:
        return jnp.where(jax.random.bernoulli(rng, share), image[:, ::-1], image)

    return of_image


def flip_objects(share: float = 0.5) -> BatchFn:
    """Left becomes right for a share of the pictures, and of their ``boxes`` [B, M, 4] and, where
    there is padding, their ``pixel_mask`` [B, X, Y] with them."""
    check_share("share", share)

    def of_batch(rng: Array, batch: Batch) -> Batch:
        boxes = jnp.asarray(batch["boxes"])
        chosen = jax.random.bernoulli(rng, share, (len(boxes),))
        turned = boxes.at[..., 0].set(1 - boxes[..., 0])
        return {
            **_flipped(batch, chosen, ("pixel_values", "pixel_mask")),
            "boxes": jnp.where(chosen[:, None, None], turned, boxes),
        }

    return of_batch


def flip_segments(share: float = 0.5) -> BatchFn:
    """Left becomes right for a share of the pictures, and of their pixels' ``labels`` [B, X, Y]."""
    check_share("share", share)

    def of_batch(rng: Array, batch: Batch) -> Batch:
        chosen = jax.random.bernoulli(rng, share, (len(batch["labels"]),))
        return _flipped(batch, chosen, ("pixel_values", "labels"))

    return of_batch


def _flipped(batch: Batch, chosen: Array, names: tuple[str, ...]) -> dict[str, Any]:
    """The batch with those of `names` that it has, [B, X, Y, ...], left for right where chosen."""
    result = dict(batch)
    for name in names:
        if name in batch:
            maps = jnp.asarray(batch[name])
            where = chosen.reshape(-1, *[1] * (maps.ndim - 1))
            result[name] = jnp.where(where, maps[:, :, ::-1], maps)
    return result


def shift_crop(padding: int) -> ImageFn:
    """The picture moved by up to `padding` pixels in each direction, zeros behind it.

    As padding and a random crop of the old size (He et al. 2015, arXiv:1512.03385, section 4.2).
    """
    if padding < 0:
        raise ValueError(f"padding is {padding}; it must not be negative")

    def of_image(rng: Array, image: Array) -> Array:
        around = ((padding, padding), (padding, padding), (0, 0))
        row, column = jax.random.randint(rng, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(jnp.pad(image, around), (row, column, 0), image.shape)

    return of_image


def resized_crop(
    scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> ImageFn:
    """A random part of the picture, enlarged to its size (Szegedy et al. 2014, arXiv:1409.4842).

    Args:
        scale: the part's share of the area, drawn uniformly.
        ratio: its width by its height, drawn uniformly on a logarithmic scale; where the part would
            not fit, it is cut to the picture.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale is {scale}; it must be two shares, the smaller first")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio is {ratio}; it must be two positive numbers, the smaller first")

    def of_image(rng: Array, image: Array) -> Array:
        keys = jax.random.split(rng, 4)
        size = jnp.array(image.shape[:2], jnp.float32)  # rows, columns
        area = jax.random.uniform(keys[0], minval=scale[0], maxval=scale[1]) * size.prod()
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = jnp.exp(jax.random.uniform(keys[1], minval=low, maxval=high))
        part = jnp.minimum(jnp.stack([jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)]), size)
        offset = jax.random.uniform(keys[2], (2,)) * (size - part)
        zoom = size / part
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), zoom, -offset * zoom, method="linear", antialias=True
        )

    return of_image


def erase(
    share: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    value: float = 0.0,
) -> ImageFn:
    """A rectangle of a share of the pictures painted over (Zhong et al. 2017, arXiv:1708.04896).

    Args:
        share: of the pictures.
        area: the rectangle's share of the picture, drawn uniformly.
        ratio: its height by its width, drawn uniformly on a logarithmic scale.
        value: of its pixels.
    """
    check_share("share", share)
    if not 0 <= area[0] <= area[1] <= 1:
        raise ValueError(f"area is {area}; it must be two shares, the smaller first")

    def of_image(rng: Array, image: Array) -> Array:
        keys = jax.random.split(rng, 4)
        rows, columns = image.shape[:2]
        part = jax.random.uniform(keys[0], minval=area[0], maxval=area[1]) * rows * columns
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = jnp.exp(jax.random.uniform(keys[1], minval=low, maxval=high))
        inside = _rectangle(
            keys[2], (rows, columns), jnp.sqrt(part * aspect), jnp.sqrt(part / aspect)
        )
        inside &= jax.random.bernoulli(keys[3], share)
        return jnp.where(inside[..., None], jnp.asarray(value, image.dtype), image)

    return of_image


def _rectangle(rng: Array, size: tuple[int, int], height: Array, width: Array) -> Array:
    """Where a rectangle at a random place is: bool [X, Y]; it is cut to the picture's size."""
    sides = []
    for key, whole, length in zip(jax.random.split(rng), size, (height, width), strict=True):
        length = jnp.clip(jnp.round(length), 0, whole)
        start = jnp.floor(jax.random.uniform(key) * (whole - length + 1))
        place = jnp.arange(whole)
        sides.append((place >= start) & (place < start + length))
    return sides[0][:, None] & sides[1][None, :]


def mixup(alpha: float, num_labels: int) -> BatchFn:
    """Pictures and labels blended with those of another example (Zhang et al. 2017,
    arXiv:1710.09412, eq. 1).

    Args:
        alpha: of the Beta distribution of the share, one draw a batch.
        num_labels: C, for labels that are class indices; rows of -100 get no weight.

    Raises:
        ValueError: an alpha that is not positive; when called, pictures that are not floats.
    """
    if alpha <= 0:
        raise ValueError(f"alpha is {alpha}; it must be positive")

    def of_batch(rng: Array, batch: Batch) -> Batch:
        share = jax.random.beta(rng, alpha, alpha)
        images = _floats(batch)
        labels, weight = shares(batch, num_labels)
        other = _partner(weight)
        return {
            **batch,
            "weight": weight,
            "pixel_values": share * images + (1 - share) * images[other],
            "labels": share * labels + (1 - share) * labels[other],
        }

    return of_batch


def cutmix(alpha: float, num_labels: int) -> BatchFn:
    """A rectangle of each picture from another example, labels by area (Yun et al. 2019,
    arXiv:1905.04899, section 3.1).

    Args:
        alpha: of the Beta distribution of the share that stays, one draw a batch.
        num_labels: C, for labels that are class indices; rows of -100 get no weight.

    Raises:
        ValueError: an alpha that is not positive.
    """
    if alpha <= 0:
        raise ValueError(f"alpha is {alpha}; it must be positive")

    def of_batch(rng: Array, batch: Batch) -> Batch:
        first, second = jax.random.split(rng)
        images = jnp.asarray(batch["pixel_values"])
        labels, weight = shares(batch, num_labels)
        rows, columns = images.shape[1:3]
        side = jnp.sqrt(1 - jax.random.beta(first, alpha, alpha))
        inside = _rectangle(second, (rows, columns), rows * side, columns * side)
        other = _partner(weight)
        kept = 1 - jnp.mean(inside.astype(jnp.float32))
        return {
            **batch,
            "weight": weight,
            "pixel_values": jnp.where(inside[None, :, :, None], images[other], images),
            "labels": kept * labels + (1 - kept) * labels[other],
        }

    return of_batch


def shares(batch: Batch, num_labels: int) -> tuple[Array, Array]:
    """Labels as shares [B, C], and each row's weight [B].

    Class indices [B] become shares, of one that is no class nan, and rows of -100 lose their
    weight, as those of losses have none; what are shares stays.

    Raises:
        ValueError: labels of another shape, such as those of pixels.
    """
    labels = jnp.asarray(batch["labels"])
    if labels.ndim != 1 and labels.shape[1:] != (num_labels,):
        raise ValueError(
            f"labels have the shape {labels.shape}; those of blended pictures must be class "
            f"indices [B] or shares [B, {num_labels}]"
        )
    weight = jnp.asarray(batch.get("weight", jnp.ones(len(labels))), jnp.float32)
    if labels.ndim > 1:
        return labels, weight
    weight = jnp.where(labels == IGNORED_LABEL, 0.0, weight)
    unknown = ((labels < 0) | (labels >= num_labels)) & (weight > 0)
    return jnp.where(unknown[:, None], jnp.nan, jax.nn.one_hot(labels, num_labels)), weight


def _floats(batch: Batch) -> Array:
    images = jnp.asarray(batch["pixel_values"])
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"pixel_values are {images.dtype}; augmentation takes floats from 0 to 1: put the "
            "functions before the loss by fmjax.tasks.pixels.augmented, or divide bytes by 255"
        )
    return images


def _partner(weight: Array) -> Array:
    """Which example each is blended with, int [B]: the next one of weight, so never padding."""
    count = jnp.sum(weight > 0)
    order = jnp.argsort(weight <= 0, stable=True)  # examples first
    rank = jnp.argsort(order)
    return order[jnp.where(rank < count, (rank + 1) % jnp.maximum(count, 1), rank)]


def check_share(name: str, value: float) -> None:
    """Refuses what is no probability.

    Raises:
        ValueError: it is outside 0 to 1.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be from 0 to 1")
