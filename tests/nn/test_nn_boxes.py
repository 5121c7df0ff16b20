"""Boxes: known pairs, pixels counted, and transformers' functions."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.loss.loss_for_object_detection import box_iou, generalized_box_iou

from fmjax.nn.boxes import area, generalised_iou, iou, to_centre, to_corners


def random_boxes(count, seed):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 0.8, (count, 2))
    return np.concatenate([low, low + rng.uniform(0.01, 0.5, (count, 2))], -1).astype(np.float32)


def test_corners_and_centres_are_inverses():
    corners = random_boxes(20, 0)
    centres = to_centre(jnp.asarray(corners))
    np.testing.assert_allclose(centres[:, 2] * centres[:, 3], area(corners), rtol=1e-5)
    np.testing.assert_allclose(to_corners(centres), corners, atol=1e-6)
    np.testing.assert_array_equal(to_centre(jnp.array([1.0, 2.0, 5.0, 4.0])), [3, 3, 4, 2])


def test_all_pairs_equal_transformers():
    a, b = random_boxes(7, 1), random_boxes(5, 2)
    theirs, _ = box_iou(torch.tensor(a), torch.tensor(b))
    np.testing.assert_allclose(iou(a[:, None], b), theirs, atol=1e-6)
    theirs = generalized_box_iou(torch.tensor(a), torch.tensor(b))
    np.testing.assert_allclose(generalised_iou(a[:, None], b), theirs, atol=1e-6)


def test_known_pairs():
    a = jnp.array([0.0, 0.0, 2.0, 2.0])
    for b, overlap, generalised in (
        ([0.0, 0.0, 2.0, 2.0], 1.0, 1.0),
        ([1.0, 0.0, 3.0, 2.0], 1 / 3, 1 / 3),
        ([1.0, 1.0, 3.0, 3.0], 1 / 7, 1 / 7 - 2 / 9),
        ([4.0, 0.0, 6.0, 2.0], 0.0, -1 / 3),
    ):
        np.testing.assert_allclose(iou(a, jnp.array(b)), overlap, rtol=1e-6)
        np.testing.assert_allclose(generalised_iou(a, jnp.array(b)), generalised, rtol=1e-6)


def test_boxes_without_area_have_finite_gradients():
    point = jnp.array([0.5, 0.5, 0.5, 0.5])
    value, grad = jax.value_and_grad(lambda a: generalised_iou(a, point))(point)
    assert value == 0
    assert np.isfinite(grad).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=8, max_size=8))
def test_iou_counts_pixels(ends):
    grid = np.zeros((2, 13, 13), bool)
    boxes = []
    for plane, (left, right, top, bottom) in zip(grid, (ends[:4], ends[4:]), strict=True):
        left, right, top, bottom = *sorted((left, right)), *sorted((top, bottom))
        plane[top:bottom, left:right] = True
        boxes.append(np.array([left, top, right, bottom], np.float32))
    union = (grid[0] | grid[1]).sum()
    expected = (grid[0] & grid[1]).sum() / union if union else 0.0
    np.testing.assert_allclose(iou(*map(jnp.asarray, boxes)), expected, rtol=1e-6)
    assert -1 <= generalised_iou(*map(jnp.asarray, boxes)) <= 1
