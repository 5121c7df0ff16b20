"""Pictures into class names, or into boxes of objects, by a saved model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fmjax.hub as hub
from fmjax.data.columns import Columns
from fmjax.data.decoding import decode
from fmjax.data.image_processor import ImageProcessor, load_image_processor
from fmjax.recipes.texts import evaluation_batches
from fmjax.tasks import object_detection, sequence_classification
from fmjax.tasks.apply import collect, collect_ragged
from fmjax.tasks.object_detection import Detections
from fmjax.tasks.pixels import normalised
from fmjax.types import Batch, Variables

CLASSIFIERS = ("image_classification", "image_classification_with_teacher")
DETECTORS = ("object_detection",)
COLOURS = ("red", "lime", "blue", "magenta", "orange", "cyan", "yellow", "white")


def open_pictures(
    model: str, images: Sequence[str | Path], heads: Collection[str]
) -> tuple[Any, Variables, ImageProcessor, dict[str, np.ndarray]]:
    """A model of one of these heads, its variables, its processor, and the pictures as it wants
    them: see `ImageProcessor.batch`.

    Args:
        model: a folder or hub id, with its preprocessor_config.json.
        images: files.
        heads: what the model may have.

    Raises:
        OSError: no such model.
        ValueError: files that are no pictures, all of them named, or a model of another head.
    """
    folder = hub.find_folder(model)
    processor = load_image_processor(folder)
    batch = processor.batch(images)
    module, variables = hub.load(folder)
    if module.head not in heads:
        raise ValueError(f"{model} has the head {module.head!r}; it must be one of {heads}")
    check_channels(processor, module.config)
    return module, variables, processor, batch


def check_channels(processor: ImageProcessor, config: Any) -> None:
    """Refuses a processor whose pictures have not the channels that a model takes.

    Raises:
        ValueError: they have not.
    """
    if processor.channels != config.num_channels:
        raise ValueError(
            f"the model takes pictures of {config.num_channels} channels, and its "
            f"preprocessor_config.json makes {processor.channels}: image_mean must have as many"
        )


def classify_images(
    model: str, images: Sequence[str | Path], *, batch_size: int = 16
) -> tuple[tuple[str, ...], np.ndarray]:
    """(class names, probabilities [N, C]) of pictures.

    Args:
        model: a folder or hub id of an image classifier, with its preprocessor_config.json.
        images: N files.
        batch_size: pictures that are computed at once.

    Raises:
        OSError: no such model.
        ValueError: files that are no pictures, all of them named, or a model that does not
            classify.
    """
    module, variables, processor, batch = open_pictures(model, images, CLASSIFIERS)
    if processor.do_pad:
        raise ValueError(
            f"{processor.image_processor_type} pads pictures, which no classifier does"
        )
    predict = jax.jit(normalised(sequence_classification.predict(module), *processor.normalisation))
    stream = evaluation_batches(Columns((), batch), batch_size=min(batch_size, len(images)))
    return module.config.id2label, collect(predict, variables, stream, size=len(images))


def detect_images(
    model: str, images: Sequence[str | Path], *, threshold: float = 0.5, batch_size: int = 4
) -> tuple[tuple[str, ...], list[Detections]]:
    """(class names, objects of each picture, with boxes in the pixels of its file).

    Args:
        model: a folder or hub id of a detector, with its preprocessor_config.json.
        images: N files.
        threshold: objects of lower scores are left out.
        batch_size: pictures that are computed at once.

    Raises:
        OSError: no such model.
        ValueError: files that are no pictures, all of them named, a model that does not detect, or
            a threshold that is no share.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must be from 0 to 1")
    module, variables, processor, batch = open_pictures(model, images, DETECTORS)
    predict = jax.jit(normalised(object_detection.predict(module), *processor.normalisation))

    def of_batch(variables: Variables, batch: Batch) -> Iterable[tuple[np.ndarray, ...]]:
        found = predict(variables, batch)
        return zip(
            *(np.asarray(found[name]) for name in ("scores", "labels", "boxes")), strict=True
        )

    stream = evaluation_batches(Columns((), batch), batch_size=min(batch_size, len(images)))
    shares = collect_ragged(of_batch, variables, stream, size=len(images))
    results = []
    for path, (scores, labels, boxes) in zip(images, shares, strict=True):
        rows, columns = decode(path).shape[:2]
        found = object_detection.in_pixels(scores, labels, boxes, (rows, columns))
        results.append(object_detection.above(found, threshold))
    return module.config.id2label, results


def drawn(
    image: np.ndarray, found: Detections, names: Sequence[str], *, zoom: int = 1
) -> np.ndarray:
    """A picture with the boxes, names and scores of what was found in it.

    Args:
        image: uint8 [X, Y, 3].
        found: its objects; a score of 1 is not written.
        names: of the classes.
        zoom: how many times larger it is drawn.
    """
    from PIL import Image, ImageDraw

    size = (image.shape[1] * zoom, image.shape[0] * zoom)
    picture = Image.fromarray(image).resize(size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for box, score, label in zip(*found, strict=True):
        colour = COLOURS[label % len(COLOURS)]
        left, top, right, bottom = (float(end) * zoom for end in box)
        # A box of a model in training may be thinner than a line.
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        pen.rectangle(corners, outline=colour, width=2)
        text = names[int(label)].split(" ")[0] + (f" {score:.2f}" if score < 1 else "")
        pen.text((left + 3, top + 1), text, fill=colour, stroke_width=1, stroke_fill="black")
    return np.asarray(picture)


def drawn_files(folder: Path, images: Sequence[Path]) -> list[Path]:
    """Where `save_drawn` writes each picture.

    Raises:
        ValueError: two of the pictures have one name.
    """
    files = [folder / f"{Path(image).stem}.png" for image in images]
    if twice := sorted({file.name for file in files if files.count(file) > 1}):
        raise ValueError(f"several pictures would be drawn as {twice}; draw them into two folders")
    return files


def save_drawn(
    folder: Path, images: Sequence[Path], found: Sequence[Detections], names: Sequence[str]
) -> None:
    """Writes pictures with the boxes of their objects: FOLDER/NAME.png each.

    Raises:
        ValueError: two of the pictures have one name.
        OSError: the folder cannot be written to.
    """
    from PIL import Image

    files = drawn_files(folder, images)
    folder.mkdir(parents=True, exist_ok=True)
    for file, image, objects in zip(files, images, found, strict=True):
        Image.fromarray(drawn(decode(image), objects, names)).save(file)
