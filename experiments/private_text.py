"""Fine-tuning MiniLM on film reviews with differential privacy, and an audit of who can tell.

    python experiments/private_text.py --output runs/private

About half a minute an arm and seed on a busy machine of 2 CPU cores. Means and standard deviations
of three seeds; the linear probe of `linear_probe.py`, on all tokens, has 0.771:

    | epsilon | test accuracy   | advantage     | auc           | tpr at 1 %    | epsilon at least |
    | ---     | ---             | ---           | ---           | ---           | ---              |
    | inf     | 0.762 ± 0.003   | 0.412 ± 0.010 | 0.785 ± 0.007 | 0.110 ± 0.002 | 1.12 ± 0.23      |
    | 8       | 0.755 ± 0.003   | 0.138 ± 0.023 | 0.593 ± 0.015 | 0.023 ± 0.001 | 0.30 ± 0.15      |
    | 3       | 0.753 ± 0.005   | 0.032 ± 0.012 | 0.517 ± 0.006 | 0.013 ± 0.002 | 0.01 ± 0.02      |
    | 1       | 0.744 ± 0.002   | 0.012 ± 0.004 | 0.503 ± 0.004 | 0.011 ± 0.004 | 0                |

Every arm draws its batches independently (Poisson sampling) and takes the same number of steps;
what differs is how much noise its epsilon needs. The head is trained on frozen features, which is
what `--parts biases all` start from: these put the whole encoder into every step, and have not been
measured.

The audit trains the head on 32 random halves of 600 texts at once, by the same settings and
epsilon, and attacks each model with the 31 others as shadows (LiRA): `advantage` and `auc` of the
attack, its true positive rate at 1 % false ones, the advantage of a threshold on the loss, and the
epsilon that the first model's attack proves (95 % confidence), which must be below the epsilon.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import comparison
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from comparison import compare, table

import fmjax
from fmjax.data import Columns
from fmjax.data.sampled import UNLIKELY, capacity_of, sampled_batches
from fmjax.methods.accounting import epsilon_of, noise_for
from fmjax.methods.ensembles import member_states, of_members
from fmjax.methods.membership import (
    attack_metrics,
    epsilon_lower_bound,
    example_losses,
    fair_coins,
    likelihood_ratio,
    logit_confidence,
    shadow_step,
    threshold_advantage,
)
from fmjax.methods.privacy import private_gradient
from fmjax.recipes.linear_probe import features
from fmjax.recipes.texts import (
    TextData,
    encode_splits,
    evaluation_batches,
    labels_of,
    load_splits,
    model_source,
)
from fmjax.tasks.apply import collect, means
from fmjax.tasks.feature_extraction import encoder
from fmjax.train import fit, init_state, jit_step, make_train_step
from fmjax.tree import merge
from fmjax.types import Aux, Batch, LossFn, Mean, StepFn, Variables

Part = Literal["head", "biases", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(comparison.Settings, TextData):
    """Fine-tune a text classifier with differential privacy."""

    model: str = "minilm"
    """A folder, a hub id, or "minilm" (all-MiniLM-L6-v2 from its package)."""
    max_length: int = 48
    """Tokens a text is cut to."""
    parts: tuple[Part, ...] = ("head",)
    """What is trained: the head, the head and all biases (BitFit), or everything."""
    epsilons: tuple[float, ...] = (math.inf, 8.0, 3.0, 1.0)
    """Arms; infinity is training without clipping and noise, the baseline."""
    delta: float = 1e-5
    """The chance that the guarantee may fail."""
    batch_size: int = 512
    """Expected examples of a step."""
    steps: int = 150
    """Of every arm."""
    clip_norm: float = 0.1
    """The bound of one example's gradient."""
    learning_rate: float = 0.03
    """Of Adam, for the head."""
    encoder_learning_rate: float = 1e-3
    """Of Adam, where the encoder trains too."""
    microbatch_size: int = 32
    """Examples whose gradients are in memory at once; of everything, 32 take 3 GB."""
    audited: int = 600
    """Texts of the audit; 0 for none."""
    audit_rate: float = 0.25
    """Share of them that is drawn for a step."""
    shadows: int = 32
    """Models of the audit, even."""


class Data(NamedTuple):
    """One part's model and data."""

    loss: LossFn
    variables: Variables
    is_trainable: Callable[[str], bool]
    train: Columns
    test: Columns


def classifier(vectors_of: Callable[[Variables, Batch], jax.Array]) -> LossFn:
    """The cross-entropy of a linear head on unit vectors, in nats, and the accuracy."""

    def loss_fn(variables: Variables, batch: Batch, rng: Any) -> tuple[jax.Array, Aux]:
        head = variables["head"]
        logits = vectors_of(variables, batch) @ head["kernel"] + head["bias"]  # [B, C]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        mean = Mean.of(losses, batch["weight"])
        right = Mean.of(logits.argmax(-1) == batch["labels"], batch["weight"])
        return mean.value, Aux(mean.weight, {"accuracy": right}, {})

    return loss_fn


