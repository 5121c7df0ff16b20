"""Sheets, and the hook that ends the run of a generator that collapses."""

import jax
import numpy as np
import optax
import pytest

from fmjax.recipes import image_generation as recipe
from fmjax.train import init_state
from fmjax.train.loop import Event


def event():
    state = init_state({"params": {"x": np.zeros(())}}, optax.sgd(0.1), jax.random.key(0))
    return Event(7, state, {}, 1.0, 1, 0)


def test_a_generator_that_cannot_go_on_is_stopped():
    real = np.random.default_rng(0).uniform(size=(20, 4, 4, 1))
    images = real.copy()
    hook = recipe.watching(lambda state: images, real, least=0.5)
    assert hook(event()) is None
    images[3, 0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="step 7: 1 of 20 made images are not finite"):
        hook(event())
    images[:] = real[:1] + 0.1 * (real - real[:1])
    with pytest.raises(recipe.CollapsedGenerator, match="step 7: the generator has collapsed"):
        hook(event())
    assert recipe.watching(lambda state: images, real, least=0.5, after=7)(event()) is None


def test_sheets():
    images = np.arange(3)[:, None, None, None] * np.ones((3, 2, 3, 1)) / 2
    pixels = recipe.sheet(images, 2)
    assert pixels.shape == (4, 6, 1)
    np.testing.assert_array_equal(pixels[::2, ::3, 0], [[0, 128], [255, 255]])
    small = recipe.padded(np.full((1, 2, 3, 1), 9, np.uint8), 5)
    assert small.shape == (1, 5, 5, 1)
    assert small.sum() == 9 * 6
    np.testing.assert_array_equal(recipe.middle(small, (2, 3)), np.full((1, 2, 3, 1), 9))
    with pytest.raises(ValueError, match="do not fit into 1 x 1"):
        recipe.padded(small, 1)
    rows = np.arange(7.0)
    doubled = recipe.drawn_in_batches(lambda x: 2 * x[:4], rows, batch_size=4)
    np.testing.assert_array_equal(doubled, 2 * rows)
