"""What runs of image generators share: sheets of images, their quality, and when to give up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fmjax.hub as hub
from fmjax.data.columns import Columns
from fmjax.data.decoding import with_channels
from fmjax.data.images import ImageExamples
from fmjax.metrics import frechet_distance, kernel_distance
from fmjax.recipes.image_classification import Settings as Pictures
from fmjax.recipes.image_classification import data_url, fit
from fmjax.recipes.texts import evaluation_batches
from fmjax.recipes.training import STOPPED
from fmjax.report.run_folder import atomic_write
from fmjax.report.samples import save_samples
from fmjax.tasks.apply import collect
from fmjax.tasks.feature_extraction import embed
from fmjax.tasks.pixels import normalised
from fmjax.train.loop import Event, Hook
from fmjax.types import TrainState

Draw = Callable[[TrainState], np.ndarray]
"""state -> images [N, X, Y, C] from 0 to 1, of the same random numbers at every call."""


class CollapsedGenerator(ArithmeticError):
    """A generator makes one image whatever it is given."""


def spread(images: np.ndarray) -> float:
    """How much images differ: the standard deviation of a pixel over them, root mean square.

    Args:
        images: [N, X, Y, C] from 0 to 1.
    """
    return float(np.sqrt(np.var(images.reshape(len(images), -1), axis=0).mean()))


def watching(draw: Draw, real: np.ndarray, *, least: float = 0.1, after: int = 0) -> Hook:
    """A hook that ends the run of a generator from which nothing can be expected.

    Args:
        draw: makes the images that are looked at.
        real: [N, X, Y, C] from 0 to 1, which they should be like.
        least: of the real images' `spread`, what the made ones must have.
        after: steps in which images may be alike, as those of new weights are.

    Raises:
        FloatingPointError: when called, of images that are not finite.
        CollapsedGenerator: when called, of images that are all but alike.
    """
    wanted = least * spread(real)

    def hook(event: Event) -> None:
        images = draw(event.state)
        if wrong := int((~np.isfinite(images)).any(axis=(1, 2, 3)).sum()):
            raise FloatingPointError(
                f"step {event.step}: {wrong} of {len(images)} made images are not finite; lower "
                "the learning rates, and go on from the newest checkpoint, saved before this step"
            )
        if event.step > after and (found := spread(images)) < wanted:
            raise CollapsedGenerator(
                f"step {event.step}: the generator has collapsed: {len(images)} made images differ "
                f"by {found:.4f} a pixel, and real ones by {wanted / least:.4f} (at least "
                f"{wanted:.4f} is asked for); begin anew with another seed, lower learning rates "
                "or the game of Wasserstein"
            )

    return hook


def sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Images side by side: [N, X, Y, C] from 0 to 1 as uint8 [rows * X, columns * Y, C].

    Places that are left over are white.
    """
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    places = np.ones((rows * columns, height, width, channels), np.float64)
    places[:count] = np.clip(images, 0, 1)
    table = places.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    pixels = table.reshape(rows * height, columns * width, channels)
    return (pixels * 255).round().astype(np.uint8)


def save_picture(file: Path, pixels: np.ndarray) -> None:
    """Writes uint8 [X, Y, C] as a PNG."""
    from PIL import Image

    with atomic_write(file) as target:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(target, "png")


def drawing(folder: Path, draw: Draw, *, count: int = 64, columns: int = 16) -> Hook:
    """A hook that leaves a sheet of images, FOLDER/samples/{step}.png, and all of them as the
    samples of the run's report."""

    def hook(event: Event) -> None:
        place = folder / "samples"
        place.mkdir(exist_ok=True)
        save_picture(place / f"{event.step}.png", sheet(draw(event.state)[:count], columns))
        keep_samples(folder)

    return hook


