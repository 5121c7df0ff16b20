"""A small student of a fine-tuned encoder: with and without what the teacher knows.

    python experiments/distill_text.py --output runs/distill

The teacher is the real MiniLM (six layers), fine-tuned on all rated movie sentences; its students
have every second of its layers and train on fewer of the sentences, once through.

Three seeds, some 20 minutes on 2 busy cores, 1,076 test texts (a standard error of 0.012); forward
passes beside other work:

|                            | test accuracy   | parameters | forward       |
| ---                        | ---             | ---        | ---           |
| teacher                    | 0.845           | 22.7 M     | 149 to 302 ms |
| labels, pretrained layers  | 0.735 +- 0.012  | 17.4 M     | 111 to 115 ms |
| labels, teacher's layers   | 0.792 +- 0.005  | 17.4 M     | 112 to 117 ms |
| soft labels                | 0.793 +- 0.006  | 17.4 M     | 114 to 160 ms |
| soft labels, hidden states | 0.798 +- 0.001  | 17.4 M     | 110 to 115 ms |

To begin with the fine-tuned teacher's layers is worth six points; what the teacher says of the
texts adds half of one, less than chance could.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import comparison
import jax
import numpy as np
import tyro

import fmjax
from fmjax.data import encode
from fmjax.data.batches import batches, shared_buckets
from fmjax.methods.distillation import distilled, is_student, student_only, with_teacher
from fmjax.methods.distillation_terms import Term, evenly, same_hidden_states, soft_labels
from fmjax.methods.shallower import student_of
from fmjax.perf.timing import time_alternately
from fmjax.recipes.texts import (
    TextData,
    evaluation_batches,
    labels_of,
    load_splits,
    model_source,
)
from fmjax.recipes.training import computed, weights_of
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.apply import once
from fmjax.train import (
    adamw,
    fit,
    gradient,
    init_state,
    jit_step,
    make_train_step,
    warmup_linear,
)
from fmjax.tree import count_parameters
from fmjax.types import LossFn, StepFn, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(comparison.Settings, TextData):
    """Distil a text classifier."""

    model: str = "minilm"
    """What becomes the teacher: a folder, a hub id, or "minilm"."""
    max_length: int = 64
    """Tokens a text is cut to."""
    batch_size: int = 32
    """Examples a step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation in training; the weights stay float32."""
    teacher_steps: int = 200
    """Steps of the teacher, on all texts."""
    steps: int = 80
    """Steps of each student."""
    train_texts: int = 2560
    """Texts that students train on, drawn by the seed."""
    learning_rate: float = 1e-4
    """Peak of a schedule that warms up over a tenth of the steps and then falls linearly to 0."""
    stride: int = 2
    """Students have every so many of the teacher's layers."""
    temperature: float = 2.0
    """Of the soft labels."""
    soft: float = 0.5
    """Coefficient of the soft labels; the task's own loss has the rest to 1."""
    hidden: float = 1.0
    """Coefficient of the hidden states, where they are followed."""


