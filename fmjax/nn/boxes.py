"""Boxes as pure functions: [..., 4] arrays, by centre and size or by corners.

"Centre" is (x, y, width, height), x along columns and y along rows; "corners" is (left, top, right,
bottom). Any unit will do, and both boxes of a pair have the same.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def to_corners(boxes: Array) -> Array:
    """Boxes [..., 4] by centre and size as corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def to_centre(boxes: Array) -> Array:
    """Boxes [..., 4] by corners as centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def area(boxes: Array) -> Array:
    """Of boxes by corners: [..., 4] -> [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Array, b: Array) -> Array:
    """Intersection over union of boxes by corners, [..., 4] and [..., 4] that broadcast; 0 where
    neither has an area.
    """
    return _iou_and_union(a, b)[0]


def generalised_iou(a: Array, b: Array) -> Array:
    """IoU less the share of the box around both that neither fills, from -1 to 1 (Rezatofighi et
    al. 2019, arXiv:1902.09630, algorithm 1).

    Args:
        a, b: [..., 4] by corners; they broadcast: ``generalised_iou(a[:, None], b)`` is of all
            pairs.
    """
    overlap, union = _iou_and_union(a, b)
    low = jnp.minimum(a[..., :2], b[..., :2])
    high = jnp.maximum(a[..., 2:], b[..., 2:])
    around = area(jnp.concatenate([low, high], axis=-1))
    return overlap - _ratio(around - union, around)


def _iou_and_union(a: Array, b: Array) -> tuple[Array, Array]:
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., 2:], b[..., 2:])
    both = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    union = area(a) + area(b) - both
    return _ratio(both, union), union


def _ratio(part: Array, whole: Array) -> Array:
    """part / whole; 0, with a gradient of 0, where the whole is not positive."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)
