"""Mean average precision of cases that can be counted by hand."""

import numpy as np
import pytest

from fmjax.metrics import detection_metrics

NAMES = ("a", "b", "never")
BOXES = np.array([[0, 0, 10, 10], [20, 20, 30, 40], [5, 5, 15, 15]], np.float32)


def score(detections, truths):
    return detection_metrics(detections, truths, label_names=NAMES)


def test_everything_found():
    truths = [(BOXES[:2], [0, 1]), (BOXES[2:], [1])]
    found = [(BOXES[:2], [0.9, 0.8], [0, 1]), (BOXES[2:], [0.7], [1])]
    scores = score(found, truths)
    for name in ("map", "map_50", "map_75", "map_small", "recall"):
        assert scores[name] == pytest.approx(1.0), name
    assert np.isnan(scores["map_large"])
    assert scores["classes"]["b"] == pytest.approx(1.0)
    assert np.isnan(scores["classes"]["never"])


def test_a_false_alarm_above_a_hit_halves_the_precision():
    scores = score([(BOXES[:2], [0.8, 0.9], [0, 0])], [(BOXES[:1], [0])])
    assert scores["map"] == pytest.approx(0.5)
    assert scores["recall"] == pytest.approx(1.0)


def test_boxes_count_up_to_their_overlap():
    """An IoU of 0.8 is a hit at 0.5, 0.55, ... 0.8: seven of ten thresholds (0.75 among them)."""
    scores = score([([[0, 0, 10, 8]], [0.9], [0])], [(BOXES[:1], [0])])
    assert scores["map_50"] == scores["map_75"] == pytest.approx(1.0)
    assert scores["map"] == pytest.approx(0.7)


def test_what_is_found_in_a_crowd_counts_neither_way():
    truths = [(BOXES[:2], [0, 0], [False, True])]
    found = [([BOXES[0], [21, 22, 25, 30]], [0.5, 0.9], [0, 0])]
    assert score(found, truths)["map"] == pytest.approx(1.0)
    without = [(BOXES[:1], [0], [False])]
    assert score(found, without)["map"] == pytest.approx(0.5)


def test_nothing_found_and_nothing_to_find():
    none = (np.zeros((0, 4)), [], [])
    assert score([none], [(BOXES[:1], [0])])["map"] == 0
    assert np.isnan(score([none], [none[:2]])["map"])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="detections of 0 images and truths of 1"):
        score([], [(BOXES[:1], [0])])
    with pytest.raises(ValueError, match="differ in number") as error:
        score([(BOXES, [0.5], [0])], [(BOXES[:1], [3])])
    assert "labels other than 0 to 2" in str(error.value)
    with pytest.raises(ValueError, match="truths of image 0 have labels other"):
        score([(BOXES[:1], [0.5], [0])], [(BOXES[:1], [0.7])])
    with pytest.raises(ValueError, match="name a class twice"):
        detection_metrics([], [], label_names=["a", "a"])


@pytest.mark.parametrize("boxes", [BOXES * np.nan, BOXES[:, ::-1], BOXES[:, :3], BOXES[0, :3]])
def test_boxes_that_are_none_are_refused(boxes):
    labels = [0] * len(boxes)
    with pytest.raises(ValueError, match="detections of image 0 have boxes other than") as error:
        score([(boxes, labels, labels)], [(boxes, labels)])
    assert "truths of image 0 have boxes" in str(error.value)
