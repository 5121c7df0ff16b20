"""Google's emoji pictures with their names and categories, as a TFDS builder.

1,911 pictures of 64 x 64 pixels (Noto Emoji, Apache-2.0) from the package emoji-datasource-google
(Cal Henderson, MIT), in the nine categories of Unicode and a few components of others.

Importing this file imports tensorflow_datasets (about a second), never TensorFlow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from fmjax.data import assets
from fmjax.data.builders import prepared, read_split
from fmjax.data.decoding import on_white
from fmjax.data.image_text import ImageTexts
from fmjax.data.images import ImageExamples, resized
from fmjax.data.splits import SPLITS, hash_split

PICTURES = 1_911
CATEGORIES = (
    "Activities", "Animals & Nature", "Component", "Flags", "Food & Drink", "Objects",
    "People & Body", "Smileys & Emotion", "Symbols", "Travel & Places",
)  # fmt: skip
SIDE = 64


class Emoji(NamedTuple):
    """One picture.

    Attributes:
      code: its code points in hexadecimal, "1f9d1-200d-1f373".
      name: in small letters, "cook".
      category: one of `CATEGORIES`.
      file: of the picture.
    """

    code: str
    name: str
    category: str
    file: Path


def load_emoji(split: str, *, size: int = SIDE) -> ImageExamples:
    """The pictures of a split on white, with their categories; the first call fetches them.

    Args:
      split: "train", "val" or "test": about 80, 10 and 10 %, by a hash of the first code point, so
        that a person and the same person with long hair are not in two splits. The components,
        which are no pictures of their own, are left out.
      size: rows and columns that they are resized to.

    Raises:
      ValueError: there is no such split.
      OSError: the asset cannot be downloaded.
    """
    pairs = load_emoji_names(split, size=size)
    assert pairs.labels is not None  # every emoji has a category
    return ImageExamples(pairs.images, pairs.labels, pairs.label_names)


def load_emoji_names(split: str, *, size: int = SIDE) -> ImageTexts:
    """The pictures of a split on white with their names, and their categories as labels.

    Args:
      split, size: as in `load_emoji`.

    Raises:
      ValueError: there is no such split.
      OSError: the asset cannot be downloaded.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; there are {list(SPLITS)}")
    classes = tuple(name for name in CATEGORIES if name != "Component")
    rows = [
        (resized(on_white(row["image"]), (size, size)), row["name"], classes.index(category))
        for row in read_split(prepared(EmojiPictures), split, ("image", "name", "category"))
        if (category := CATEGORIES[row["category"]]) in classes
    ]
    images, names, labels = zip(*rows, strict=True)
    return ImageTexts(np.stack(images), list(names), np.array(labels, np.int32), classes)


def emoji_pictures(split: str) -> list[tuple[np.ndarray, str]]:
    """The pictures of a split, uint8 [64, 64, 4] with transparency, each with its category.

    Raises:
      OSError: the asset cannot be downloaded.
    """
    rows = read_split(prepared(EmojiPictures), split, ("image", "category"))
    return [(row["image"], CATEGORIES[row["category"]]) for row in rows]


def named_emoji(split: str, *, size: int = SIDE) -> tuple[np.ndarray, list[str]]:
    """The pictures of a split on white, uint8 [N, size, size, 3], and the name of each.

    Args:
      split: as `load_emoji` has them; components are left out here too.
      size: rows and columns that they are resized to.

    Raises:
      ValueError: there is no such split.
      OSError: the asset cannot be downloaded.
    """
    pairs = load_emoji_names(split, size=size)
    return pairs.images, list(pairs.texts)


class EmojiPictures(tfds.core.GeneratorBasedBuilder):
    """Pictures of emoji with names and categories."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=str(__doc__),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 4), encoding_format="png"),
                    "name": tfds.features.Text(),
                    "category": tfds.features.ClassLabel(names=CATEGORIES),
                }
            ),
            homepage="https://github.com/iamcal/emoji-data",
            license="MIT, the pictures Apache-2.0",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # the asset is a package, not a URL
        found = read_emoji(assets.fetch("emoji"), PICTURES)
        return {
            split: self._generate_examples([one for one in found if split_of(one.code) == split])
            for split in SPLITS
        }

    def _generate_examples(self, found: list[Emoji]) -> Iterator[tuple[str, dict[str, Any]]]:
        for one in found:
            image = rgba(one.file)
            yield one.code, {"image": image, "name": one.name, "category": one.category}


def split_of(code: str) -> str:
    """The split of an emoji, by its first code point."""
    return hash_split(f"emoji/{code.partition('-')[0]}")


def read_emoji(folder: Path, count: int) -> list[Emoji]:
    """Reads emoji.json, whose pictures must be there.

    Raises:
      ValueError: entries of another form, pictures outside the folder, or not `count` of them.
    """
    entries = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    pictures = {path.name: path for path in folder.rglob("*.png")}
    found, problems = [], []
    for entry in entries:
        code, file = str(entry.get("unified")).lower(), entry.get("image")
        if entry.get("category") not in CATEGORIES or file not in pictures:
            problems.append(f"{code}: category {entry.get('category')!r}, picture {file!r}")
            continue
        name = str(entry["name"] or entry["short_name"]).lower()
        found.append(Emoji(code, name, entry["category"], pictures[file]))
    if problems or len(found) != count or len({one.code for one in found}) != count:
        raise ValueError(
            f"{folder / 'emoji.json'}: {len(found)} emoji with {len({o.code for o in found})} "
            f"codes, where there are {count}; of no known form: {problems[:5]}"
        )
    return found


def rgba(path: Path) -> Any:
    """A picture of Pillow's, 64 x 64 with transparency; most files have a palette."""
    from PIL import Image

    with Image.open(path) as file:
        picture = file.convert("RGBA")
        if picture.size != (SIDE, SIDE):
            picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return picture
