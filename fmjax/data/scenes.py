"""Scenes: emoji pasted onto photographs, with exact boxes, classes and masks.

A scene is a pure function of its number, its settings and the split's parts, so that a set is as
many scenes as one wants and the same everywhere. The splits share nothing: each has its own emoji
(`fmjax.data.emoji`) and its own region of each photograph (scikit-learn's two, a temple and a
flower, and matplotlib's portrait of Grace Hopper).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from fmjax.data.files import raise_problems
from fmjax.data.objects import ObjectExamples
from fmjax.data.splits import SPLITS

REGIONS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
"""Of each split, where in a photograph it may look: shares of the longer side."""
ZOOM = 2.0
"""A background is cut out up to this much larger than the scene, and made smaller."""
VISIBLE = 128
"""The least alpha of a pixel that belongs to an object."""
LEAST_SEEN = 0.6
"""The share of an object's pixels that later objects must leave to be seen."""
TRIES = 20
"""How often a place is drawn for an object before the scene goes without it."""


@dataclasses.dataclass(frozen=True)
class SceneSettings:
    """What scenes look like.

    Attributes:
      size: rows and columns.
      objects: the least and the most in a scene, drawn uniformly; where the last ones find no
        place that leaves enough of the others to be seen, there are fewer.
      object_size: the sides of the pasted pictures, as shares of the scene's shorter side, drawn
        uniformly.
      label_names: the classes, categories of emoji.
      seed: another one makes other scenes.

    Raises:
      ValueError: sizes, numbers or shares that are not ordered, or not possible.
    """

    size: tuple[int, int] = (64, 64)
    objects: tuple[int, int] = (1, 3)
    object_size: tuple[float, float] = (0.3, 0.5)
    label_names: tuple[str, ...] = (
        "Animals & Nature",
        "Flags",
        "Food & Drink",
        "Smileys & Emotion",
    )
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if min(self.size) < 8:
            problems.append(f"size is {self.size}; rows and columns must be at least 8")
        if not 1 <= self.objects[0] <= self.objects[1]:
            problems.append(f"objects is {self.objects}; it must be a least and a most, from 1")
        if not 4 / min(self.size) <= self.object_size[0] <= self.object_size[1] <= 1:
            problems.append(
                f"object_size is {self.object_size}; it must be two shares, the smaller first, of "
                "4 pixels at least"
            )
        if len({*self.label_names}) != len(self.label_names) or not self.label_names:
            problems.append(f"label_names is {self.label_names}; it must name each class once")
        raise_problems("SceneSettings", problems)


class SceneParts(NamedTuple):
    """What the scenes of a split are made of.

    Attributes:
      split: one of `SPLITS`.
      photographs: uint8 [X, Y, 3] each, the split's region of it.
      pictures: for each class, uint8 [S, S, 4] each, with transparency.
    """

    split: str
    photographs: tuple[np.ndarray, ...]
    pictures: tuple[tuple[np.ndarray, ...], ...]


class Scene(NamedTuple):
    """One scene with N objects, padded to M, the most that a scene may have.

    Attributes:
      image: uint8 [X, Y, 3].
      boxes: float32 [M, 4], centre (along columns, along rows), width and height as shares of the
        picture; tight around the pixels that are seen.
      class_labels: int32 [M].
      object_mask: bool [M], N times True.
      mask: uint8 [X, Y], 0 where there is no object, else its class + 1.
    """

    image: np.ndarray
    boxes: np.ndarray
    class_labels: np.ndarray
    object_mask: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Scenes(ObjectExamples):
    """Scenes of one size, with masks uint8 [N, X, Y] beside their boxes."""

    masks: np.ndarray


def load_scenes(split: str, count: int, settings: SceneSettings | None = None) -> Scenes:
    """The first scenes of a split; the first call fetches the emoji.

    Args:
      split: "train", "val" or "test".
      count: how many.
      settings: by default `SceneSettings()`.

    Raises:
      ValueError: there is no such split, or a class is no category of emoji.
      OSError: the asset cannot be downloaded.
    """
    settings = settings or SceneSettings()
    parts = load_parts(split, settings.label_names)
    scenes = [make_scene(number, settings, parts) for number in range(count)]
    images, boxes, labels, object_mask, masks = map(np.stack, zip(*scenes, strict=True))
    return Scenes(images, boxes, labels, object_mask, settings.label_names, masks)


def load_parts(split: str, label_names: tuple[str, ...]) -> SceneParts:
    """A split's regions of the photographs and its emoji of the named categories.

    Raises:
      ValueError: there is no such split, or a class is no category of emoji.
      OSError: the asset cannot be downloaded.
    """
    from matplotlib import cbook
    from PIL import Image
    from sklearn.datasets import load_sample_image

    # It imports tensorflow_datasets, which takes a second.
    from fmjax.data.emoji import CATEGORIES, emoji_pictures

    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; there are {list(SPLITS)}")
    if unknown := [name for name in label_names if name not in CATEGORIES]:
        raise ValueError(f"there are no categories {unknown}; there are {list(CATEGORIES)}")
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        portrait = np.asarray(file.convert("RGB"))
    photographs = (load_sample_image("china.jpg"), load_sample_image("flower.jpg"), portrait)
    # A few flags of different codes are one picture: the first split has it alone.
    earlier = SPLITS[: SPLITS.index(split)]
    taken = {one.tobytes() for other in earlier for one, _ in emoji_pictures(other)}
    found = [(one, name) for one, name in emoji_pictures(split) if one.tobytes() not in taken]
    return SceneParts(
        split,
        tuple(region(photograph, split) for photograph in photographs),
        tuple(tuple(one for one, category in found if category == name) for name in label_names),
    )