class Bench:
    """The data, and how any model is trained and measured on them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        source = model_source(settings.model)
        self.examples = load_splits(settings)
        self.names = self.examples["train"].label_names
        self.model, self.pretrained = fmjax.load(
            source, head="sequence_classification", num_labels=self.names, new=("head/",),
            rng=jax.random.key(0),
        )  # fmt: skip
        self.tokenizer = fmjax.load_tokenizer(source)
        self.encode = functools.partial(
            encode, self.tokenizer, max_length=settings.max_length,
            vocab_size=self.model.config.vocab_size,
        )  # fmt: skip
        self.encoded = {split: self.encode(texts) for split, texts in self.examples.items()}
        self.buckets = shared_buckets(*self.encoded.values(), count=2)

    def program(self, loss: LossFn, steps: int) -> tuple[Any, StepFn]:
        """The optimizer and the step, to be compiled once for all seeds."""
        settings = self.settings
        loss = computed(loss, settings.precision)
        tx = adamw(warmup_linear(settings.learning_rate, steps=steps, warmup=steps // 10))
        return tx, jit_step(make_train_step(gradient(loss), tx))

    def trained(
        self, variables: Variables, program: tuple[Any, StepFn], *, steps: int, seed: int,
        texts: int | None,
    ) -> Variables:  # fmt: skip
        """The variables after so many steps on so many texts."""
        train = self.encoded["train"]
        if texts is not None and texts < len(train):
            train = self.encode(comparison.drawn(self.examples["train"], texts, seed))
        stream = batches(
            train, batch_size=self.settings.batch_size, pad_id=self.tokenizer.pad_token_id,
            seed=seed, buckets=self.buckets,
        )  # fmt: skip
        tx, step = program
        copies = jax.tree.map(np.asarray, variables)  # the state is donated
        state = init_state(copies, tx, jax.random.key(seed), is_student)
        state = fit(state, step, stream, steps=steps)
        stream.close()
        return weights_of(state)

    def measured(self, model: Any, variables: Variables) -> dict[str, float]:
        """Accuracy on texts held out, size, and the time of a forward pass."""
        numbers = {}
        for split in (split for split in ("val", "test") if split in self.examples):
            held_out = evaluation_batches(
                self.encoded[split], self.tokenizer.pad_token_id, buckets=self.buckets
            )
            found = task.evaluate(model, variables, held_out, labels_of(self.examples[split]))
            numbers[f"{split} accuracy"] = found.metrics["accuracy"]
        predict = jax.jit(once(task.predict, model))  # the function that was compiled above
        length = self.settings.max_length
        full = {
            "input_ids": np.ones((self.settings.batch_size, length), np.int32),
            "attention_mask": np.ones((self.settings.batch_size, length), np.int32),
        }
        pass_once = {"forward": lambda: jax.block_until_ready(predict(variables, full))}
        numbers["forward ms"] = 1e3 * time_alternately(pass_once, repeats=10)["forward"].min
        return {**numbers, "parameters": float(count_parameters(variables))}


def arms(settings: Settings) -> Mapping[str, comparison.Arm]:
    """The teacher, and its students by what they learn from."""
    bench = Bench(settings)

    @functools.cache
    def teacher() -> tuple[Any, Variables]:
        """Fine-tuned once, and kept in the folder."""
        folder = settings.output / "teacher"
        if not (folder / "config.json").exists():
            steps = settings.teacher_steps
            program = bench.program(task.loss(bench.model), steps)
            made = bench.trained(bench.pretrained, program, steps=steps, seed=0, texts=None)
            fmjax.save(folder, bench.model, made)
        return fmjax.load(folder)

    def student(
        *terms: tuple[float, Term], hard: float = 1.0, knows: bool = True
    ) -> comparison.Arm:
        """Of the teacher's layers or, if it is not to know the teacher, of the pretrained ones."""

        @functools.cache
        def begun() -> tuple[Any, Variables, tuple[Any, StepFn]]:
            model, taught = teacher()
            own = taught if knows else bench.pretrained
            layers = range(0, model.config.num_hidden_layers, settings.stride)
            small, variables = student_of(model, own, layers)
            loss = task.loss(small)
            if terms:
                loss = distilled(task.loss, small, model, *terms, hard=hard)
                variables = with_teacher(variables, taught)
            return small, variables, bench.program(loss, settings.steps)

        def run(seed: int) -> dict[str, float]:
            small, variables, program = begun()
            made = bench.trained(
                variables, program, steps=settings.steps, seed=seed, texts=settings.train_texts
            )
            return bench.measured(small, student_only(made))

        return run

    layers = bench.model.config.num_hidden_layers
    pairs = evenly(len(range(0, layers, settings.stride)), layers)
    soft = (settings.soft, soft_labels(settings.temperature))
    hidden = (settings.hidden, same_hidden_states(pairs))
    return {
        "teacher": lambda seed: bench.measured(*teacher()),
        "labels, pretrained layers": student(knows=False),
        "labels, teacher's layers": student(),
        "soft labels": student(soft, hard=1 - settings.soft),
        "soft labels, hidden states": student(soft, hidden, hard=1 - settings.soft),
    }


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    print(comparison.table(comparison.compare(settings, arms(settings))))


if __name__ == "__main__":
    main()
