"""Commands that read texts: classes, vectors, tags, answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fmjax.cli.arguments import ModelArg, given, told_apart
from fmjax.recipes.texts import LabelledTexts


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classify texts."""

    model: ModelArg
    """A folder or hub id of a classifier."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The texts."""
    file: Path | None = None
    """A file with one text a line, beside or instead of `texts`."""
    text_pair: tuple[str, ...] = ()
    """Second texts, one for each of the texts, of a classifier of pairs."""
    max_length: int = 512
    """Tokens a text is cut to."""
    json: bool = False
    """Print one JSON object a line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(LabelledTexts):
    """Measure a classifier on labelled texts."""

    model: ModelArg
    """A folder or hub id of a classifier."""
    split: str = "test"
    """Split of a named set; a file is read whole."""
    json: bool = False
    """Print the metrics as JSON."""


@dataclasses.dataclass(frozen=True)
class Embed:
    """Write one vector a text to a .npy file."""

    model: ModelArg
    """A folder or hub id, or "minilm"."""
    file: Annotated[Path, tyro.conf.Positional]
    """A file with one text a line."""
    output: Annotated[Path, tyro.conf.Positional]
    """The .npy file: float32 [N, D]."""
    pooling: Literal["mean", "cls", "max", "pooler"] | None = None
    """How tokens become one vector; by default as a folder of sentence-transformers says, which may
    also scale vectors and put a prompt before texts, and of other folders their mean."""
    normalize: bool = False
    """Scale vectors to length 1 in any case."""
    max_length: int | None = None
    """Tokens a text is cut to; by default what the folder says, and at most 512 where it is not of
    sentence-transformers."""


@dataclasses.dataclass(frozen=True)
class Tag:
    """Tag the words of texts: parts of speech, names, ..."""

    model: ModelArg
    """A folder or hub id of a token classifier."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The texts."""
    file: Path | None = None
    """A file with one text a line, beside or instead of `texts`."""
    max_length: int = 512
    """Tokens a text is cut to."""
    json: bool = False
    """Print one JSON object a line."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """Answer questions about a text by passages of it."""

    model: ModelArg
    """A folder or hub id of a question-answering model."""
    questions: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The questions."""
    context: str | None = None
    """The text."""
    file: Path | None = None
    """A file with the text, instead of `context`."""
    must_answer: bool = False
    """Never say that the text has no answer."""
    max_length: int = 384
    """Tokens of a window of the text."""
    json: bool = False
    """Print one JSON object a line."""


def predict(args: Predict) -> None:
    from fmjax.recipes.predict import predict_texts

    texts = given(args.texts, args.file, "predict")
    names, rows = predict_texts(
        args.model, texts, text_pairs=args.text_pair or None, max_length=args.max_length
    )
    names = told_apart(names)
    for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
        said = {"text": text, **({"text_pair": args.text_pair[i]} if args.text_pair else {})}
        scores = {name: round(float(score), 6) for name, score in zip(names, row, strict=True)}
        if args.json:
            print(json.dumps({**said, "scores": scores}, ensure_ascii=False))
        else:
            best = max(scores, key=lambda name: scores[name])
            print(f"{best}\t{scores[best]:.4f}", *said.values(), sep="\t")


def evaluate(args: Evaluate) -> None:
    from fmjax.recipes.predict import evaluate_texts

    metrics = evaluate_texts(args.model, args, args.split)
    if args.json:
        print(json.dumps(metrics, indent=2))
        return
    for name, value in metrics.items():
        if isinstance(value, float):
            print(f"{name}\t{value:.4f}")
    if "report_text" in metrics:
        print(metrics["report_text"])


def embed(args: Embed) -> None:
    import numpy as np

    from fmjax.recipes.predict import embed_texts, read_texts
    from fmjax.report.run_folder import atomic_write
    from fmjax.train.recording import writable_folder

    writable_folder(args.output.parent)
    vectors = embed_texts(
        args.model,
        read_texts(args.file),
        pooling=args.pooling,
        normalize=args.normalize,
        max_length=args.max_length,
    )
    with atomic_write(args.output) as file:
        np.save(file, vectors)
    print(f"{args.output}: float32 {list(vectors.shape)}")


def tag(args: Tag) -> None:
    from fmjax.recipes.predict import tag_texts

    texts = given(args.texts, args.file, "tag")
    found = tag_texts(args.model, texts, max_length=args.max_length)
    for text, pairs in zip(texts, found, strict=True):
        if args.json:
            print(json.dumps({"text": text, "tags": pairs}, ensure_ascii=False))
        else:
            print(" ".join(f"{word}/{'?' if name is None else name}" for word, name in pairs))


def answer(args: Answer) -> None:
    from fmjax.recipes.predict import answer_texts

    if not args.questions:
        raise ValueError('no question; write it after the model: fmjax answer MODEL "Who ...?"')
    if (args.context is None) == (args.file is None):
        raise ValueError("give the text by exactly one of --context TEXT and --file FILE")
    context = args.context if args.file is None else args.file.read_text(encoding="utf-8")
    assert context is not None
    predictions = answer_texts(
        args.model,
        args.questions,
        context,
        must_answer=args.must_answer,
        max_length=args.max_length,
    )
    for question, prediction in zip(args.questions, predictions, strict=True):
        best = prediction.candidates[0]
        if args.json:
            found = {"question": question, "answer": prediction.text}
            found |= {"probability": best.probability, "start": best.start, "end": best.end}
            print(json.dumps(found, ensure_ascii=False))
        else:
            print(prediction.text or "(no answer)")