def region(photograph: np.ndarray, split: str) -> np.ndarray:
    """The part of a photograph [X, Y, 3] that a split may look at: a slice of its longer side."""
    axis = int(np.argmax(photograph.shape[:2]))
    low, high = (round(share * photograph.shape[axis]) for share in REGIONS[split])
    return photograph[low:high] if axis == 0 else photograph[:, low:high]


def make_scene(number: int, settings: SceneSettings, parts: SceneParts) -> Scene:
    """Scene `number` of a split.

    Args:
      number: from 0; each draws from its own stream of random numbers.
      settings: what it looks like.
      parts: what it is made of, of any size; all classes of the settings must have pictures.
    """
    rng = np.random.default_rng((settings.seed, SPLITS.index(parts.split), number))
    image = _background(rng, settings.size, parts.photographs).astype(np.float32)
    owner = np.zeros(settings.size, np.int32)  # 0, or the number of the object seen there
    areas, labels = [], []
    for _ in range(rng.integers(*settings.objects, endpoint=True)):
        for _ in range(TRIES):
            label = int(rng.integers(len(parts.pictures)))
            picture, rows, columns = _placed(rng, settings, parts.pictures[label])
            alpha = np.zeros(settings.size, np.float32)
            alpha[rows, columns] = picture[..., 3] / np.float32(255)
            seen = alpha >= VISIBLE / 255
            after = np.where(seen, len(areas) + 1, owner)
            left = np.bincount(after.ravel(), minlength=len(areas) + 2)[1:]
            if np.all(left[:-1] >= LEAST_SEEN * np.array(areas)) and left[-1]:
                break
        else:
            continue
        owner = after
        areas.append(left[-1])
        labels.append(label)
        share = alpha[rows, columns, None]
        image[rows, columns] = (1 - share) * image[rows, columns] + share * picture[..., :3]
    boxes = np.zeros((settings.objects[1], 4), np.float32)
    class_labels = np.zeros(settings.objects[1], np.int32)
    class_labels[: len(labels)] = labels
    for index in range(len(labels)):
        boxes[index] = _box(owner == index + 1)
    classes = np.array([0, *(label + 1 for label in labels)], np.uint8)
    return Scene(
        np.rint(image).astype(np.uint8),
        boxes,
        class_labels,
        np.arange(settings.objects[1]) < len(labels),
        classes[owner],
    )


def _background(
    rng: np.random.Generator, size: tuple[int, int], photographs: tuple[np.ndarray, ...]
) -> np.ndarray:
    """uint8 [X, Y, 3]: a random part of a photograph, made smaller by up to `ZOOM`."""
    from PIL import Image

    photograph = photographs[rng.integers(len(photographs))]
    whole = np.array(photograph.shape[:2])
    part = np.array(size) * min(rng.uniform(1, ZOOM), *(whole / size))
    top, left = rng.uniform(0, 1, 2) * (whole - part)
    box = (left, top, min(left + part[1], whole[1]), min(top + part[0], whole[0]))
    picture = Image.fromarray(photograph).resize(
        (size[1], size[0]), Image.Resampling.BICUBIC, box=box
    )
    return np.asarray(picture)[:, :: rng.choice((1, -1))]


def _placed(
    rng: np.random.Generator, settings: SceneSettings, pictures: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, slice, slice]:
    """A random picture, uint8 [S, S, 4], of a random size, perhaps mirrored; its place."""
    from PIL import Image

    picture = Image.fromarray(pictures[rng.integers(len(pictures))], "RGBA")
    side = round(rng.uniform(*settings.object_size) * min(settings.size))
    # Pillow resizes colours times alpha, so that transparent pixels lend none.
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
    top, left = (int(rng.integers(whole - side, endpoint=True)) for whole in settings.size)
    return pixels[:, :: rng.choice((1, -1))], slice(top, top + side), slice(left, left + side)


def _box(seen: np.ndarray) -> np.ndarray:
    """[4]: centre, width and height, as shares, of the box around what is True in [X, Y]."""
    low, high = [], []
    for axis in (0, 1):  # along columns, along rows
        found = np.flatnonzero(seen.any(axis=axis))
        low.append(found[0] / seen.shape[1 - axis])
        high.append((found[-1] + 1) / seen.shape[1 - axis])
    ends = np.array([low, high])
    return np.concatenate([ends.mean(axis=0), ends[1] - ends[0]]).astype(np.float32)
