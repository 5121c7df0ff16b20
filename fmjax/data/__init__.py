"""Data: assets from packages, texts from any source, and batches as a resumable stream.

Heavy packages (tensorflow_datasets, grain, datasets) are imported by the functions that need them.
"""

from fmjax.data.assets import available, fetch
from fmjax.data.batches import BatchStream, EncodedText, encode
from fmjax.data.text import TextExamples, from_datasets, from_tfds, load_text, read_text

__all__ = [
    "BatchStream",
    "EncodedText",
    "TextExamples",
    "available",
    "encode",
    "fetch",
    "from_datasets",
    "from_tfds",
    "load_text",
    "read_text",
]
