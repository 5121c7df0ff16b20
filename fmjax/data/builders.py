"""What the TFDS builders of this folder share: prepared once in the cache folder, read as Python.

Importing this file imports tensorflow_datasets (about a second), never TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds

from fmjax.data import assets

Builder = TypeVar("Builder", bound=tfds.core.DatasetBuilder)


def prepared(make: Callable[..., Builder], *, config: str | None = None) -> Builder:
    """A builder whose files are in the cache folder, as array_record.

    Args:
      make: the class of the builder.
      config: the name of one of its configurations, if it has some.

    Raises:
      OSError: an asset cannot be downloaded or the cache folder cannot be written.
    """
    place: dict[str, Any] = {"data_dir": str(assets.home() / "tfds"), "file_format": "array_record"}
    if config is not None:
        place["config"] = config
    first = make(**place)
    try:
        first.download_and_prepare()
    except OSError:
        # TFDS writes into a folder of its own and renames it, which fails if another process
        # was faster. Its files are the same, so a builder that finds them there will do.
        second = make(**place)
        if not second.data_path.is_dir():
            raise
        return second
    return first


def read_split(
    builder: tfds.core.DatasetBuilder, split: str, columns: Sequence[str]
) -> list[dict[str, Any]]:
    """All examples of a split, in the order they are stored; texts are strings.

    Args:
      builder: a prepared one.
      split: "train", "val", "test", or a slice of one ("train[:10%]").
      columns: the features to read. TFDS would decode all, which takes several times as long.

    Raises:
      ValueError: there is no such split.
    """
    read: Any = builder.as_data_source  # its decorator hides the signature
    source = read(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    features: Any = builder.info.features
    wanted: Any = tfds.features.FeaturesDict({name: features[name] for name in columns})
    # All records at once: reading them one by one takes several times as long.
    records = source.__getitems__(range(len(source)))
    return [
        {name: plain(value) for name, value in wanted.deserialize_example_np(record).items()}
        for record in records
    ]


def plain(value: Any) -> Any:
    """TFDS gives texts as bytes, alone or in a list; here they are strings."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object):
        return [plain(item) for item in value]
    return value