def keep_samples(folder: Path) -> None:
    """The sheets of FOLDER/samples as the samples of the run's report, in the order of steps."""
    from PIL import Image

    files = sorted((folder / "samples").glob("*.png"), key=lambda path: int(path.stem))
    rows = []
    for file in files:
        with Image.open(file) as picture:
            pixels = np.asarray(picture)
        rows.append((file.stem, data_url(pixels if pixels.ndim == 3 else pixels[..., None])))
    save_samples(folder, ("step", "images"), rows)


Features = Callable[[np.ndarray], np.ndarray]
"""uint8 images [N, X, Y, C] -> [N, D]."""


def trained_features(
    folder: Path, data: str, *, model: str = "cnn/mnist", epochs: float = 1.0, seed: int = 0
) -> Features:
    """The last features of a small CNN that classifies the pictures: what quality is measured by.

    No weights of Inception v3 are in any package, so FID and KID by it are comparable among runs
    with the same net, and not with published ones.

    Args:
        folder: of the CNN's run, which is trained if it is not there yet.
        data, model: as in `fmjax.recipes.image_classification.Settings`.
        epochs: of its training.
        seed: of its weights.

    Raises:
        InterruptedError: a signal ended its training.
    """
    export = folder / "export"
    if not (export / "config.json").exists():
        settings = Pictures(
            output=folder, data=data, model=model, epochs=epochs, batch_size=128,
            learning_rate=2e-3, evaluations=1, seed=seed,
        )  # fmt: skip
        if fit(settings) is STOPPED:
            raise InterruptedError(f"stopped; run the same command again to continue {folder}")
    return features_of(export)


def features_of(folder: Path) -> Features:
    """The pooled features of a classifier's folder, with its own normalisation."""
    from fmjax.data.image_processor import load_image_processor

    processor = load_image_processor(folder)
    model, variables = hub.load(folder)
    bare = model.clone(head="model")
    params = {name: tree for name, tree in variables["params"].items() if name != "head"}
    variables = {**variables, "params": params}
    embed_fn = jax.jit(normalised(embed(bare, pooling="pooler"), *processor.normalisation))

    def features(images: np.ndarray) -> np.ndarray:
        pixels = with_channels(images, model.config.num_channels)
        stream = evaluation_batches(Columns((), {"pixel_values": pixels}), batch_size=256)
        return collect(embed_fn, variables, stream, size=len(images))

    return features


def quality(
    features: Features, real: ImageExamples, count: int
) -> Callable[[np.ndarray], dict[str, float]]:
    """Made images -> ``fid`` and ``kid`` against the first `count` real ones.

    Args:
        features: of both.
        real: held-out pictures.
        count: how many; as many should be made.
    """
    reference = features(real.images[:count])

    def measure(images: np.ndarray) -> dict[str, float]:
        made = features((np.clip(images, 0, 1) * 255).round().astype(np.uint8))
        return {
            "fid": frechet_distance(reference, made),
            "kid": kernel_distance(reference, made)[0],
        }

    return measure


def padded(images: np.ndarray, side: int) -> np.ndarray:
    """Black around pictures [N, X, Y, C], evenly, to `side` rows and columns.

    Raises:
        ValueError: they are larger.
    """
    missing = [side - length for length in images.shape[1:3]]
    if min(missing) < 0:
        raise ValueError(f"pictures of {images.shape[1:3]} pixels do not fit into {side} x {side}")
    edges = [(zeros // 2, zeros - zeros // 2) for zeros in missing]
    return np.pad(images, ((0, 0), *edges, (0, 0)))


def middle(images: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The inverse of `padded`: the middle [N, *size, C]."""
    top, left = ((have - want) // 2 for have, want in zip(images.shape[1:3], size, strict=True))
    return images[:, top : top + size[0], left : left + size[1]]


def drawn_in_batches(
    function: Callable[[Any], Any], inputs: np.ndarray, batch_size: int = 256
) -> np.ndarray:
    """`function` of so many rows at a time, always the same number: [N, ...]."""
    count = len(inputs)
    size = min(batch_size, count)
    rows = []
    for first in range(0, count, size):
        part = inputs[first : first + size]
        filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        rows.append(np.asarray(function(filled))[: len(part)])
    return np.concatenate(rows)
