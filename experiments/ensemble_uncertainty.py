"""What a small CNN knows of its mistakes: alone, with dropout, as ensembles, and with mean weights.

    python experiments/ensemble_uncertainty.py --output runs/ensembles

Measured on 2 busy CPU cores in 16 minutes, means of 3 seeds (standard deviations in the report):

    arm             accuracy  NLL    ECE    NLL, ECE at the temperature  AUROC of digits
    single          0.831     0.461  0.017  0.461  0.016                 0.730
    MC dropout      0.831     0.470  0.037  0.464  0.016                 0.797
    ensemble        0.833     0.457  0.026  0.457  0.017                 0.747
    SWA             0.828     0.464  0.019  0.465  0.017                 0.668
    uniform soup    0.814     0.492  0.015  0.492  0.016                 0.621
    greedy soup     0.818     0.480  0.014  0.480  0.013                 0.635
    of ingredients  0.816     0.491  0.017  0.491  0.016                 0.625
    blend           0.836     0.447  0.022  0.447  0.016                 0.747

The ensemble and the blend are worth more than their members' calibration; dropout tells digits from
clothes best, and needs its temperature most. Weights averaged in so short a run gain nothing.

5,000 pictures of Fashion-MNIST are trained on. On test pictures: accuracy, the likelihood (NLL,
nats) and calibration error (ECE) of probabilities, as they are and at the temperature that fits the
validation pictures; and how well the predictive entropy tells pictures of digits from those of
clothes (area under the ROC curve).

`single` is the first member of the `ensemble`, all trained in one program; `MC dropout` is the same
net with several passes. `SWA` takes as many steps, the last quarter at a constant rate. The soups'
ingredients are fine-tuned in the last quarter from one net, at rates of their own, and averaged:
all of them, or greedily by validation accuracy; `of ingredients` is their ensemble. `blend` weighs
the ensemble's members, SWA's net and the greedy soup by stacking on validation pictures. What
several arms need is trained once a seed, and its seconds are the first one's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import comparison
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from comparison import compare, drawn, table

import fmjax
from fmjax.data.batches import batches
from fmjax.data.images import ImageExamples
from fmjax.data.side_by_side import SideBySide
from fmjax.methods.averaging import (
    averaged,
    cyclical_rate,
    greedy_soup,
    track_swa,
    uniform_soup,
)
from fmjax.methods.calibration import fit_temperature
from fmjax.methods.ensembles import (
    dropout_log_probabilities,
    log_probabilities,
    mean_log_probabilities,
    member_state,
    member_states,
    member_step,
    of_members,
    own_batch,
    stacking_weights,
    uncertainty,
)
from fmjax.metrics import expected_calibration_error, negative_log_likelihood
from fmjax.models.cnn import Config
from fmjax.recipes.image_classification import pixel_statistics
from fmjax.recipes.texts import evaluation_batches, labels_of
from fmjax.recipes.training import weights_of
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.apply import collect
from fmjax.tasks.pixels import normalised
from fmjax.train import adamw, fit, gradient, init_state, jit_step, make_train_step, warmup_cosine
from fmjax.types import LossFn, TrainState, Variables

SPLITS = ("val", "test", "others")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(comparison.Settings):
    """Compare ways to know what a classifier of pictures does not know."""

    data: Literal["fashion-mnist", "mnist-5k"] = "fashion-mnist"
    """Clothes or digits; the other one is what is to be told from it."""
    pictures: int = 5000
    """Training pictures."""
    measured: int = 4000
    """Pictures that validation, test and the others have at most."""
    members: int = 5
    """Of the ensemble, and ingredients of the soups."""
    at_once: int | None = 1
    """Members that are computed side by side; on CPUs one is best, elsewhere all (None)."""
    samples: int = 20
    """Passes with dropout."""
    steps: int = 450
    """Of every net."""
    batch_size: int = 128
    """Pictures a step."""
    learning_rate: float = 2e-3
    """Peak of a cosine after a warm-up."""
    tuning_rate: float = 1e-3
    """Of SWA's last quarter; ingredients have up to three times and down to a third of it."""
    hidden_sizes: tuple[int, ...] = (8, 16)
    """Features of the convolutions."""
    dense_size: int = 64
    """Of the layer before the head."""
    dropout: float = 0.3
    """Of that layer."""


