"""A small DETR from new weights, that finds emoji on photographs.

    python experiments/detect.py --output runs/detect

The mean average precision of validation scenes rises from 0.02 after an epoch to 0.29 (0.47 at IoU
0.5); of test scenes it is 0.21 (0.37), highest for flags and smileys, 0.05 for animals. Six
minutes of CPU.

Scenes of 64 x 64 pixels with one to three objects of four classes, made from a seed; validation and
test have other emoji and other parts of the photographs. An interrupted run is continued by the
same command. The folder gets checkpoints, metrics.jsonl, TensorBoard events, report.html (with
boxes drawn into test scenes) and the model as a Hugging Face folder.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import tyro

import fmjax
from fmjax.data.augment import flip_objects
from fmjax.data.batches import batches
from fmjax.data.image_processor import ImageProcessor, Size
from fmjax.data.scenes import Scenes, SceneSettings, load_scenes
from fmjax.metrics import detection_metrics
from fmjax.models import detr, resnet
from fmjax.recipes.image_classification import data_url, pixel_statistics
from fmjax.recipes.pictures import drawn
from fmjax.recipes.texts import evaluation_batches
from fmjax.recipes.training import STOPPED, Training, finish, plain_numbers, train, weights_of
from fmjax.report.samples import save_samples
from fmjax.tasks import object_detection as task
from fmjax.tasks.pixels import augmented, normalised
from fmjax.types import TrainState

SHOWN = 24
ZOOM = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """Train a small detector."""

    scenes: int = 8_000
    """For training; validation and test have an eighth of it each."""
    size: int = 64
    """Rows and columns of a scene."""
    objects: int = 3
    """The most in a scene."""
    widths: tuple[int, ...] = (32, 64)
    """Of the ResNet's stages; each but the first makes the image smaller by 2, the first stands
    behind a stem that makes it smaller by 4."""
    width: int = 64
    """Of the Transformer, whose heads have 32."""
    layers: tuple[int, int] = (1, 2)
    """Of the encoder and of the decoder."""
    queries: int = 8
    """How many objects can be found in a scene."""
    auxiliary: bool = True
    """Whether every layer of the decoder is trained to name the objects."""
    threshold: float = 0.5
    """The least score of a box that is drawn."""
    epochs: float = 12.0
    """Passes over the training scenes."""
    batch_size: int = 16
    """Scenes a step, over all devices."""
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    evaluations: float = 1.0
    """Evaluations an epoch; each may set the best checkpoint."""


def model_config(settings: Settings, label_names: tuple[str, ...]) -> detr.Config:
    """The detector's sizes. Without dropout: no scene is seen often."""
    heads = max(1, settings.width // 32)
    return detr.Config(
        backbone_config=resnet.Config(
            embedding_size=settings.widths[0],
            hidden_sizes=settings.widths,
            depths=(2,) * len(settings.widths),
            layer_type="basic",
        ),
        num_queries=settings.queries,
        encoder_layers=settings.layers[0],
        decoder_layers=settings.layers[1],
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=2 * settings.width,
        decoder_ffn_dim=2 * settings.width,
        d_model=settings.width,
        dropout=0.0,
        init_std=settings.width**-0.5,  # the default is for wider ones
        id2label=label_names,
    )


def run(settings: Settings) -> dict[str, Any]:
    """Trains (or goes on), measures, draws, and returns what results.json holds."""
    made = SceneSettings(
        size=(settings.size, settings.size), objects=(1, settings.objects), seed=settings.seed
    )
    counts = {"train": settings.scenes} | dict.fromkeys(("val", "test"), settings.scenes // 8)
    scenes = {split: load_scenes(split, count, made) for split, count in counts.items()}
    names = made.label_names
    model, variables = fmjax.create(
        "detr", model_config(settings, names), head="object_detection",
        rng=jax.random.key(settings.seed), scan=settings.scan, remat=settings.remat,
    )  # fmt: skip
    model = model.clone(moving=True)  # new weights have no statistics yet
    mean, std = pixel_statistics(scenes["train"].images)
    loss = normalised(task.loss(model, auxiliary=settings.auxiliary), mean, std)
    predict = jax.jit(normalised(task.predict(model), mean, std))
    stream = batches(scenes["train"].columns(), batch_size=settings.batch_size, seed=settings.seed)

    def found(state: TrainState, split: str) -> list[task.Detections]:
        once = evaluation_batches(scenes[split].columns(), batch_size=settings.batch_size)
        return task.detect(
            model, weights_of(state), once, size=len(scenes[split]), predict_fn=predict
        )

    def measure(state: TrainState, split: str) -> dict[str, Any]:
        return detection_metrics(found(state, split), truths(scenes[split]), label_names=names)

    state = train(
        settings,
        model,
        variables,
        augmented(loss, flip_objects()),
        stream,
        evaluate=lambda state: measured(measure(state, "val")),
        metric="map",
        mode="max",
        about={
            "source": f"detr of {sum(settings.layers)} layers and width {settings.width}, new",
            "data": {"source": "emoji on photographs", "splits": counts},
        },
    )
    if state is None:
        return STOPPED
    results: dict[str, Any] = {"best_step": int(state.step)}
    results |= {split: measure(state, split) for split in ("val", "test")}
    test = scenes["test"].select(np.arange(min(SHOWN, counts["test"])))
    rows = [
        (
            data_url(drawn(image, true, names, zoom=ZOOM)),
            data_url(drawn(image, said, names, zoom=ZOOM)),
        )
        for image, true, said in zip(
            test.images,
            [
                task.Detections(boxes, np.ones(len(labels)), labels)
                for boxes, labels in truths(test)
            ],
            [task.above(one, settings.threshold) for one in found(state, "test")[: len(test)]],
            strict=True,
        )
    ]
    save_samples(settings.output, ("objects", "found"), rows)
    finish(settings.output, results, model, weights_of(state), image_processor(settings, mean, std))
    return results


def measured(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers among metrics; there are no large objects whose precision could be one."""
    return {name: value for name, value in plain_numbers(metrics).items() if not np.isnan(value)}


def truths(scenes: Scenes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each scene boxes by corners, in pixels, and labels."""
    rows, columns = scenes.images.shape[1:3]
    centre, half = scenes.boxes[..., :2], scenes.boxes[..., 2:] / 2
    corners = np.concatenate([centre - half, centre + half], axis=-1)
    corners *= np.array([columns, rows, columns, rows], np.float32)
    return [
        (boxes[mask], labels[mask])
        for boxes, labels, mask in zip(
            corners, scenes.class_labels, scenes.object_mask, strict=True
        )
    ]


def image_processor(settings: Settings, mean: list[float], std: list[float]) -> ImageProcessor:
    """The processor of such scenes, for the folder that a run leaves."""
    return ImageProcessor(
        "DetrImageProcessor",
        size=Size(settings.size, settings.size),
        image_mean=tuple(mean),
        image_std=tuple(std),
        do_pad=True,
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints mean average precision."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    results = run(settings)
    if results is STOPPED:
        print(f"stopped; run the same command again to continue {settings.output}")
        return
    for split in ("val", "test"):
        scores = results[split]
        print(f"{split} mAP {scores['map']:.4f}, at IoU 0.5 {scores['map_50']:.4f}")
    print(f"report: {settings.output / 'report.html'}")


if __name__ == "__main__":
    main()
