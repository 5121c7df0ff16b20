"""Sentiment and parts of speech on one trunk, against a model of its own for each.

    python experiments/multitask_text.py --output runs/multitask

The trunk is the real MiniLM; the texts are rated movie sentences and sentences of the Brown corpus.
Every arm takes as many steps on a task as the others do.

Test accuracy, 3 seeds, 14 minutes of CPU:

|                          | sentiment     | tags          |
| ---                      | ---           | ---           |
| alone                    | 0.786 ± 0.011 | 0.813 ± 0.002 |
| one trunk, drawn         | 0.702 ± 0.017 | 0.856 ± 0.005 |
| one trunk, joint         | 0.539 ± 0.093 | 0.805 ± 0.006 |
| one trunk, uncertainties | 0.572 ± 0.052 | 0.831 ± 0.005 |

In so few steps tags gain from the shared trunk where tasks are drawn, and sentiment loses in every
way of sharing it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import comparison
import jax
import numpy as np
import tyro

import fmjax
from fmjax.data import BatchStream, align_labels, encode
from fmjax.data.batches import batches
from fmjax.data.brown import load_brown
from fmjax.data.conll import read_conll
from fmjax.data.mixture import Mixture, mixing_rates
from fmjax.methods.multitask import by_uncertainty, join, mix, view, with_uncertainty
from fmjax.recipes.texts import TextData, evaluation_batches, labels_of, load_splits, model_source
from fmjax.recipes.training import weights_of
from fmjax.tasks import sequence_classification, token_classification
from fmjax.train import adamw, fit, gradient, init_state, jit_step, make_train_step, warmup_linear
from fmjax.tree import count_parameters
from fmjax.types import StepFn, Variables

MOOD, TAGS = "mood", "tags"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(comparison.Settings, TextData):
    """Train on two tasks."""

    tagged: str = "brown"
    """Tagged sentences: the Brown corpus, or training sentences in columns."""
    tagged_val: str | None = None
    """Sentences to measure on, when tagged is a file."""
    model: str = "minilm"
    """The trunk: a folder, a hub id, or "minilm"."""
    max_length: int = 40
    """Tokens a text is cut to; one shape, of which each set of tasks compiles one program."""
    batch_size: int = 32
    """Examples a step."""
    train_texts: int = 2000
    """Training texts of each task, drawn by the seed."""
    test_texts: int = 1000
    """Tagged sentences to measure on, at most."""
    steps: int = 60
    """Steps of each task, on average where tasks are drawn."""
    temperature: float = 1.0
    """Of the draws; see `mixing_rates`."""
    learning_rate: float = 2e-4
    """Peak of a schedule that warms up over a tenth of the steps and then falls linearly to 0."""


class Bench:
    """Both tasks' data and models, and how they are trained and measured."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.program = settings, functools.cache(self.made)
        source = model_source(settings.model)
        self.tokenizer = fmjax.load_tokenizer(source)
        self.texts = load_splits(settings)
        if settings.tagged == "brown":
            self.sentences = {"train": load_brown("train"), "val": load_brown("val")}
        else:
            train = read_conll(settings.tagged)
            held_out = read_conll(settings.tagged_val or settings.tagged, tag_names=train.tag_names)
            self.sentences = {"train": train, "val": held_out}
        names = {
            MOOD: self.texts["train"].label_names,
            TAGS: self.sentences["train"].tag_names,
        }
        heads = {MOOD: "sequence_classification", TAGS: "token_classification"}
        loaded = {
            task: fmjax.load(
                source, head=head, num_labels=names[task], new=("head/",), rng=jax.random.key(0)
            )
            for task, head in heads.items()
        }
        self.models = {task: model for task, (model, _) in loaded.items()}
        self.variables = {task: variables for task, (_, variables) in loaded.items()}
        self.losses = {
            MOOD: sequence_classification.loss(self.models[MOOD]),
            TAGS: token_classification.loss(self.models[TAGS]),
        }
        held_out = self.sentences["val"]
        held_out = held_out.select(np.arange(min(len(held_out), settings.test_texts)))
        self.measured_on = {MOOD: self.encoded(self.texts["val"]), TAGS: self.aligned(held_out)}

    def encoded(self, texts: Any) -> Any:
        return encode(
            self.tokenizer, texts, max_length=self.settings.max_length,
            vocab_size=self.models[MOOD].config.vocab_size,
        )  # fmt: skip

    def aligned(self, sentences: Any) -> Any:
        return align_labels(
            self.tokenizer, sentences.words, sentences.tags,
            label_names=self.sentences["train"].tag_names, max_length=self.settings.max_length,
            vocab_size=self.models[TAGS].config.vocab_size,
        ).columns  # fmt: skip

    def stream(self, task: str, seed: int) -> BatchStream:
        """A task's training batches."""
        settings = self.settings
        examples = (self.texts if task == MOOD else self.sentences)["train"]
        part = comparison.drawn(examples, settings.train_texts, seed)
        return batches(
            self.encoded(part) if task == MOOD else self.aligned(part),
            batch_size=settings.batch_size, seed=seed, buckets=[settings.max_length],
            pad_id=self.tokenizer.pad_token_id if task == MOOD else None,
        )  # fmt: skip

    def made(self, tasks: tuple[str, ...], steps: int, uncertain: bool) -> tuple[Any, StepFn]:
        """The optimizer and the step, to be compiled once for all seeds."""
        losses = {task: self.losses[task] for task in tasks}
        if uncertain:
            losses = {task: by_uncertainty(loss) for task, loss in losses.items()}
        tx = adamw(warmup_linear(self.settings.learning_rate, steps=steps, warmup=steps // 10))
        return tx, jit_step(make_train_step(gradient(mix(losses)), tx))

    def trained(
        self, tasks: tuple[str, ...], seed: int, *, joint: bool = False, uncertain: bool = False
    ) -> Variables:
        """The joined variables after training on some tasks."""
        settings = self.settings
        variables = {task: self.variables[task] for task in tasks}
        if uncertain:
            variables = {task: with_uncertainty(tree) for task, tree in variables.items()}
        streams = {task: self.stream(task, seed) for task in tasks}
        rates = mixing_rates(
            dict.fromkeys(tasks, settings.train_texts), temperature=settings.temperature
        )
        stream = Mixture(streams, None if joint else rates, seed=seed)
        steps = settings.steps * (1 if joint else len(tasks))
        tx, step = self.program(tasks, steps, uncertain)
        copies = jax.tree.map(np.asarray, join(variables))  # the state is donated
        state = fit(init_state(copies, tx, jax.random.key(seed)), step, stream, steps=steps)
        stream.close()
        return weights_of(state)

    def measured(self, variables: Variables, tasks: tuple[str, ...]) -> dict[str, float]:
        """Accuracy on texts held out, and how many parameters it took."""
        numbers = {}
        if MOOD in tasks:
            once = evaluation_batches(
                self.measured_on[MOOD],
                self.tokenizer.pad_token_id,
                buckets=[self.settings.max_length],
            )
            found = sequence_classification.evaluate(
                self.models[MOOD], view(variables, MOOD), once, labels_of(self.texts["val"])
            )
            numbers["sentiment accuracy"] = found.metrics["accuracy"]
        if TAGS in tasks:
            data = self.measured_on[TAGS]
            found = token_classification.evaluate(
                self.models[TAGS],
                view(variables, TAGS),
                evaluation_batches(data, buckets=[self.settings.max_length]),
                size=len(data),
            )
            numbers["tags accuracy"] = found.metrics["accuracy"]
        return {**numbers, "parameters": float(count_parameters(variables))}


def arms(settings: Settings) -> Mapping[str, comparison.Arm]:
    """Each task alone, and both by batches drawn, by joint batches, by uncertainties."""
    bench = Bench(settings)

    def arm(*tasks: str, **how: bool) -> comparison.Arm:
        return lambda seed: bench.measured(bench.trained(tasks, seed, **how), tasks)

    return {
        "sentiment alone": arm(MOOD),
        "tags alone": arm(TAGS),
        "one trunk, drawn": arm(MOOD, TAGS),
        "one trunk, joint": arm(MOOD, TAGS, joint=True),
        "one trunk, uncertainties": arm(MOOD, TAGS, joint=True, uncertain=True),
    }


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    print(comparison.table(comparison.compare(settings, arms(settings))))


if __name__ == "__main__":
    main()
