"""Predictions, tags, answers and embeddings of texts by a saved model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fmjax.hub as hub
from fmjax.config import read_config
from fmjax.data import TextExamples, align_labels, load_text
from fmjax.data.files import raise_problems
from fmjax.data.records import Questions
from fmjax.data.windows import encode_questions
from fmjax.recipes.sentence_folders import Pooling, read_pooling
from fmjax.recipes.texts import (
    LabelledTexts,
    encode_splits,
    evaluation_batches,
    labels_of,
    model_source,
    padding_of,
    text_length,
)
from fmjax.tasks import question_answering as answering
from fmjax.tasks import sequence_classification as task
from fmjax.tasks import token_classification as tagging
from fmjax.tasks.apply import collect, collect_ragged
from fmjax.tasks.feature_extraction import embed
from fmjax.types import one_text


def read_texts(path: str | Path) -> list[str]:
    """One text a line of a UTF-8 file.

    Raises:
        ValueError: not UTF-8, or no lines, or empty ones.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 (byte {error.start}); convert it, for instance with iconv"
        ) from error
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if not lines or empty:
        raise ValueError(
            f"{file}: lines {empty[:10]} are empty"
            if lines
            else f"{file} is empty; one text a line"
        )
    return lines


def load_as(source: str | Path, head: str) -> tuple[Any, Any]:
    """The model and variables of a folder or hub id that has this head.

    Raises:
        ValueError: config.json says that the weights are another head's, which may have the same
            shapes.
    """
    folder = hub.find_folder(source)
    data = read_config(folder)
    model_type, architectures = data.get("model_type"), data.get("architectures") or ()
    if isinstance(model_type, str):
        heads = {name: own for own, name in hub.family_of(model_type).HEADS.items()}
        said = [heads[plain] for x in architectures if (plain := x.removeprefix("Flax")) in heads]
        if said and head not in said:
            raise ValueError(
                f"{source} has the head {said[0]!r} ({', '.join(architectures)}); this needs a "
                f"model with the head {head!r}"
            )
    return hub.load(folder, head=head)


def _rows(
    fn: Any, model: Any, variables: Any, tokenizer: Any, texts: TextExamples, max_length: int
) -> np.ndarray:
    encoded = encode_splits(
        tokenizer,
        {"texts": texts},
        max_length=text_length(model, max_length),
        vocab_size=model.config.vocab_size,
    )["texts"]
    stream = evaluation_batches(encoded, padding_of(tokenizer, model))
    return collect(jax.jit(fn), variables, stream, size=len(texts))


def predict_texts(
    model: str,
    texts: Sequence[str],
    *,
    text_pairs: Sequence[str] | None = None,
    max_length: int = 512,
) -> tuple[tuple[str, ...], np.ndarray]:
    """(label names, rows [N, C]) of a classifier: probabilities, or numbers of a regression.

    Args:
        model: a folder or hub id with a sequence-classification head.
        texts: N texts.
        text_pairs: N second texts, of a classifier of pairs.
        max_length: tokens a text (or a pair) is cut to.

    Raises:
        ValueError: another number of second texts than of first ones.
    """
    examples = TextExamples(texts, None, (), text_pairs)
    source = model_source(model)
    module, variables = load_as(source, "sequence_classification")
    rows = _rows(
        task.predict(module), module, variables, hub.load_tokenizer(source), examples, max_length
    )
    return module.config.id2label, rows


def embed_texts(
    model: str,
    texts: Sequence[str],
    *,
    pooling: str | None = None,
    normalize: bool = False,
    max_length: int | None = None,
) -> np.ndarray:
    """Vectors [N, D] float32 of texts; see `fmjax.tasks.feature_extraction.embed`.

    Args:
        model: a folder or hub id.
        texts: N texts.
        pooling: None is what a folder of sentence-transformers says, with its scale, its prompt
            and its length, and of other folders "mean".
        normalize: scale vectors to length 1 in any case.
        max_length: tokens a text is cut to; None is what the folder says, at most 512 where it is
            not of sentence-transformers.

    Raises:
        ValueError: the folder is of sentence-transformers and makes vectors in another way.
    """
    raise_problems("embed_texts", one_text("texts", texts))
    source = hub.find_folder(model_source(model))
    found = read_pooling(source) if pooling is None else None
    said = found or Pooling(pooling=pooling or "mean")
    module, variables = hub.load(source, head="model")
    tokenizer = hub.load_tokenizer(source)
    most = tokenizer.model_max_length  # 1e30 where nobody has said it
    longest = said.max_length or (most if found and most < 1e9 else min(512, most))
    texts = [said.prompt + text for text in texts]
    return _rows(
        embed(module, pooling=said.pooling, normalize=normalize or said.normalize),
        module,
        variables,
        tokenizer,
        TextExamples([text.lower() for text in texts] if said.lowercase else texts, None, ()),
        longest if max_length is None else max_length,
    )