def load(settings: Settings) -> dict[Part, Data]:
    """What each part trains, on what."""
    splits = load_splits(settings)
    classes = len(splits["train"].label_names)
    source = model_source(settings.model)
    model, variables = fmjax.load(source, head="model")
    tokenizer = fmjax.load_tokenizer(source)
    encoded = encode_splits(
        tokenizer, splits, max_length=settings.max_length, vocab_size=model.config.vocab_size
    )
    width = model.config.hidden_size
    head = {"head": {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}}
    parts: dict[Part, Data] = {}
    if "head" in settings.parts or settings.audited:
        vectors = features(model, variables, encoded, tokenizer.pad_token_id)
        parts["head"] = Data(
            classifier(lambda _, batch: jnp.asarray(batch["vectors"])),
            head,
            lambda path: path.startswith("head/"),
            *(
                Columns(
                    (),
                    {
                        "vectors": rows / np.linalg.norm(rows, axis=1, keepdims=True),
                        "labels": labels_of(splits[split]),
                    },
                )
                for split, rows in vectors.items()
                if split != "val"
            ),
        )
    encode = encoder(model, pooling="mean", normalize=True)
    for part in settings.parts:
        if part != "head":
            parts[part] = Data(
                classifier(
                    lambda variables, batch: encode(
                        {"params": variables["params"]},
                        {name: x for name, x in batch.items() if name != "labels"},
                        None,
                        train=False,
                    )[0]
                ),
                merge(variables, head),
                (lambda path: path.startswith("head/") or path.endswith("/bias"))
                if part == "biases"
                else (lambda path: True),
                encoded["train"].columns(tokenizer.pad_token_id),
                encoded["test"].columns(tokenizer.pad_token_id),
            )
    return parts


class Plan(NamedTuple):
    """A private run: its batches and steps."""

    rate: float
    capacity: int
    noise: float
    tx: optax.GradientTransformation
    step: StepFn


def plan(
    settings: Settings,
    part: Part,
    data: Data,
    epsilon: float,
    *,
    size: int,
    rate: float,
    counted: float = 1.0,
) -> Plan:
    """How `size` examples, of which a share of `counted` counts, are trained on."""
    piece = settings.microbatch_size
    noise = noise_for(
        epsilon,
        delta=settings.delta,
        sample_rate=rate,
        steps=settings.steps,
        overflow=UNLIKELY,
    )
    grad_fn = private_gradient(
        data.loss,
        clip_norm=math.inf if math.isinf(epsilon) else settings.clip_norm,
        noise_multiplier=noise,
        expected_batch_size=rate * size * counted,
        microbatch_size=piece,
    )
    tx = optax.adam(settings.learning_rate if part == "head" else settings.encoder_learning_rate)
    capacity = capacity_of(size, rate, settings.steps, multiple=piece)
    return Plan(rate, capacity, noise, tx, make_train_step(grad_fn, tx))


def arm(settings: Settings, part: Part, data: Data, epsilon: float, seed: int) -> dict[str, float]:
    """Trains once and measures on the test texts; the head is audited too."""
    size = len(data.train)
    rate = min(1.0, settings.batch_size / size)
    planned = plan(settings, part, data, epsilon, size=size, rate=rate)
    stream = sampled_batches(
        data.train, rate=planned.rate, capacity=planned.capacity, seed=seed + 1
    )
    variables = jax.tree.map(jnp.copy, data.variables)
    state = init_state(variables, planned.tx, jax.random.key(seed), data.is_trainable)
    state = fit(state, jit_step(planned.step), stream, steps=settings.steps)
    stream.close()
    trained = merge(state.trainable, state.non_trainable)
    measured = means(data.loss, trained, evaluation_batches(data.test, batch_size=128))
    results = {
        "test accuracy": measured["accuracy"].value,
        "test loss": measured["loss"].value,
        "noise": planned.noise,
    }
    if planned.noise:
        results["spent"] = epsilon_of(
            planned.noise,
            delta=settings.delta,
            sample_rate=planned.rate,
            steps=settings.steps,
            overflow=UNLIKELY,
        )
    if part == "head" and settings.audited:
        results |= audit(settings, data, epsilon, seed)
    return results


def audit(settings: Settings, data: Data, epsilon: float, seed: int) -> dict[str, float]:
    """Trains models on random halves of some texts, and attacks each with the others."""
    size = min(settings.audited, len(data.train))
    pool = data.train.select(np.random.default_rng(seed).permutation(len(data.train))[:size])
    planned = plan(
        settings, "head", data, epsilon, size=size, rate=settings.audit_rate, counted=0.5
    )
    included = fair_coins(settings.shadows, size, seed=seed)
    states = member_states(
        lambda rng: init_state(data.variables, planned.tx, rng, data.is_trainable),
        jax.random.split(jax.random.key(seed), settings.shadows),
    )
    stream = sampled_batches(pool, rate=planned.rate, capacity=planned.capacity, seed=seed + 1)
    step = jax.jit(shadow_step(planned.step, included))
    for _ in range(settings.steps):
        states, _ = step(states, next(stream))
    stream.close()
    losses_of = jax.jit(of_members(example_losses(data.loss)))
    losses = collect(
        lambda _, batch: losses_of(states, batch), {}, evaluation_batches(pool), size=size
    ).T  # [K, N]
    confidences = logit_confidence(losses)
    scores = np.stack(
        [
            likelihood_ratio(
                confidences[k], np.delete(confidences, k, 0), np.delete(included, k, 0)
            )
            for k in range(settings.shadows)
        ]
    )
    metrics = attack_metrics(scores[included], scores[~included], at=(0.01,))
    return {
        **{f"audit {name}": value for name, value in metrics.items()},
        "audit by loss": float(
            np.mean(
                [
                    threshold_advantage(row[mine], row[~mine])
                    for row, mine in zip(losses, included, strict=True)
                ]
            )
        ),
        "epsilon at least": epsilon_lower_bound(
            scores[0][included[0]], scores[0][~included[0]], delta=settings.delta
        ),
    }


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    parts = load(settings)
    arms: dict[str, comparison.Arm] = {}
    for part in settings.parts:
        for epsilon in settings.epsilons:
            arms[f"{part}, epsilon {epsilon:g}"] = functools.partial(
                arm, settings, part, parts[part], epsilon
            )
    print(table(compare(settings, arms)))


if __name__ == "__main__":
    main()
