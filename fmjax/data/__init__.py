"""Data: assets from packages, texts from any source, and batches as a resumable stream.

Heavy packages (tensorflow_datasets, grain, datasets) are imported by the functions that need them.
"""

from fmjax.data.alignment import AlignedWords, align_labels
from fmjax.data.assets import available, fetch
from fmjax.data.batches import BatchStream
from fmjax.data.columns import Columns, Ragged
from fmjax.data.corruption import Denoising, SpanCorruption, restore_spans
from fmjax.data.encoding import (
    EncodedText,
    encode,
    encode_choices,
    encode_retrieval,
    encode_seq2seq,
)
from fmjax.data.language import TokenDocuments, encode_documents, language_batches
from fmjax.data.pairs import encode_sentences, next_sentence_pairs, sentence_order_pairs
from fmjax.data.streaming import TextBlocks, stream_batches
from fmjax.data.text import TextExamples, from_datasets, from_tfds, load_text, read_text
from fmjax.data.windows import QuestionWindows, encode_questions, scoring_windows

__all__ = [
    "AlignedWords",
    "BatchStream",
    "Columns",
    "Denoising",
    "EncodedText",
    "QuestionWindows",
    "Ragged",
    "SpanCorruption",
    "TextBlocks",
    "TextExamples",
    "TokenDocuments",
    "align_labels",
    "available",
    "encode",
    "encode_choices",
    "encode_documents",
    "encode_questions",
    "encode_retrieval",
    "encode_sentences",
    "encode_seq2seq",
    "fetch",
    "from_datasets",
    "from_tfds",
    "language_batches",
    "load_text",
    "next_sentence_pairs",
    "read_text",
    "restore_spans",
    "scoring_windows",
    "sentence_order_pairs",
    "stream_batches",
]
