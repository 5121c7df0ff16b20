"""A DCGAN, or a WGAN-GP, makes clothes: a sheet of them and FID and KID along the way.

    python experiments/gan_fashion.py --output runs/gan
    python experiments/gan_fashion.py --output runs/wgan --game wgan-gp --steps 1200

After 2,000 steps the DCGAN has a test FID of 79.7 and a KID of 4.73, still falling (on validation
pictures 899 after 250 steps, 220 after 1,000); of other real pictures they are 5.8 and -0.07. One
seed, 38 minutes on 2 cores that had much other work, 5.6 minutes of CPU. After 1,200 steps of five
rounds the WGAN-GP has 143.8 and 13.9, and falls faster still (on validation pictures 694 after 750
steps, 246 after 1,050); 14 minutes of CPU.

FID and KID are of 2,000 made and as many held-out pictures, by the last 256 features of a small CNN
that is trained on the same training pictures first (test accuracy 0.871): comparable between these
runs, not with the published ones of Inception. Pictures of 28 x 28 have black around them, 32 x 32.

The folder gets samples/, checkpoints, metrics.jsonl, TensorBoard events, report.html and both
players as fmjax folders. An interrupted run is continued by the same command; one whose generator
collapses or makes what is not finite ends with a message.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro

import fmjax
from fmjax.config import write_json
from fmjax.data.batches import batches
from fmjax.data.columns import Columns
from fmjax.models import dcgan
from fmjax.recipes.image_classification import Settings as Pictures
from fmjax.recipes.image_classification import load_images
from fmjax.recipes.image_generation import (
    CollapsedGenerator,
    drawing,
    drawn_in_batches,
    keep_samples,
    middle,
    padded,
    quality,
    save_picture,
    sheet,
    trained_features,
    watching,
)
from fmjax.recipes.training import STOPPED, carry_out, weights_of
from fmjax.report import write_report
from fmjax.tasks import adversarial_generation as task
from fmjax.tasks.pixels import normalised
from fmjax.train import Turn, gradient, init_players, jit_step, take_turns
from fmjax.train.recording import writable_folder
from fmjax.tree import part, together
from fmjax.types import TrainState, Variables

HEADS = {"discriminator": "image_discrimination", "generator": "image_generation"}
GAMES = {"dcgan": "the non-saturating game", "wgan-gp": "Wasserstein's with a gradient penalty"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Train a generator and its discriminator on small pictures."""

    output: Path
    """The run's folder; a run that was interrupted there is continued."""
    data: str = "fashion-mnist"
    """A named set, or a folder with train/CLASS/*.png, and val/ and test/ like it."""
    game: Literal["dcgan", "wgan-gp"] = "dcgan"
    """Batch-normalised players of Radford et al. 2016, or a critic with layer norms and five rounds
    a step (Gulrajani et al. 2017)."""
    hidden_sizes: tuple[int, ...] = (32, 64, 128)
    """Features of the discriminator's convolutions; the generator has them in reverse."""
    latent_size: int = 100
    """Random numbers a picture is made of."""
    steps: int = 2000
    """Of the generator."""
    batch_size: int = 64
    """Real pictures a round of the discriminator."""
    learning_rate: float = 2e-4
    """Of both players' Adam."""
    watched_after: int = 400
    """Steps after which images that are all but alike end the run."""
    evaluations: int = 8
    """Along the way."""
    measured: int = 2000
    """Made and real pictures that FID and KID are of."""
    feature_model: str = "cnn/mnist"
    """The classifier, FAMILY/VARIANT, by whose features they are measured."""
    feature_epochs: float = 1.0
    """Of its training."""
    seed: int = 0
    """Of weights, order and noise."""

    @property
    def rounds(self) -> int:
        """Of the discriminator in a step."""
        return 5 if self.game == "wgan-gp" else 1


def create_players(settings: Settings, channels: int) -> tuple[dict[str, Any], Variables]:
    """Both models by name, and the variables of both."""
    config = dcgan.Config(
        num_channels=channels,
        latent_size=settings.latent_size,
        hidden_sizes=settings.hidden_sizes,
        kernel_size=4,
        discriminator_norm="layer_norm" if settings.game == "wgan-gp" else "batch_norm",
    )
    models, parts = {}, {}
    for number, (name, head) in enumerate(HEADS.items()):
        key = jax.random.fold_in(jax.random.key(settings.seed), number)
        models[name], parts[name] = fmjax.create("dcgan", config, head=head, rng=key)
    return models, together(**parts)


