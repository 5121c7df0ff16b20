"""Scenes: boxes and masks are what is seen, splits share nothing, numbers are reproducible."""

import jax
import numpy as np
import pytest

from fmjax.data import assets
from fmjax.data.augment import flip_objects
from fmjax.data.objects import ObjectExamples
from fmjax.data.scenes import (
    LEAST_SEEN,
    SceneParts,
    SceneSettings,
    load_parts,
    load_scenes,
    make_scene,
    region,
)

COLOURS = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)


def drawn_parts(split="train"):
    """A gray photograph; of each class a disk of one colour, transparent around it."""
    rows, columns = np.mgrid[:64, :64] - 31.5
    disk = np.where(rows**2 + columns**2 < 24**2, 255, 0).astype(np.uint8)[..., None]
    pictures = [np.concatenate([np.broadcast_to(one, (64, 64, 3)), disk], -1) for one in COLOURS]
    photograph = np.full((100, 150, 3), 100, np.uint8)
    return SceneParts(split, (photograph,), tuple((one,) for one in pictures))


SETTINGS = SceneSettings(size=(48, 64), objects=(2, 4), label_names=("red", "green"))


def test_boxes_and_masks_are_what_is_seen():
    counts = []
    for number in range(40):
        scene = make_scene(number, SETTINGS, drawn_parts())
        count = scene.object_mask.sum()
        counts.append(count)
        # Pure colours are inside disks; edges are blended, and left out here.
        for label, colour in enumerate(COLOURS):
            pure = np.all(scene.image == colour, axis=-1)
            assert set(scene.mask[pure]) <= {label + 1}
        gray = np.all(scene.image == 100, axis=-1)
        assert not scene.mask[gray].any()
        covered = np.zeros(SETTINGS.size, bool)
        for box, label in zip(scene.boxes[:count], scene.class_labels[:count], strict=True):
            corners = np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])
            left, top, right, bottom = corners * [64, 48, 64, 48]
            np.testing.assert_allclose(
                corners * [64, 48, 64, 48], np.rint([left, top, right, bottom]), atol=1e-4
            )
            inside = np.s_[round(top) : round(bottom), round(left) : round(right)]
            covered[inside] = True
            own = scene.mask[inside] == label + 1
            # Tight: the class is seen in the first and last row and column.
            assert all(edge.any() for edge in (own[0], own[-1], own[:, 0], own[:, -1]))
            assert own.sum() > LEAST_SEEN * 0.5 * own.size * np.pi / 4
        assert not scene.mask[~covered].any()
        assert not scene.boxes[count:].any()
    assert {*counts} == {2, 3, 4}


def test_scenes_are_functions_of_number_seed_and_split():
    first = make_scene(3, SETTINGS, drawn_parts())
    for one, other in zip(first, make_scene(3, SETTINGS, drawn_parts()), strict=True):
        np.testing.assert_array_equal(one, other)
    different = SceneSettings(size=(48, 64), objects=(2, 4), label_names=("red", "green"), seed=1)
    others = [
        make_scene(4, SETTINGS, drawn_parts()),
        make_scene(3, different, drawn_parts()),
        make_scene(3, SETTINGS, drawn_parts("test")),
    ]
    for other in others:
        assert not np.array_equal(first.image, other.image)


def test_regions_share_no_pixel():
    photograph = np.arange(50 * 90).reshape(50, 90)[..., None]
    for turned in (photograph, photograph.swapaxes(0, 1)):
        parts = [region(turned, split) for split in ("train", "val", "test")]
        assert sum(part.size for part in parts) == turned.size
        assert len(np.unique(np.concatenate([part.ravel() for part in parts]))) == turned.size


def test_mirrored_scenes_have_mirrored_boxes():
    scene = make_scene(0, SETTINGS, drawn_parts())
    batch = {"pixel_values": scene.image[None], "boxes": scene.boxes[None]}
    batch["pixel_mask"] = np.arange(scene.image.shape[1])[None] < np.full((len(scene.image), 1), 9)
    batch["pixel_mask"] = batch["pixel_mask"][None]
    mirrored = flip_objects(1.0)(jax.random.key(0), batch)
    np.testing.assert_array_equal(mirrored["pixel_values"][0], scene.image[:, ::-1])
    np.testing.assert_allclose(mirrored["boxes"][0, :, 0], 1 - scene.boxes[:, 0])
    np.testing.assert_array_equal(mirrored["boxes"][0, :, 1:], scene.boxes[:, 1:])
    np.testing.assert_array_equal(mirrored["pixel_mask"], batch["pixel_mask"][:, :, ::-1])
    same = flip_objects(0.0)(jax.random.key(0), batch)
    for name, value in batch.items():
        np.testing.assert_array_equal(same[name], value)


def test_bad_settings_and_boxes_are_all_listed():
    with pytest.raises(ValueError, match="4 problems"):
        SceneSettings(size=(4, 64), objects=(3, 2), object_size=(0.5, 0.2), label_names=("a", "a"))
    boxes = np.tile(np.float32([0.5, 0.5, 0.5, 0.5]), (2, 3, 1))
    boxes[0, 0, 0] = 0.2
    boxes[0, 1, 3] = np.nan
    boxes[1, 2, 2] = 0
    mask = np.ones((2, 3), bool)
    labels = np.array([[0, 1, 2], [0, -1, 1]], np.int32)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="5 problems") as error:
        ObjectExamples(images, boxes, labels, mask, ("a", "b"))
    for line in (
        "image 0, object 0: box [0.2",
        "leaves the picture",
        "is not finite",
        "has no area",
        "image 0, object 2: label 2",
        "image 1, object 1: label -1",
    ):
        assert line in str(error.value)
    mask[0], mask[1, 1:] = False, False
    examples = ObjectExamples(images, boxes, labels, mask, ("a", "b"))
    assert len(examples.select([1])) == 1
    with pytest.raises(ValueError, match="must be \\[N, M\\]"):
        ObjectExamples(images, boxes, labels[:1], mask, ("a", "b"))


@pytest.mark.asset
def test_splits_have_their_own_emoji():
    if not assets.available("emoji"):
        pytest.skip("the asset emoji is not cached: fmjax.data.fetch('emoji')")
    names = SceneSettings().label_names
    seen = []
    for split in ("train", "val", "test"):
        parts = load_parts(split, names)
        assert len(parts.photographs) == 3
        assert min(map(len, parts.pictures)) >= 5
        seen.append({one.tobytes() for pictures in parts.pictures for one in pictures})
    assert sum(map(len, seen)) == len(set().union(*seen))
    scenes = load_scenes("val", 4)
    assert scenes.images.shape == (4, 64, 64, 3)
    assert scenes.masks.shape == (4, 64, 64)
    assert scenes.columns().assemble(np.array([0, -1]), [])["boxes"].shape == (2, 3, 4)
    with pytest.raises(ValueError, match="no split 'dev'"):
        load_scenes("dev", 1)
    with pytest.raises(ValueError, match="no categories"):
        load_parts("val", ("Nonsense",))