class Study(NamedTuple):
    """What all arms share.

    Attributes:
      model: the net.
      loss: of bytes, in training.
      train: pictures.
      measured: pictures of each split.
      through: makes a function of pixels one of bytes.
    """

    model: Any
    loss: LossFn
    train: ImageExamples
    measured: dict[str, ImageExamples]
    through: Callable[[Any], Any]


def load(settings: Settings) -> Study:
    """The pictures and the net."""
    from fmjax.data.mnist import load_digits, load_fashion

    clothes = settings.data == "fashion-mnist"
    read, read_others = (load_fashion, load_digits) if clothes else (load_digits, load_fashion)
    train = drawn(read("train"), settings.pictures, 0)
    config = Config(
        hidden_sizes=settings.hidden_sizes,
        depths=(1,) * len(settings.hidden_sizes),
        dense_sizes=(settings.dense_size,),
        dropout=settings.dropout,
        id2label=tuple(train.label_names),
    )
    model, _ = fmjax.create("cnn", config, head="image_classification", rng=jax.random.key(0))
    mean, std = pixel_statistics(train.images)
    through = lambda function: normalised(function, mean, std)  # noqa: E731
    splits: dict[str, ImageExamples] = {
        "val": read("val"),
        "test": read("test"),
        "others": read_others("train"),  # nothing is trained on them, and digits are few
    }
    measured = {split: drawn(part, settings.measured, 0) for split, part in splits.items()}
    return Study(model, through(task.loss(model)), train, measured, through)


def together(
    settings: Settings,
    study: Study,
    tx: optax.GradientTransformation,
    make: Callable[[jax.Array], TrainState],
    *,
    steps: int,
    seed: int,
) -> TrainState:
    """Trains members side by side, each on batches in its own order."""
    members = settings.members
    stream = SideBySide(
        [
            batches(study.train.columns(), batch_size=settings.batch_size, seed=seed * members + k)
            for k in range(members)
        ]
    )
    keys = jax.random.split(jax.random.key(seed), members)
    states = jax.jit(lambda keys: member_states(make, keys))(keys)
    step = make_train_step(gradient(study.loss), tx)
    step = jit_step(member_step(step, see=own_batch, at_once=settings.at_once))
    states = fit(states, step, stream, steps=steps)
    stream.close()
    return states


