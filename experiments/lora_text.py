"""A pretrained encoder fine-tuned in whole, or by few parameters: what each costs and reaches.

    python experiments/lora_text.py --output runs/lora

The real MiniLM on rated movie sentences. All arms train the classifier and the pooler, which are
the whole of "head"; beside these, all parameters ("all"), the biases (Ben Zaken et al. 2022,
arXiv:2106.10199), or adapters. Each arm has the learning rate that is usual for it; none is tuned.

Three seeds, 9 minutes of CPU; bytes of the optimizer's state and of the step at its peak:

| arm                  | accuracy      | trainable | optimizer | peak   |
|----------------------|---------------|-----------|-----------|--------|
| all                  | 0.765 ± 0.008 | 22.7 M    | 182 MB    | 273 MB |
| head                 | 0.646 ± 0.012 | 0.15 M    | 1.2 MB    | 92 MB  |
| biases               | 0.727 ± 0.023 | 0.17 M    | 1.4 MB    | 92 MB  |
| low-rank             | 0.718 ± 0.013 | 0.22 M    | 1.8 MB    | 93 MB  |
| low-rank, decomposed | 0.720 ± 0.013 | 0.23 M    | 1.8 MB    | 93 MB  |
| bottlenecks          | 0.708 ± 0.010 | 0.30 M    | 2.4 MB    | 94 MB  |
| factors              | 0.681 ± 0.008 | 0.16 M    | 1.3 MB    | 92 MB  |
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import comparison
import jax
import numpy as np
import tyro

import fmjax
from fmjax.data import encode
from fmjax.data.batches import batches
from fmjax.methods import bottleneck, ia3, lora
from fmjax.methods.adapted_layers import is_adapter
from fmjax.perf.timing import compile_time
from fmjax.recipes.texts import TextData, evaluation_batches, labels_of, load_splits, model_source
from fmjax.recipes.training import weights_of
from fmjax.tasks import sequence_classification as task
from fmjax.train import (
    adamw,
    gradient,
    init_state,
    is_param,
    make_train_step,
    warmup_linear,
)
from fmjax.tree import count
from fmjax.types import Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(comparison.Settings, TextData):
    """Fine-tune a text classifier by few parameters."""

    model: str = "minilm"
    """A folder, a hub id, or "minilm"."""
    max_length: int = 32
    """Tokens a text is cut and padded to."""
    train_texts: int = 1000
    """Texts to train on, drawn by the seed."""
    test_texts: int = 1000
    """Texts to measure on."""
    batch_size: int = 32
    """Examples a step."""
    epochs: int = 2
    """Passes over the training texts."""
    rank: int = 8
    """Of low-rank updates; alpha is twice the rank."""
    width: int = 16
    """Of bottlenecks."""
    learning_rate: float = 1e-4
    """Peak of all parameters' schedule, which warms up and then falls linearly to 0."""
    adapter_learning_rate: float = 1e-3
    """The same of low-rank updates and bottlenecks."""
    vector_learning_rate: float = 5e-3
    """The same of biases, factors, and the head alone."""


def is_head(path: str) -> bool:
    """What was not pretrained for sentences' classes."""
    return path.startswith(("params/head/", "params/pooler/"))


def is_bias(path: str) -> bool:
    """What BitFit trains beside the head."""
    return is_head(path) or (is_param(path) and path.endswith("/bias"))


def is_adapter_or_head(path: str) -> bool:
    """What adapters train."""
    return is_adapter(path) or is_head(path)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to fine-tune: variables, what of them trains, and how fast."""

    make: Callable[[Variables, jax.Array], Variables]
    is_trainable: Callable[[str], bool]
    learning_rate: float


def ways(settings: Settings) -> dict[str, Way]:
    """All ways, by name."""
    rank, alpha = settings.rank, 2.0 * settings.rank
    slow, medium = settings.learning_rate, settings.adapter_learning_rate
    fast = settings.vector_learning_rate

    def low_rank(variables: Variables, rng: jax.Array, decomposed: bool) -> Variables:
        return lora.add(variables, rng, rank=rank, alpha=alpha, weight_decomposed=decomposed)

    def as_it_is(variables: Variables, rng: jax.Array) -> Variables:
        return variables

    return {
        "all": Way(as_it_is, is_param, slow),
        "head": Way(as_it_is, is_head, fast),
        "biases": Way(as_it_is, is_bias, fast),
        "low-rank": Way(lambda v, rng: low_rank(v, rng, False), is_adapter_or_head, medium),
        "low-rank, decomposed": Way(
            lambda v, rng: low_rank(v, rng, True), is_adapter_or_head, medium
        ),
        "bottlenecks": Way(
            lambda v, rng: bottleneck.add(v, rng, width=settings.width), is_adapter_or_head, medium
        ),
        "factors": Way(lambda v, rng: ia3.add(v), is_adapter_or_head, fast),
    }


class Bench:
    """The data, and how one way is trained and measured on them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.source = model_source(settings.model)
        self.tokenizer = fmjax.load_tokenizer(self.source)
        self.examples = load_splits(settings)
        held = self.examples.get("test", self.examples["val"])
        self.held = held.select(np.arange(min(settings.test_texts, len(held))))

    def run(self, way: Way, seed: int) -> Mapping[str, float]:
        """One training run."""
        settings, pad = self.settings, self.tokenizer.pad_token_id
        train = self.examples["train"]
        rng = jax.random.key(seed)
        model, variables = fmjax.load(
            self.source, head="sequence_classification", num_labels=train.label_names,
            new=("head/",), rng=rng,
        )  # fmt: skip

        def encoded(examples: Any) -> Any:
            return encode(
                self.tokenizer, examples, max_length=settings.max_length,
                vocab_size=model.config.vocab_size,
            )  # fmt: skip

        buckets = [settings.max_length]
        stream = batches(
            encoded(comparison.drawn(train, settings.train_texts, seed)),
            batch_size=settings.batch_size, pad_id=pad, seed=seed, buckets=buckets,
        )  # fmt: skip
        steps = settings.epochs * stream.batches_per_epoch
        schedule = warmup_linear(way.learning_rate, steps=steps, warmup=steps // 10)
        tx = adamw(schedule)
        state = init_state(way.make(variables, rng), tx, rng, way.is_trainable)
        given = iter(stream)
        batch = next(given)
        train_step = make_train_step(gradient(task.loss(model)), tx)
        step = compile_time(jax.jit(train_step, donate_argnums=0), state, batch)
        trainable, moments = count(state.trainable), state.opt_state
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(moments))
        seconds = []
        for number in range(steps):
            begun = time.perf_counter()
            state, metrics = step.call(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - begun)
            if number + 1 < steps:
                batch = next(given)
        stream.close()
        once = evaluation_batches(encoded(self.held), pad, buckets=buckets)
        found = task.evaluate(model, weights_of(state), once, labels_of(self.held))
        return {
            "accuracy": found.metrics["accuracy"],
            "trainable": trainable,
            "optimizer MB": kept / 1e6,
            "peak MB": step.memory["peak"] / 1e6,
            "step s": statistics.median(seconds),
        }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the experiment, prints its table and returns its results."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    bench = Bench(settings)
    arms: dict[str, comparison.Arm] = {
        name: lambda seed, way=way: bench.run(way, seed) for name, way in ways(settings).items()
    }
    results = comparison.compare(settings, arms)
    print(comparison.table(results))
    return results


if __name__ == "__main__":
    main()
