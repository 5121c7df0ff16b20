"""Clean and robust accuracy of a small CNN trained plainly, on attacks, and by TRADES.

    python experiments/adversarial_images.py --output runs/adversarial

Fashion-MNIST, changes of at most 0.1 of a pixel's range (linf). Every arm sees the same pictures;
attacks of 3 steps while training, of 20 when measured, on test pictures. Interrupted, the same
command goes on with what is missing; results.json has every run.

Accuracy on 1,000 test pictures (a standard error of 0.011 to 0.015), 3 seeds, 26 minutes of CPU:

|                          | clean         | FGSM          | PGD-20        |
| ---                      | ---           | ---           | ---           |
| plain                    | 0.867 ± 0.003 | 0.364 ± 0.006 | 0.194 ± 0.015 |
| FGSM from a random start | 0.804 ± 0.004 | 0.683 ± 0.010 | 0.623 ± 0.009 |
| PGD-3                    | 0.795 ± 0.005 | 0.681 ± 0.016 | 0.641 ± 0.008 |
| TRADES                   | 0.817 ± 0.005 | 0.676 ± 0.000 | 0.638 ± 0.007 |

Every way of training on attacks triples what survives them and costs 5 to 7 points of clean
accuracy. TRADES with its paper's weight of 6 costs least. Its two passes drop the same units: with
other ones in each, half of this net's, it had 0.779 and 0.577 under PGD-20.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro
from comparison import Settings as Base
from comparison import compare, table

import fmjax
from fmjax.data.batches import batches
from fmjax.methods.adversarial import attacked, fgsm, pgd, trades
from fmjax.models.cnn import Config
from fmjax.recipes.image_classification import Settings as Pictures
from fmjax.recipes.image_classification import load_images, pixel_statistics
from fmjax.recipes.texts import evaluation_batches
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.apply import means
from fmjax.tasks.pixels import normalised, to_floats
from fmjax.train import (
    adamw,
    fit,
    gradient,
    init_state,
    jit_step,
    make_train_step,
    warmup_cosine,
)
from fmjax.tree import merge
from fmjax.types import LossFn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Base):
    """Train image classifiers that bounded changes of pixels do not fool."""

    data: str = "fashion-mnist"
    """A named set, or a folder with train/CLASS/*.png, and val/ and test/ like it."""
    epsilon: float = 0.1
    """The largest change of a pixel, of its range from 0 to 1."""
    attack_steps: int = 3
    """Steps of the attacks in training."""
    beta: float = 6.0
    """Weight of TRADES' divergence."""
    steps: int = 600
    """Of training."""
    batch_size: int = 128
    """Pictures a step."""
    learning_rate: float = 2e-3
    """Peak of a cosine after a warm-up."""
    hidden_sizes: tuple[int, ...] = (16, 32)
    """Features of the convolutions."""
    dense_size: int = 128
    """Of the layer before the head."""
    measured: int = 1000
    """Test pictures that are attacked."""
    measured_steps: int = 20
    """Steps of the attack when measured."""


def run(settings: Settings) -> dict[str, Any]:
    """Trains what is missing and returns what results.json holds."""
    examples = load_images(Pictures(output=settings.output, data=settings.data))
    names = examples["train"].label_names
    rows, columns, channels = examples["train"].images.shape[1:]
    mean, std = pixel_statistics(examples["train"].images)
    config = Config(
        num_channels=channels,
        image_size=rows if rows == columns else (rows, columns),
        hidden_sizes=settings.hidden_sizes,
        depths=(1,) * len(settings.hidden_sizes),
        dense_sizes=(settings.dense_size,),
        id2label=tuple(names),
    )
    test = examples["test"].select(np.arange(min(settings.measured, len(examples["test"]))))
    sizes: dict[str, Any] = {"epsilon": settings.epsilon, "low": 0.0, "high": 1.0}
    short = sizes | {
        "step_size": 2 * settings.epsilon / settings.attack_steps,
        "steps": settings.attack_steps,
    }

    def floats(loss: LossFn) -> LossFn:
        def of_bytes(variables, batch, rng):
            batch = {**batch, "pixel_values": to_floats(batch["pixel_values"])}
            return loss(variables, batch, rng)

        return of_bytes

    def arm(make: Callable[[Any, LossFn, LossFn], LossFn]) -> Callable[[int], dict[str, float]]:
        def train(seed: int) -> dict[str, float]:
            model, variables = fmjax.create(
                "cnn", config, head="image_classification", rng=jax.random.key(seed)
            )
            learnt, fixed = (
                normalised(task.loss(model, train=training), mean, std)
                for training in (True, False)
            )
            loss = floats(make(model, learnt, fixed))
            schedule = warmup_cosine(
                settings.learning_rate, steps=settings.steps, warmup=settings.steps // 10
            )
            tx = adamw(schedule)
            stream = batches(examples["train"].columns(), batch_size=settings.batch_size, seed=seed)
            state = init_state(variables, tx, jax.random.key(seed))
            step = jit_step(make_train_step(gradient(loss), tx))
            state = fit(state, step, stream, steps=settings.steps)
            variables = merge(state.trainable, state.non_trainable)
            long = sizes | {
                "step_size": 2.5 * settings.epsilon / settings.measured_steps,
                "steps": settings.measured_steps,
                "random_start": False,
            }
            attacks = {
                "clean": fixed,
                "FGSM": attacked(fixed, fgsm(fixed, **sizes)),
                f"PGD-{settings.measured_steps}": attacked(fixed, pgd(fixed, **long)),
            }
            return {
                name: means(
                    floats(measure), variables, evaluation_batches(test.columns(), batch_size=250)
                )["accuracy"].value
                for name, measure in attacks.items()
            }

        return train

    def fast(model: Any, loss: LossFn, fixed: LossFn) -> LossFn:
        # Wong et al. 2020, arXiv:2001.03994: one step of 1.25 epsilon from a random start.
        one = sizes | {"step_size": 1.25 * settings.epsilon, "steps": 1}
        return attacked(loss, pgd(fixed, **one))

    def through_trades(model: Any, loss: LossFn, fixed: LossFn) -> LossFn:
        return trades(
            model, loss, beta=settings.beta, through=lambda f: normalised(f, mean, std), **short
        )

    return compare(
        settings,
        {
            "plain": arm(lambda model, loss, fixed: loss),
            "FGSM from a random start": arm(fast),
            f"PGD-{settings.attack_steps}": arm(
                lambda model, loss, fixed: attacked(loss, pgd(fixed, **short))
            ),
            "TRADES": arm(through_trades),
        },
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints accuracies of every arm."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    print(table(run(settings)))


if __name__ == "__main__":
    main()
