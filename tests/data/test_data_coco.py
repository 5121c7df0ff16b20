"""COCO's format: boxes as shares, crowds, gaps in ids; everything that does not fit is listed."""

import json

import numpy as np
import pytest
from PIL import Image

from fmjax.data.coco import read_coco

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("wide.png", (10, 20)), ("sub/tall.png", (40, 8))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


def images():
    return [
        {"id": 5, "file_name": "wide.png", "width": 20, "height": 10},
        {"id": 3, "file_name": "sub/tall.png", "width": 8, "height": 40},
    ]


def note(image, category, bbox, **rest):
    return {"image_id": image, "category_id": category, "bbox": bbox, **rest}


def written(folder, annotations, *, pictures=None, categories=None):
    file = folder / "annotations.json"
    data = {
        "info": {}, "licenses": [], "images": pictures or images(), "annotations": annotations,
        "categories": categories or CATEGORIES,
    }  # fmt: skip
    file.write_text(json.dumps(data))
    return file


def test_boxes_become_shares_of_pictures_of_one_size(folder):
    annotations = [
        note(5, 7, [5, 0, 10, 5], id=1, area=50, segmentation=[], iscrowd=0),
        note(3, 2, [0, 10.0, 4, 20]),
        note(5, 2, [0, 0, 20, 10], iscrowd=1),
    ]
    examples = read_coco(written(folder, annotations), folder, size=(16, 12))
    assert examples.images.shape == (2, 16, 12, 3)
    assert examples.label_names == ("cat", "dog")
    assert examples.image_ids.tolist() == [5, 3]
    assert examples.sizes.tolist() == [[10, 20], [40, 8]]
    np.testing.assert_allclose(examples.boxes[0, 0], [0.5, 0.25, 0.5, 0.5])
    np.testing.assert_allclose(examples.boxes[1, 0], [0.25, 0.5, 0.5, 0.5])
    assert examples.class_labels.tolist() == [[1, 0], [0, 0]]
    assert examples.object_mask.tolist() == [[True, True], [True, False]]
    assert examples.crowd.tolist() == [[False, True], [False, False]]
    # Crowds are not trained on.
    batch = examples.columns().assemble(np.array([0, 1]), [])
    assert batch["object_mask"].tolist() == [[True, False], [True, False]]
    assert examples.select([1]).image_ids.tolist() == [3]


def test_bad_boxes_are_listed_or_cut(folder):
    annotations = [
        note(5, 7, [15, 0, 10, 5], id=11),
        note(5, 7, [5, 5, 0, 5], id=12),
        note(5, 7, [19.8, 0, 0.5, 5], id=13),
        note(4, 9, [0, 0, 1, 1], id=14),
        note(3, 9, [0, 0, 1, 1], id=15),
    ]
    with pytest.raises(ValueError, match="4 problems") as error:
        read_coco(written(folder, annotations), folder, size=(8, 8))
    for words in (
        "annotation 11: bbox [15, 0, 10, 5] leaves its picture of 20 x 10",
        "annotation 12: bbox [5, 5, 0, 5] has no area",
        "annotation 14: there is no image 4",
        "annotation 15: there is no category 9",
    ):
        assert words in str(error.value)
    cut = read_coco(written(folder, annotations[:3]), folder, size=(8, 8), clip=True)
    np.testing.assert_allclose(cut.boxes[0, 0], [0.875, 0.25, 0.25, 0.5])
    assert cut.object_mask.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize(
    "entry",
    [
        {"width": "8"}, {"height": None}, {"id": 2**70}, {"iscrowd": "0"}, {"bbox": [10**400] * 4},
    ],
)  # fmt: skip
def test_values_of_another_kind_are_named(folder, entry):
    first, second = images()
    ours = entry if "width" in entry or "height" in entry or "id" in entry else {}
    annotation = note(3, 7, [0, 0, 1, 1]) | ({} if ours else entry)
    file = written(folder, [annotation], pictures=[first | ours, second])
    with pytest.raises(ValueError, match=r"1 problem\n.*of another form"):
        read_coco(file, folder, size=(8, 8))


def test_files_of_another_form_are_refused(folder):
    file = folder / "annotations.json"
    for text, message in (
        ("[1", "is not JSON"), ('{"images": []}', "with the lists"),
        ("1" * 5000, r"annotations\.json is not JSON: .*digits"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_coco(file, folder, size=(8, 8))
    bad = [
        note(5, 7, [0, 0, 1]), note(5, "7", [0, 0, 1, 1]), {"image_id": 5}, 3,
        note(5, 7, [0, 0, float("nan"), 1]),
    ]  # fmt: skip
    twice = [*images(), {"id": 5, "file_name": "wide.png", "width": 20, "height": 0}]
    with pytest.raises(ValueError, match="7 problems") as error:
        read_coco(written(folder, bad, pictures=twice), folder, size=(8, 8))
    assert "images: the id 5 is there 2 times" in str(error.value)
    outside = [
        {"id": 1, "file_name": "../secret.png", "width": 2, "height": 2},
        {"id": 2, "file_name": "none.png", "width": 2, "height": 2},
        {"id": 3, "file_name": "wide.png", "width": 10, "height": 20},
    ]
    with pytest.raises(ValueError, match="3 problems") as error:
        read_coco(written(folder, [], pictures=outside), folder, size=(8, 8))
    for words in ("outside the folder", "none.png", "has 20 x 10 pixels, the file says 10 x 20"):
        assert words in str(error.value)
    with pytest.raises(FileNotFoundError):
        read_coco(file, folder / "nowhere", size=(8, 8))