def evaluate_texts(model: str, data: LabelledTexts, split: str) -> dict[str, Any]:
    """Metrics of a saved classifier on labelled texts.

    Args:
        model: a folder or hub id; its label names are those the texts must use.
        data: where the texts come from; a file is read whole, whatever `split` says.
        split: of a named set.
    """
    source = model_source(model)
    module, variables = load_as(source, "sequence_classification")
    kind: Any = task.problem_type_of(module)
    texts = load_text(
        data.data,
        split if data.is_named() else None,
        text=data.text,
        text_pair=data.text_pair,
        label=data.label,
        label_names=None if kind == task.REGRESSION else module.config.id2label,
        problem_type=kind,
    )
    rows = _rows(
        task.predict(module),
        module,
        variables,
        hub.load_tokenizer(source),
        texts,
        data.max_length,
    )
    return task.metrics_of(module, rows, labels_of(texts))


# A word, perhaps with apostrophes or hyphens inside, or one other character.
WORD = re.compile(r"\w+(?:['\u2019.-]\w+)*|[^\w\s]")


def tag_texts(
    model: str, texts: Sequence[str], *, max_length: int = 512
) -> list[list[tuple[str, str | None]]]:
    """(word, tag) pairs of each text, by a token classifier.

    Args:
        model: a folder or hub id with a token-classification head.
        texts: N texts; words and punctuation are told apart as in most tagged corpora.
        max_length: tokens a text is cut to; the words behind get None.
    """
    raise_problems("tag_texts", one_text("texts", texts))
    source = model_source(model)
    module, variables = load_as(source, "token_classification")
    words = [WORD.findall(text) for text in texts]
    aligned = align_labels(
        hub.load_tokenizer(source),
        words,
        max_length=text_length(module, max_length),
        vocab_size=module.config.vocab_size,
    )
    predict = jax.jit(tagging.predict(module))
    rows = collect_ragged(
        lambda variables, batch: np.argmax(predict(variables, batch), axis=-1),
        variables,
        evaluation_batches(aligned.columns, batch_size=min(64, len(texts))),
        size=len(texts),
    )
    names = module.config.id2label
    return [
        [(word, names[tag] if tag >= 0 else None) for word, tag in zip(text, tags, strict=True)]
        for text, tags in zip(words, aligned.by_word(rows), strict=True)
    ]


def answer_texts(
    model: str,
    questions: Sequence[str],
    context: str,
    *,
    must_answer: bool = False,
    max_length: int = 384,
) -> list[answering.Prediction]:
    """Answers to questions about one text of any length, which is read in overlapping windows.

    Args:
        model: a folder or hub id with a question-answering head.
        questions: N questions.
        context: the text.
        must_answer: whether "no answer" is never said.
        max_length: tokens of a window, of which a sixth at most are the question's and a third is
            shared with the window before.

    Raises:
        ValueError: an empty question or text, or a window that leaves no room for the text.
    """
    raise_problems("answer_texts", one_text("questions", questions))
    empty = [number for number, question in enumerate(questions) if not question.strip()]
    if empty or not context.strip():
        raise ValueError(f"questions {empty} are empty" if empty else "the text is empty")
    source = model_source(model)
    module, variables = load_as(source, "question_answering")
    asked = Questions(
        ids=[str(number) for number in range(len(questions))],
        questions=list(questions),
        contexts=[context] * len(questions),
        answers=None,
    )
    max_length = text_length(module, max_length)
    windows = encode_questions(
        hub.load_tokenizer(source),
        asked,
        max_length=max_length,
        doc_stride=max_length // 3,
        max_question_length=max_length // 6,
        vocab_size=module.config.vocab_size,
    )
    return answering.answer(
        module,
        variables,
        evaluation_batches(windows.columns, batch_size=min(16, len(windows))),
        windows,
        asked.contexts,
        no_answer_threshold=None if must_answer else 0.0,
    )
