"""Commands that look at pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from fmjax.cli.arguments import ModelArg, some_pictures, told_apart
from fmjax.recipes.generation import Writing


@dataclasses.dataclass(frozen=True)
class Classify:
    """Say what is in pictures."""

    model: ModelArg
    """A folder or hub id of an image classifier."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """The files."""
    top: int = 5
    """Classes that are named, the likeliest first."""
    json: bool = False
    """Print one JSON object a line."""


@dataclasses.dataclass(frozen=True)
class Detect:
    """Find objects in pictures: class, score and box (left, top, right, bottom) in pixels."""

    model: ModelArg
    """A folder or hub id of a detector."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """The files."""
    threshold: float = 0.5
    """The least score of an object."""
    out: Path | None = None
    """A folder for the pictures with the boxes drawn, NAME.png each."""
    json: bool = False
    """Print one JSON object a line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption(Writing):
    """Write what is on pictures."""

    model: ModelArg
    """A folder or hub id of a vision encoder-decoder."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """The files."""
    json: bool = False
    """Print one JSON object a line."""


def classify(args: Classify) -> None:
    from fmjax.recipes.pictures import classify_images

    images = some_pictures(args.images, "classify")
    if args.top < 1:
        raise ValueError(f"top={args.top} must be at least 1")
    names, rows = classify_images(args.model, images)
    names = told_apart(names)
    for path, row in zip(images, rows, strict=True):
        scores = {names[i]: round(float(row[i]), 6) for i in (-row).argsort()[: args.top]}
        if args.json:
            print(json.dumps({"image": str(path), "scores": scores}, ensure_ascii=False))
            continue
        print(path)
        for name, score in scores.items():
            print(f"  {score:.4f}\t{name}")


def detect(args: Detect) -> None:
    from fmjax.recipes.pictures import detect_images, drawn_files, save_drawn

    images = some_pictures(args.images, "detect")
    if args.out is not None:
        drawn_files(args.out, images)  # before anything is computed
    names, rows = detect_images(args.model, images, threshold=args.threshold)
    for path, found in zip(images, rows, strict=True):
        objects = [
            {"label": names[label], "score": round(float(score), 6), "box": box.round(1).tolist()}
            for box, score, label in zip(*found, strict=True)
        ]
        if args.json:
            print(json.dumps({"image": str(path), "objects": objects}, ensure_ascii=False))
            continue
        print(path)
        for thing in objects:
            corners = " ".join(f"{end:.1f}" for end in thing["box"])
            print(f"  {thing['score']:.4f}\t{thing['label']}\t{corners}")
    if args.out is not None:
        save_drawn(args.out, images, rows, names)


def caption(args: Caption) -> None:
    from fmjax.recipes.captioning import caption_images

    images = some_pictures(args.images, "caption")
    texts = caption_images(args.model, images, seed=args.seed, options=args.options())
    for path, text in zip(images, texts, strict=True):
        if args.json:
            print(json.dumps({"image": str(path), "caption": text}, ensure_ascii=False))
        else:
            print(f"{path}\t{text}")