def run(settings: Settings) -> dict[str, Any]:
    """Trains (or goes on), measures, draws, and returns what results.json holds."""
    folder = writable_folder(settings.output)
    examples = load_images(Pictures(output=folder, data=settings.data))
    size = examples["train"].images.shape[1:3]
    models, variables = create_players(settings, examples["train"].images.shape[3])
    generator, side = models["generator"], models["generator"].config.side
    features = trained_features(
        folder / "features", settings.data, model=settings.feature_model,
        epochs=settings.feature_epochs, seed=settings.seed,
    )  # fmt: skip
    if settings.game == "wgan-gp":
        losses = task.wasserstein(generator, models["discriminator"])
        tx = optax.adam(settings.learning_rate, b1=0.0, b2=0.9)
    else:
        losses = task.non_saturating(generator, models["discriminator"])
        tx = optax.adam(settings.learning_rate, b1=0.5)
    turns = [
        Turn("discriminator", gradient(normalised(losses["discriminator"], [0.5], [0.5])), tx,
             settings.rounds),
        Turn("generator", gradient(normalised(losses["generator"], [0.5], [0.5])), tx),
    ]  # fmt: skip
    pictures = padded(examples["train"].images, side)
    stream = batches(
        Columns((), {"pixel_values": pictures}),
        batch_size=settings.batch_size * settings.rounds,
        seed=settings.seed,
    )
    latents = np.random.default_rng(settings.seed).normal(
        size=(settings.measured, settings.latent_size)
    )
    make = jax.jit(task.draw(generator))

    def draw(state: TrainState, count: int = settings.measured) -> np.ndarray:
        weights = weights_of(state)
        images = drawn_in_batches(lambda x: make(weights, x), latents[:count].astype(np.float32))
        return middle(images, size) / 2 + 0.5

    measures = {
        split: quality(features, examples[split], settings.measured) for split in ("val", "test")
    }
    every = max(1, math.ceil(settings.steps / max(1, settings.evaluations)))
    state = carry_out(
        settings,
        generator,
        init_players(variables, turns, jax.random.key(settings.seed)),
        jit_step(take_turns(turns)),
        stream,
        steps=settings.steps,
        every=every,
        evaluate=lambda state: measures["val"](draw(state)),
        metric="fid",
        mode="min",
        about={
            "source": f"a DCGAN of {settings.hidden_sizes}, new, in {GAMES[settings.game]}",
            "data": {
                "source": settings.data,
                "splits": {split: len(part) for split, part in examples.items()},
            },
        },
        hooks=[
            (
                every,
                watching(
                    lambda state: draw(state, 64), examples["train"].images[:1000] / 255,
                    after=settings.watched_after,
                ),
            ),
            (every, drawing(folder, lambda state: draw(state, 64))),
        ],
    )  # fmt: skip
    if state is None:
        return STOPPED
    images = draw(state)
    results: dict[str, Any] = {"best_step": int(state.step)}
    results |= {split: measure(images) for split, measure in measures.items()}
    # What the same numbers are of other pictures that the CNN has not seen either, which a perfect
    # generator would reach.
    others = {"val": "test", "test": "val"}
    results["baselines"] = {
        "real pictures": {
            split: measures[split](examples[other].images[: settings.measured] / 255)
            for split, other in others.items()
        }
    }
    save_picture(folder / "samples.png", sheet(images[:128], 16))
    keep_samples(folder)
    for name, model in models.items():
        fmjax.save(folder / "export" / name, model, part(weights_of(state), name))
    write_json(folder / "results.json", results)
    write_report(folder)
    return results


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints FID and KID."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    try:
        results = run(settings)
    except (CollapsedGenerator, FloatingPointError) as error:
        raise SystemExit(str(error)) from error
    if results is STOPPED:
        print(f"stopped; run the same command again to continue {settings.output}")
        return
    best = results["baselines"]["real pictures"]["test"]
    print(
        f"step {results['best_step']}: test FID {results['test']['fid']:.3f}, "
        f"KID {results['test']['kid']:.4f}; of real pictures {best['fid']:.3f}, {best['kid']:.4f}"
    )
    print(f"report: {settings.output / 'report.html'}")


if __name__ == "__main__":
    main()
