"""RandAugment: each operation is Pillow's, and they are drawn as they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from fmjax.data.augment import each_image
from fmjax.data.augment_policy import OPERATIONS, SIGNED, rand_augment


def affine(*matrix):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix)


def shift(strength, size):
    return int(150 / 331 * size * strength)


def pillow(name, m, rows, columns):
    """The operation as Pillow has it, at a strength."""
    return {
        "identity": lambda image: image,
        "shear_x": affine(1, 0.3 * m, 0, 0, 1, 0),
        "shear_y": affine(1, 0, 0, 0.3 * m, 1, 0),
        "translate_x": affine(1, 0, shift(m, columns), 0, 1, 0),
        "translate_y": affine(1, 0, 0, 0, 1, shift(m, rows)),
        "rotate": lambda image: image.rotate(30 * m),
        "brightness": lambda image: ImageEnhance.Brightness(image).enhance(1 + 0.9 * m),
        "color": lambda image: ImageEnhance.Color(image).enhance(1 + 0.9 * m),
        "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1 + 0.9 * m),
        "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * m),
        "posterize": lambda image: ImageOps.posterize(image, 8 - round(4 * m)),
        "solarize": lambda image: ImageOps.solarize(image, 255 * (1 - m)),
        "auto_contrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
    }[name]


# Bytes that may differ: Pillow rounds or cuts once or twice where we do not round at all.
ROUNDING = {"brightness": 1, "color": 2, "contrast": 2, "sharpness": 2, "auto_contrast": 1}
# Pixels whose source lies between two, where Pillow counts in 65536ths of a pixel.
BETWEEN = {"rotate": 0.03, "shear_x": 0.03, "shear_y": 0.03}


def pictures():
    """Noise, a slope that uses few values, and one of a single colour, in colours and gray."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (23, 31, 3), dtype=np.uint8)
    slope = np.broadcast_to((40 + 5 * np.arange(31))[None, :, None], noise.shape).astype(np.uint8)
    flat = np.full_like(noise, 77)
    return [noise, slope, flat, noise[..., :1]]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pillows(name):
    for strength in (0.43, 1.0, *((-0.71,) if name in SIGNED else ())):
        for bytes_ in pictures():
            image = Image.fromarray(bytes_[..., 0] if bytes_.shape[-1] == 1 else bytes_)
            expected = np.asarray(pillow(name, strength, *bytes_.shape[:2])(image), np.float64)
            expected = expected.reshape(bytes_.shape)
            out = OPERATIONS[name](jnp.asarray(bytes_ / 255, jnp.float32), jnp.float32(strength))
            assert out.shape == bytes_.shape
            assert 0 <= out.min() <= out.max() <= 1
            wrong = np.abs(np.asarray(out) * 255 - expected) > ROUNDING.get(name, 0) + 1e-3
            assert wrong.any(axis=-1).mean() <= BETWEEN.get(name, 0), (strength, wrong.mean())
    if name != "identity":
        assert (np.asarray(out) != bytes_ / 255).any()


@jax.jit
def every(image, share):
    """What each operation makes, both ways of those that have two: [W, X, Y, C]."""
    ways = [
        operation(image, sign * share)
        for name, operation in OPERATIONS.items()
        for sign in ((1, -1) if name in SIGNED else (1,))
    ]
    return jnp.stack(ways)


def nearest(made, out):
    """Which of the pictures each is, and how far it is from it."""
    made, out = (np.asarray(part).reshape(len(part), -1) for part in (made, out))
    distance = np.stack([np.abs(made - one).max(axis=1) for one in out])
    return distance.argmin(axis=1), distance.min(axis=1)


@pytest.mark.slow
def test_operations_are_drawn_evenly_and_both_ways():
    """Each picture is what an operation makes, or two in a row, all about as often as others."""
    # Not from 0 to 1, where stretching the contrast would do nothing, and with pixels enough to
    # be equalised.
    image = jnp.asarray(0.2 + 0.6 * pictures()[0][:18, :18] / 255, jnp.float32)
    made = every(image, jnp.float32(12 / 30))
    count = 1400
    batch = {"pixel_values": jnp.broadcast_to(image, (count, *image.shape))}
    once = jax.jit(each_image(rand_augment(1, 12)))
    draw = lambda seed: once(jax.random.key(seed), batch)["pixel_values"]  # noqa: E731
    which, distance = nearest(made, draw(0))
    # A pixel between two others may be taken from either, as compilers round otherwise.
    assert np.quantile(distance, 0.8) < 1e-6
    seen = np.bincount(which, minlength=len(made)) / count
    expected = np.concatenate(
        [
            [1 / len(OPERATIONS) / ways] * ways
            for name in OPERATIONS
            for ways in [1 + (name in SIGNED)]
        ]
    )
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected / count)).all(), seen
    np.testing.assert_array_equal(draw(1), draw(1))

    few = {"pixel_values": batch["pixel_values"][:40]}
    twice = jax.jit(each_image(rand_augment(2, 12)))(jax.random.key(2), few)["pixel_values"]
    both = jax.vmap(lambda one: every(one, jnp.float32(12 / 30)))(made).reshape(-1, *image.shape)
    assert np.quantile(nearest(both, twice)[1], 0.7) < 1e-6
    assert np.median(nearest(made, twice)[1]) > 1e-2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rand_augment(0), "operations is 0"),
        (lambda: rand_augment(2, 31), "magnitude is 31"),
        (
            lambda: rand_augment()(jax.random.key(0), jnp.zeros((4, 4, 2))),
            "pictures have 2 channels",
        ),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
