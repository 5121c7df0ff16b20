"""Pictures into class names by a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import fmjax.hub as hub
from fmjax.data.columns import Columns
from fmjax.data.image_processor import load_image_processor
from fmjax.recipes.texts import evaluation_batches
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.apply import collect
from fmjax.tasks.pixels import normalised

HEADS = ("image_classification", "image_classification_with_teacher")


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
    folder = hub.find_folder(model)
    processor = load_image_processor(folder)
    batch = processor.batch(images)
    module, variables = hub.load(folder)
    if module.head not in HEADS:
        raise ValueError(f"{model} has the head {module.head!r}; classifying needs one of {HEADS}")
    if processor.channels != module.config.num_channels:
        raise ValueError(
            f"the model takes pictures of {module.config.num_channels} channels, and its "
            f"preprocessor_config.json makes {processor.channels}: image_mean must have as many"
        )
    if processor.do_pad:
        raise ValueError(
            f"{processor.image_processor_type} pads pictures, which no classifier does"
        )
    predict = jax.jit(normalised(task.predict(module), *processor.normalisation))
    stream = evaluation_batches(Columns((), batch), batch_size=min(batch_size, len(images)))
    return module.config.id2label, collect(predict, variables, stream, size=len(images))
