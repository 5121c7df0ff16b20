"""Data: assets from packages, texts from any source, and batches as a resumable stream.

Heavy packages (tensorflow_datasets, grain, datasets) are imported by the functions that need them.
"""

from fmjax.data.alignment import AlignedWords, align_labels
from fmjax.data.assets import available, fetch
from fmjax.data.batches import BatchStream
from fmjax.data.columns import Columns, Ragged
from fmjax.data.conll import read_conll, read_conllu
from fmjax.data.corpus import iterate_documents, read_documents
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
from fmjax.data.parallel import read_aligned, read_pairs
from fmjax.data.preferences import encode_completions, encode_preferences
from fmjax.data.records import Answer, Documents, Questions, TaggedSentences, TextPairs
from fmjax.data.squad import read_squad
from fmjax.data.streaming import TextBlocks, stream_batches
from fmjax.data.text import TextExamples, from_datasets, from_tfds, load_text, read_text
from fmjax.data.tokenizer import train_tokenizer
from fmjax.data.translations import load_translations
from fmjax.data.windows import QuestionWindows, encode_questions, scoring_windows

__all__ = [
    "AlignedWords",
    "Answer",
    "BatchStream",
    "Columns",
    "Denoising",
    "Documents",
    "EncodedText",
    "QuestionWindows",
    "Questions",
    "Ragged",
    "SpanCorruption",
    "TaggedSentences",
    "TextBlocks",
    "TextExamples",
    "TextPairs",
    "TokenDocuments",
    "align_labels",
    "available",
    "encode",
    "encode_choices",
    "encode_completions",
    "encode_documents",
    "encode_preferences",
    "encode_questions",
    "encode_retrieval",
    "encode_sentences",
    "encode_seq2seq",
    "fetch",
    "from_datasets",
    "from_tfds",
    "iterate_documents",
    "language_batches",
    "load_text",
    "load_translations",
    "next_sentence_pairs",
    "read_aligned",
    "read_conll",
    "read_conllu",
    "read_documents",
    "read_pairs",
    "read_squad",
    "read_text",
    "restore_spans",
    "scoring_windows",
    "sentence_order_pairs",
    "stream_batches",
    "train_tokenizer",
]
