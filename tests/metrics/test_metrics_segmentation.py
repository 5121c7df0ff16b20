"""Metrics of segmentation against numbers worked by hand, and scikit-learn's on drawn maps."""

import json

import numpy as np
import pytest
from sklearn import metrics as reference

from fmjax.metrics import segmentation_confusion, segmentation_metrics

# Two pictures of 2 x 3 pixels; 255 does not count.
LABELS = np.array([[[0, 0, 1], [1, 1, 255]], [[0, 0, 0], [1, 3, 3]]], np.uint8)
PREDICTIONS = np.array([[[0, 1, 1], [1, 0, 2]], [[0, 0, 0], [1, 3, 4]]])
NAMES = ("sky", "sea", "land", "sand", "fog", "none")


def test_scores_match_numbers_by_hand():
    matrix = segmentation_confusion(PREDICTIONS, LABELS, 6)
    expected = np.zeros((6, 6), int)
    expected[0, 0], expected[0, 1] = 4, 1
    expected[1, 1], expected[1, 0] = 3, 1
    expected[3, 3], expected[3, 4] = 1, 1
    np.testing.assert_array_equal(matrix, expected)
    scores = segmentation_metrics(matrix, NAMES)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    ious = {name: row["iou"] for name, row in scores["classes"].items()}
    # Land is predicted only where no label counts, so it is absent as "none" is.
    assert ious == {"sky": 4 / 6, "sea": 3 / 5, "land": None, "sand": 1 / 2, "fog": 0, "none": None}
    assert scores["mean_iou"] == pytest.approx((4 / 6 + 3 / 5 + 1 / 2 + 0) / 4)
    assert scores["mean_accuracy"] == pytest.approx((4 / 5 + 3 / 4 + 1 / 2) / 3)
    assert scores["classes"]["fog"]["accuracy"] is None
    assert scores["pixel_accuracy"] == pytest.approx(8 / 11)


def test_pictures_add_up():
    """The matrix of all pictures is the sum of theirs; the scores are not the mean of theirs."""
    parts = [segmentation_confusion(p, y, 6) for p, y in zip(PREDICTIONS, LABELS, strict=True)]
    whole = segmentation_confusion(PREDICTIONS, LABELS, 6)
    np.testing.assert_array_equal(sum(parts), whole)
    mean = np.mean([segmentation_metrics(part, NAMES)["mean_iou"] for part in parts])
    assert abs(mean - segmentation_metrics(whole, NAMES)["mean_iou"]) > 0.01


def test_drawn_maps_match_scikit_learn():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 5, (2, 3, 8, 9))
    kept = rng.random(labels.shape) < 0.7
    ignoring = np.where(kept, labels, -1)
    matrix = segmentation_confusion(predictions, ignoring, 5, ignored=-1)
    labels, predictions = labels[kept], predictions[kept]
    np.testing.assert_array_equal(matrix, reference.confusion_matrix(labels, predictions))
    scores = segmentation_metrics(matrix, NAMES[:5])
    ious = reference.jaccard_score(labels, predictions, average=None)
    np.testing.assert_allclose([row["iou"] for row in scores["classes"].values()], ious)
    assert scores["mean_accuracy"] == pytest.approx(
        reference.balanced_accuracy_score(labels, predictions)
    )


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"predictions have shape \(2,\)") as error:
        segmentation_confusion([0, 1], [[0.5]], 0)
    for words in ("num_classes is 0", "labels are float64"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"1 predictions are outside 0..1, the first is 2.*labels"):
        segmentation_confusion([2, 9, 0], [0, 255, -100], 2)
    with pytest.raises(ValueError, match="ignored is 255, one of 300 classes"):
        segmentation_confusion([255, 1], [255, 1], 300)
    assert segmentation_confusion(np.array([1], np.uint64), [1], 2).sum() == 1
    with pytest.raises(ValueError, match=r"confusion is float64 \(2,\)"):
        segmentation_metrics([0.5, 1.0], ("a", "b"))
    with pytest.raises(ValueError, match="counts of some pixels") as error:
        segmentation_metrics(np.zeros((2, 2), int), ("a", "a"))
    assert "different names" in str(error.value)
