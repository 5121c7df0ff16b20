"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719): a few random operations of one strength.

The operations are those of the paper's table of search spaces, with the ranges of torchvision's
RandAugment, and do what Pillow does: on pixels from 0 to 1, of which those that count bytes take
the nearest. Under ``vmap`` every picture pays for all of them, as a switch then computes each
branch; on a device that is little beside a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.data.augment import ImageFn

Operation = Callable[[Array, Array], Array]
"""(image [X, Y, C], strength [] from -1 to 1 or, of those without a sign, from 0) -> image."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
IN_PLACE = np.eye(2, 3, dtype=np.float32)  # a matrix of `moved`
LEVELS = 30


def rand_augment(operations: int = 2, magnitude: int = 9) -> ImageFn:
    """`operations` of `OPERATIONS`, drawn with replacement, one after another.

    Args:
        operations: how many, N of the paper.
        magnitude: their strength, M of the paper: from 0 to 30. Half of those that have two
            directions go the other way.

    Raises:
        ValueError: numbers out of their range, or later pictures of neither one channel nor three.
    """
    if operations < 1:
        raise ValueError(f"operations is {operations}; it must be at least 1")
    if not 0 <= magnitude <= LEVELS:
        raise ValueError(f"magnitude is {magnitude}; it must be from 0 to {LEVELS}")
    branches = list(OPERATIONS.values())
    signed = np.array([name in SIGNED for name in OPERATIONS])

    def one(image: Array, rng: Array) -> tuple[Array, None]:
        which, way = jax.random.split(rng)
        number = jax.random.randint(which, (), 0, len(branches))
        back = jnp.asarray(signed)[number] & jax.random.bernoulli(way)
        strength = jnp.where(back, -1.0, 1.0) * (magnitude / LEVELS)
        return jax.lax.switch(number, branches, image, strength), None

    def of_image(rng: Array, image: Array) -> Array:
        if image.shape[-1] not in (1, 3):
            raise ValueError(f"pictures have {image.shape[-1]} channels; they must have 1 or 3")
        return jax.lax.scan(one, image, jax.random.split(rng, operations))[0]

    return of_image


def moved(image: Array, matrix: Array) -> Array:
    """A picture whose pixels come from other places, the nearest one; zeros from outside.

    Args:
        image: [X, Y, C].
        matrix: [2, 3], from a pixel's (row, column, 1) to where it comes from; the middle of the
            first pixel is at 0.5.
    """
    rows, columns = image.shape[:2]
    grid = jnp.stack(
        jnp.meshgrid(jnp.arange(rows) + 0.5, jnp.arange(columns) + 0.5, indexing="ij")
    )  # [2, X, Y]
    source = jnp.einsum("ij,jxy->ixy", matrix[:, :2], grid, precision="highest")
    row, column = jnp.floor(source + matrix[:, 2, None, None]).astype(jnp.int32)
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    taken = image[jnp.clip(row, 0, rows - 1), jnp.clip(column, 0, columns - 1)]
    return jnp.where(inside[..., None], taken, 0.0)


def shear_x(image: Array, strength: Array) -> Array:
    """Rows are moved the further, the lower they are: by up to 0.3 of a pixel a row."""
    return moved(image, jnp.asarray(IN_PLACE).at[1, 0].set(0.3 * strength))


def shear_y(image: Array, strength: Array) -> Array:
    """Columns are moved, as `shear_x` moves rows."""
    return moved(image, jnp.asarray(IN_PLACE).at[0, 1].set(0.3 * strength))


def translate_x(image: Array, strength: Array) -> Array:
    """Moved along rows, by up to 150 / 331 of them, whole pixels."""
    shift = jnp.trunc(150 / 331 * image.shape[1] * strength)
    return moved(image, jnp.asarray(IN_PLACE).at[1, 2].set(shift))


def translate_y(image: Array, strength: Array) -> Array:
    """Moved along columns, as `translate_x`."""
    shift = jnp.trunc(150 / 331 * image.shape[0] * strength)
    return moved(image, jnp.asarray(IN_PLACE).at[0, 2].set(shift))


def rotate(image: Array, strength: Array) -> Array:
    """Turned about its middle by up to 30 degrees, anticlockwise if positive."""
    angle = jnp.deg2rad(30 * strength)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.stack([jnp.stack([cos, sin]), jnp.stack([-sin, cos])])
    middle = jnp.array(image.shape[:2], jnp.float32) / 2
    shift = middle - jnp.matmul(turn, middle, precision="highest")
    return moved(image, jnp.concatenate([turn, shift[:, None]], axis=1))


def blended(other: Array, image: Array, strength: Array) -> Array:
    """Away from another picture (or, with a negative strength, towards it) by up to 0.9."""
    return jnp.clip(other + (1 + 0.9 * strength) * (image - other), 0.0, 1.0)


def gray(image: Array) -> Array:
    """[X, Y, 1]: ITU-R 601 luma of three channels."""
    return image if image.shape[-1] == 1 else image @ LUMA[:, None]


def brightness(image: Array, strength: Array) -> Array:
    """Darker or lighter: blended with black."""
    return blended(jnp.zeros_like(image), image, strength)


def color(image: Array, strength: Array) -> Array:
    """Paler or stronger colours: blended with its gray."""
    return blended(gray(image), image, strength)


def contrast(image: Array, strength: Array) -> Array:
    """Blended with its mean gray."""
    return blended(jnp.mean(gray(image)), image, strength)


def sharpness(image: Array, strength: Array) -> Array:
    """Blended with what is smoothed by a kernel of 3 x 3, the border aside, which stays."""
    rows, columns = image.shape[:2]
    if min(rows, columns) < 3:
        return image
    window = sum(
        image[i : i + rows - 2, j : j + columns - 2] * (5 if i == j == 1 else 1)
        for i in range(3)
        for j in range(3)
    )
    return blended(image.at[1:-1, 1:-1].set(window / 13), image, strength)


def posterize(image: Array, strength: Array) -> Array:
    """Bytes whose last bits, up to four, are zero."""
    step = 2.0 ** jnp.round(4 * strength)
    return jnp.floor(to_bytes(image) / step) * step / 255


def solarize(image: Array, strength: Array) -> Array:
    """Pixels as bright as a threshold or brighter become their negative; all of them at most."""
    # A little below the threshold, as bytes over 255 are not exact.
    return jnp.where(image >= 1 - strength - 1e-5, 1 - image, image)


def auto_contrast(image: Array, strength: Array) -> Array:
    """Each channel stretched to go from 0 to 1."""
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    return jnp.where(high > low, (image - low) / jnp.where(high > low, high - low, 1.0), image)


def equalize(image: Array, strength: Array) -> Array:
    """Each channel's bytes replaced so that all are about equally frequent."""
    values = to_bytes(image).astype(jnp.int32)
    return jax.vmap(_equalized, in_axes=-1, out_axes=-1)(values, image)


def _equalized(values: Array, channel: Array) -> Array:
    counts = jnp.zeros(256, jnp.int32).at[values].add(1)
    # The brightest value's pixels do not count: it becomes 255.
    step = (values.size - counts[jnp.max(values)]) // 255
    before = jnp.cumsum(counts) - counts
    table = jnp.clip((before + step // 2) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, table[values] / 255, channel)


def to_bytes(image: Array) -> Array:
    """Pixels from 0 to 1 as numbers from 0 to 255, the nearest."""
    return jnp.round(jnp.clip(image, 0.0, 1.0) * 255)


OPERATIONS: Mapping[str, Operation] = {
    "identity": lambda image, strength: image,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "auto_contrast": auto_contrast,
    "equalize": equalize,
}
SIGNED = {
    "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness",
}  # fmt: skip
