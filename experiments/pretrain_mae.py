"""A small ViT-MAE from scratch on pictures, what its features are worth, and what it fills in.

    python experiments/pretrain_mae.py --output runs/mae --precision bfloat16

A linear probe (logistic regression on the mean of the tokens) is fitted before and after: test
accuracy 0.763 of the new weights, 0.864 of the trained ones, in 17 minutes of CPU. Any other
pictures, in folders:

    python experiments/pretrain_mae.py --output runs/mine --data FOLDER --image-size 64 --patch 8

An interrupted run is continued by the same command. The folder gets checkpoints, metrics.jsonl,
TensorBoard events, report.html, reconstructions.png and the model as a Hugging Face folder.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import fmjax
from fmjax.data.batches import batches
from fmjax.data.columns import Columns
from fmjax.data.images import ImageExamples
from fmjax.models import vit_mae
from fmjax.recipes.image_classification import Settings as Base
from fmjax.recipes.image_classification import image_processor, load_images, pixel_statistics
from fmjax.recipes.linear_probe import measure_probe
from fmjax.recipes.texts import evaluation_batches
from fmjax.recipes.training import STOPPED, finish, train, weights_of
from fmjax.report.run_folder import atomic_write
from fmjax.tasks import masked_autoencoding as task
from fmjax.tasks.apply import collect
from fmjax.tasks.feature_extraction import embed
from fmjax.tasks.pixels import normalised
from fmjax.types import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Base):
    """Pretrain a small masked autoencoder."""

    model: tyro.conf.Suppress[str] = ""
    patch: int = 4
    """Rows and columns of a patch."""
    layers: int = 4
    """Blocks of the encoder; the decoder has two."""
    width: int = 128
    """Of the encoder's hidden states, whose heads have 32; half of it of the decoder's."""
    mask_ratio: float = 0.75
    """Share of the patches that the encoder does not see."""
    epochs: float = 15.0
    """Passes over the training pictures."""
    batch_size: int = 128
    """Pictures a step, over all devices."""
    learning_rate: float = 1.5e-3
    """Peak of the schedule."""
    weight_decay: float = 0.05
    """Of kernels."""
    evaluations: float = 1.0
    """Evaluations an epoch; each may set the best checkpoint."""
    probe_pictures: int = 10_000
    """How many training pictures the probe is fitted on, at most."""


def pixels_of(examples: ImageExamples) -> Columns:
    """Batches without labels."""
    return Columns((), {"pixel_values": examples.images})


def run(settings: Settings) -> dict[str, Any]:
    """Trains (or goes on), probes, draws, and returns what results.json holds."""
    examples = load_images(settings)
    shape = examples["train"].images.shape[1:]
    config = vit_mae.Config(
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=max(1, settings.width // 32),
        intermediate_size=4 * settings.width,
        image_size=(shape[0], shape[1]) if shape[0] != shape[1] else shape[0],
        patch_size=settings.patch,
        num_channels=shape[2],
        decoder_hidden_size=settings.width // 2,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=max(1, settings.width // 64),
        decoder_intermediate_size=2 * settings.width,
        mask_ratio=settings.mask_ratio,
        norm_pix_loss=True,
    )
    model, variables = fmjax.create(
        "vit_mae", config, head="pretraining", rng=jax.random.key(settings.seed),
        scan=settings.scan, remat=settings.remat,
    )  # fmt: skip
    mean, std = pixel_statistics(examples["train"].images)
    loss = normalised(task.loss(model), mean, std)
    probe = {"before": probe_of(settings, model, variables, examples, mean, std)}
    stream = batches(
        pixels_of(examples["train"]), batch_size=settings.batch_size, seed=settings.seed
    )
    prepare = normalised(lambda _, batch: batch, mean, std)

    def evaluate(state: TrainState, split: str = "val") -> dict[str, float]:
        once = evaluation_batches(pixels_of(examples[split]), batch_size=settings.batch_size)
        return task.evaluate(model, weights_of(state), (prepare({}, batch) for batch in once))

    state = train(
        settings,
        model,
        variables,
        loss,
        stream,
        evaluate=evaluate,
        metric="loss",
        mode="min",
        about={
            "source": f"vit_mae of {settings.layers} layers and width {settings.width}, new",
            "data": {
                "source": settings.data,
                "splits": {split: len(part) for split, part in examples.items()},
            },
        },
    )
    if state is None:
        return STOPPED
    variables = weights_of(state)
    probe["after"] = probe_of(settings, model, variables, examples, mean, std)
    results: dict[str, Any] = {"best_step": int(state.step), "linear probe": probe}
    results |= {split: evaluate(state, split) for split in ("val", "test")}
    draw(settings.output / "reconstructions.png", model, variables, examples["test"], mean, std)
    finish(settings.output, results, model, variables, image_processor(shape, mean, std))
    return results


def probe_of(
    settings: Settings,
    model: Any,
    variables: Any,
    examples: dict[str, ImageExamples],
    mean: list[float],
    std: list[float],
) -> dict[str, Any]:
    """Accuracy on "val" and "test" of a logistic regression on the encoder's mean token."""
    order = np.random.default_rng(settings.seed).permutation(len(examples["train"]))
    parts = {**examples, "train": examples["train"].select(order[: settings.probe_pictures])}
    encoder = model.clone(head="model")
    encode = jax.jit(normalised(embed(encoder), mean, std))
    own = {"params": {k: v for k, v in variables["params"].items() if k != "decoder"}}
    own["buffers"] = {"embed": variables["buffers"]["embed"]}
    vectors = {
        split: collect(
            encode, own, evaluation_batches(pixels_of(part), batch_size=256), size=len(part)
        )
        for split, part in parts.items()
    }
    metrics = measure_probe(vectors, parts)
    return {split: {"accuracy": metrics[split]["accuracy"]} for split in metrics}


def draw(
    file: Path,
    model: Any,
    variables: Any,
    examples: ImageExamples,
    mean: list[float],
    std: list[float],
    count: int = 8,
) -> None:
    """Pictures, what the encoder saw of them, and what the decoder made of that: three rows."""
    from PIL import Image

    images = examples.images[:count]
    noise = task.draw_noise(model, jax.random.key(0), images)
    fill = jax.jit(normalised(task.reconstruct(model), mean, std))
    made, seen = fill(variables, {"pixel_values": images, "noise": noise})
    size = made.shape[1:3]
    rows = [
        images[:, : size[0], : size[1]] / 255,
        *(np.asarray(x) * std + mean for x in (seen, made)),
    ]
    sheet = np.concatenate([np.concatenate(list(np.asarray(row)), axis=1) for row in rows])
    pixels = (np.clip(sheet, 0, 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    with atomic_write(file) as target:
        picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.NEAREST).save(
            target, "png"
        )


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints the loss, and the probe's accuracies before and after."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    results = run(settings)
    if results is STOPPED:
        print(f"stopped; run the same command again to continue {settings.output}")
        return
    for split in ("val", "test"):
        before, after = (results["linear probe"][when][split] for when in ("before", "after"))
        print(
            f"{split} loss {results[split]['loss']:.4f}, linear probe {before['accuracy']:.4f} "
            f"before, {after['accuracy']:.4f} after"
        )


if __name__ == "__main__":
    main()