def new_state(study: Study, tx: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    """The state of a net with new weights."""
    pixels = jnp.zeros((1, *study.train.images.shape[1:]))
    return init_state(study.model.init(rng, pixels), tx, rng)


def alone(
    settings: Settings,
    study: Study,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    seed: int,
) -> TrainState:
    """Trains one net."""
    stream = batches(study.train.columns(), batch_size=settings.batch_size, seed=seed)
    step = jit_step(make_train_step(gradient(study.loss), tx))
    state = fit(new_state(study, tx, jax.random.key(seed)), step, stream, steps=steps)
    stream.close()
    return state


def cosine(settings: Settings, steps: int) -> optax.Schedule:
    """The rate of an ordinary run."""
    return warmup_cosine(settings.learning_rate, steps=steps, warmup=steps // 10)


def ensemble(settings: Settings, study: Study, seed: int) -> TrainState:
    """Members that differ in their first weights, dropout and order of pictures."""
    tx = adamw(cosine(settings, settings.steps))
    make = functools.partial(new_state, study, tx)
    return together(settings, study, tx, make, steps=settings.steps, seed=seed)


def swa(settings: Settings, study: Study, seed: int) -> Variables:
    """The mean of one run's weights, an epoch apart, in the last quarter."""
    start = 3 * settings.steps // 4
    period = max(1, len(study.train) // settings.batch_size)
    rate = settings.tuning_rate
    # Down to the constant rate by its start, as the paper's own schedule is (section 3.2).
    before = warmup_cosine(
        settings.learning_rate,
        steps=start,
        warmup=settings.steps // 10,
        final=rate / settings.learning_rate,
    )
    schedule = cyclical_rate(before, start=start, period=period, high=rate, low=rate)
    tx = optax.chain(adamw(schedule), track_swa(start=start, period=period))
    # The net has no running statistics; those of one that has come from `with_statistics`.
    return weights_of(averaged(alone(settings, study, tx, steps=settings.steps, seed=seed)))


def ingredients(settings: Settings, study: Study, seed: int) -> TrainState:
    """Nets fine-tuned from one, each at a rate of its own."""
    start = 3 * settings.steps // 4
    tx = adamw(cosine(settings, start))
    trained = weights_of(alone(settings, study, tx, steps=start, seed=seed))
    steps = settings.steps - start
    tx = optax.chain(
        adamw(optax.linear_schedule(settings.tuning_rate, 0.0, steps)),
        optax.inject_hyperparams(optax.scale)(step_size=1.0),
    )

    def make(rng: jax.Array) -> TrainState:
        state = init_state(trained, tx, rng)
        factor = 3 ** jax.random.uniform(rng, (), minval=-1.0, maxval=1.0)
        opt_state = optax.tree.set(state.opt_state, step_size=factor)
        return dataclasses.replace(state, opt_state=opt_state)

    return together(settings, study, tx, make, steps=steps, seed=seed)


Rows = dict[str, np.ndarray]
"""Log-probabilities of every split: of several members [N, K, C], of a mixture [N, C]."""


def collected(study: Study, fn: Callable[[Any, Any], jax.Array], weights: Any) -> Rows:
    """Results of a function of bytes on every split."""
    compiled = jax.jit(fn)
    return {
        split: collect(
            compiled, weights, evaluation_batches(part.columns(), batch_size=500), size=len(part)
        )
        for split, part in study.measured.items()
    }


class Nets:
    """A seed's nets, trained when they are first asked for, and what they predict."""

    def __init__(self, settings: Settings, study: Study, seed: int) -> None:
        self.settings, self.study, self.seed = settings, study, seed
        self.predict = study.through(log_probabilities(study.model))

    def of_states(self, states: TrainState) -> Rows:
        """Of members side by side."""
        at_once = self.settings.at_once
        fn = of_members(self.predict, axis=-2, at_once=at_once)
        return collected(self.study, fn, states)

    def of_one(self, variables: Variables) -> Rows:
        """Of one net."""
        return collected(self.study, self.predict, variables)

    @functools.cached_property
    def ensemble(self) -> TrainState:
        return ensemble(self.settings, self.study, self.seed)

    @functools.cached_property
    def of_ensemble(self) -> Rows:
        return self.of_states(self.ensemble)

    @functools.cached_property
    def of_swa(self) -> Rows:
        return self.of_one(swa(self.settings, self.study, self.seed))

    @functools.cached_property
    def ingredients(self) -> TrainState:
        return ingredients(self.settings, self.study, self.seed)

    @functools.cached_property
    def singles(self) -> list[Variables]:
        """The ingredients one by one."""
        count = self.settings.members
        return [weights_of(member_state(self.ingredients, number)) for number in range(count)]

    @functools.cached_property
    def greedy(self) -> tuple[Rows, int]:
        """Of the greedy soup, and how many ingredients it has."""
        part = self.study.measured["val"]
        predict, labels = jax.jit(self.predict), labels_of(part)

        def accuracy(variables: Variables) -> float:
            once = evaluation_batches(part.columns(), batch_size=500)
            rows = collect(predict, variables, once, size=len(part))
            return float(np.mean(rows.argmax(axis=1) == labels))

        soup, chosen = greedy_soup(self.singles, accuracy)
        return self.of_one(soup), len(chosen)

    def dropped(self) -> Rows:
        """Of passes of the ensemble's first member with dropout, [N, S, C]."""
        draw = dropout_log_probabilities(self.study.model, self.settings.samples)
        rng = jax.random.key(self.seed)
        fn = self.study.through(lambda variables, batch: draw(variables, batch, rng))
        return collected(self.study, fn, weights_of(member_state(self.ensemble, 0)))

    def blend(self) -> tuple[Rows, np.ndarray]:
        """Of all nets by weights, and the weights."""
        others = (self.of_swa, self.greedy[0])
        everything = {
            split: np.concatenate(
                [self.of_ensemble[split], np.stack([rows[split] for rows in others], axis=1)],
                axis=1,
            )
            for split in SPLITS
        }
        weights = stacking_weights(everything["val"], labels_of(self.study.measured["val"]))
        return {
            split: np.asarray(mean_log_probabilities(rows, weights))
            for split, rows in everything.items()
        }, weights


def measured(study: Study, rows: Rows) -> dict[str, float]:
    """What predictions are worth.

    Args:
        study: the pictures.
        rows: log-probabilities [N, C].
    """
    from sklearn.metrics import roc_auc_score

    labels = labels_of(study.measured["test"])
    temperature = fit_temperature(rows["val"], labels_of(study.measured["val"]))
    unsure = {s: uncertainty(rows[s][:, None]).predictive_entropy for s in ("test", "others")}
    out = np.repeat([0, 1], [len(rows["test"]), len(rows["others"])])
    entropies = np.concatenate([unsure["test"], unsure["others"]])
    results = {
        "accuracy": float(np.mean(rows["test"].argmax(axis=1) == labels)),
        "AUROC of others": float(roc_auc_score(out, entropies)),
    }
    for name, by in (("", 1.0), (", scaled", temperature)):
        logits = rows["test"] / by
        probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
        results |= {
            f"NLL{name}": negative_log_likelihood(logits, labels),
            f"ECE{name}": expected_calibration_error(probabilities, labels),
        }
    return results | {"temperature": temperature}


def of_several(study: Study, members: Rows) -> dict[str, float]:
    """What a mixture is worth, and how its members differ on test pictures.

    Args:
        study: the pictures.
        members: log-probabilities [N, K, C].
    """
    unsure = {split: uncertainty(rows) for split, rows in members.items()}
    mixture = {split: np.asarray(u.log_probabilities) for split, u in unsure.items()}
    return measured(study, mixture) | {
        "information": float(unsure["test"].mutual_information.mean()),
        "of others": float(unsure["others"].mutual_information.mean()),
        "disagreement": float(unsure["test"].disagreement.mean()),
    }


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    study = load(settings)
    # Seeds come one after the other: those before are not kept.
    nets = functools.lru_cache(maxsize=1)(functools.partial(Nets, settings, study))

    def single(seed: int) -> dict[str, float]:
        return measured(study, {s: rows[:, 0] for s, rows in nets(seed).of_ensemble.items()})

    def greedy(seed: int) -> dict[str, float]:
        rows, count = nets(seed).greedy
        return measured(study, rows) | {"nets": float(count)}

    def blend(seed: int) -> dict[str, float]:
        rows, weights = nets(seed).blend()
        return measured(study, rows) | {"nets": float(np.sum(weights > 0.01))}

    def uniform(seed: int) -> dict[str, float]:
        return measured(study, nets(seed).of_one(uniform_soup(nets(seed).singles)))

    arms: dict[str, comparison.Arm] = {
        "single": single,
        "MC dropout": lambda seed: of_several(study, nets(seed).dropped()),
        "ensemble": lambda seed: of_several(study, nets(seed).of_ensemble),
        "SWA": lambda seed: measured(study, nets(seed).of_swa),
        "uniform soup": uniform,
        "greedy soup": greedy,
        "of ingredients": lambda seed: of_several(
            study, nets(seed).of_states(nets(seed).ingredients)
        ),
        "blend": blend,
    }
    print(table(compare(settings, arms)))


if __name__ == "__main__":
    main()
