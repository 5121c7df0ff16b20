"""Data: assets from packages, texts from any source, and batches as a resumable stream.

Heavy packages (tensorflow_datasets, grain, datasets) are imported by the functions that need them.
"""

from fmjax.data.alignment import AlignedWords, align_labels
from fmjax.data.assets import available, fetch
from fmjax.data.batches import BatchStream
from fmjax.data.columns import Columns, Ragged
from fmjax.data.encoding import (
    EncodedText,
    encode,
    encode_choices,
    encode_retrieval,
    encode_seq2seq,
)
from fmjax.data.text import TextExamples, from_datasets, from_tfds, load_text, read_text

__all__ = [
    "AlignedWords",
    "BatchStream",
    "Columns",
    "EncodedText",
    "Ragged",
    "TextExamples",
    "align_labels",
    "available",
    "encode",
    "encode_choices",
    "encode_retrieval",
    "encode_seq2seq",
    "fetch",
    "from_datasets",
    "from_tfds",
    "load_text",
    "read_text",
]
