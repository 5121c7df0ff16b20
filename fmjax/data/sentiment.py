"""Sentences with ratings of their sentiment (Hutto and Gilbert 2014), as a TFDS builder.

C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM 2014, section 3.2: four sets of short texts, each text rated from -4 (extremely
negative) to 4 (extremely positive) by at least 20 screened people; the rating is their mean.

Importing this file imports tensorflow_datasets (about a second), never TensorFlow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from fmjax.data import assets
from fmjax.data.builders import prepared
from fmjax.data.splits import SPLITS, hash_split
from fmjax.data.text import TextExamples, from_builder


class Source(NamedTuple):
    """One of the four sets.

    Attributes:
      file: its file in the "sentiment" asset.
      count: of its texts.
      description: what the texts are.
    """

    file: str
    count: int
    description: str


SETS = {
    "movie": Source("movieReviewSnippets_GroundTruth.txt", 10_605, "sentences of film reviews"),
    "tweets": Source("tweets_GroundTruth.txt", 4_200, "tweets"),
    "amazon": Source("amazonReviewSnippets_GroundTruth.txt", 3_708, "sentences of product reviews"),
    "editorials": Source(
        "nytEditorialSnippets_GroundTruth.txt", 5_190, "sentences of newspaper editorials"
    ),
}


class Row(NamedTuple):
    id: str
    rating: float
    text: str


def load_sentiment(set_name: str, split: str, *, label: str | None = "label") -> TextExamples:
    """Loads one split of a sentiment set; the first call fetches and prepares it.

    Args:
      set_name: "movie", "tweets", "amazon" or "editorials".
      split: "train", "val" or "test": 80, 10 and 10 % by a hash (see `split_of`).
      label: "label" for the classes negative and positive (rating > 0), "rating" for regression
        on the mean rating in -4..4, None for texts alone.

    Raises:
      ValueError: an unknown set, split or label.
      OSError: the asset cannot be downloaded.
    """
    problem_type = "regression" if label == "rating" else "single_label_classification"
    return from_builder(builder(set_name), split, label=label, problem_type=problem_type)


def builder(set_name: str) -> Sentiment:
    """The TFDS builder of one set, prepared: its files are in the cache folder.

    Raises:
      ValueError: an unknown set.
      OSError: the asset cannot be downloaded or the cache folder cannot be written.
    """
    if set_name not in SETS:
        raise ValueError(f"no sentiment set is called {set_name!r}; there are {sorted(SETS)}")
    return prepared(Sentiment, config=set_name)


class Sentiment(tfds.core.GeneratorBasedBuilder):
    """Sentences with the mean of at least 20 ratings of their sentiment."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Split by the hash of the group."}  # noqa: RUF012
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name, description=source.description)
        for name, source in SETS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=str(__doc__),
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "text": tfds.features.Text(),
                    "rating": tfds.features.Scalar(np.float32),
                    "label": tfds.features.ClassLabel(names=["negative", "positive"]),
                }
            ),
            homepage="https://github.com/cjhutto/vaderSentiment",
            license="MIT",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # the asset is a package, not a URL
        name = self.info.config_name or ""
        rows = parse(assets.fetch("sentiment") / SETS[name].file, SETS[name].count)
        splits = split_of(name, rows)
        return {
            split: self._generate_examples(
                [row for row, its_split in zip(rows, splits, strict=True) if its_split == split]
            )
            for split in SPLITS
        }

    def _generate_examples(self, rows: list[Row]) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in rows:
            yield (
                row.id,
                {
                    "id": row.id,
                    "text": row.text,
                    "rating": np.float32(row.rating),
                    "label": int(row.rating > 0),
                },
            )


def parse(path: Path, count: int) -> list[Row]:
    """Reads one ``*_GroundTruth.txt``: id, mean rating and text, tab-separated, CRLF, UTF-8.

    Quotation marks are plain characters there, so this is not the csv format.

    Raises:
      ValueError: a line of another form, a repeated id, or not `count` rows.
    """
    # Lines end in CRLF alone: the texts may hold characters that str.splitlines breaks at.
    lines = path.read_bytes().decode("utf-8").removesuffix("\r\n").split("\r\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        cells = line.split("\t")
        if len(cells) != 3 or not re.fullmatch(r"\d+(_\d+)?", cells[0]) or not cells[2].strip():
            raise ValueError(f"{path}, line {number}: id, rating, text expected, found {line!r}")
        rating = float(cells[1])
        if not -4 <= rating <= 4:
            raise ValueError(f"{path}, line {number}: rating {rating} is outside -4..4")
        rows.append(Row(cells[0], rating, cells[2].strip()))
    if len(rows) != count or len({row.id for row in rows}) != count:
        ids = len({row.id for row in rows})
        raise ValueError(f"{path}: {len(rows)} rows with {ids} ids, but the set has {count}")
    return rows


def split_of(set_name: str, rows: list[Row]) -> list[str]:
    """The split of each row: 80 % train, 10 % val, 10 % test, by a hash of its group.

    Rows are in one group if they are sentences of one text or have the same words (letter case
    and punctuation aside), so that neither half a review nor a repeated text is in two splits.
    With ``h = int(sha256(f"{set_name}/{key}").hexdigest()[:8], 16) % 10``, where the key is the
    lowest text number of the group, h < 8 is train, 8 is val and 9 is test.
    """
    # Union-find over text numbers; the root of a group is its lowest number.
    parent: dict[int, int] = {}

    def root(number: int) -> int:
        while parent.setdefault(number, number) != number:
            number = parent[number]
        return number

    # 12 for "12_3", sentence 3 of text 12, and for "12", a text of its own.
    numbers = [int(row.id.split("_")[0]) for row in rows]
    first_with: dict[str, int] = {}
    for number, row in zip(numbers, rows, strict=True):
        # A text without words, such as "!!", says nothing about where it is from.
        words = " ".join(re.findall(r"\w+", row.text.casefold())) or row.id
        low, high = sorted((root(number), root(first_with.setdefault(words, number))))
        parent[high] = low
    splits = []
    for number in numbers:
        splits.append(hash_split(f"{set_name}/{root(number)}"))
    return splits
