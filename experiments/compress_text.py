"""What a fine-tuned encoder loses when it is made smaller, by every way to do so.

    python experiments/compress_text.py --output runs/compress

The real MiniLM, fine-tuned once on rated movie sentences, is pruned (weights, 2 of 4 weights,
heads, units, layers), factored, and quantised. What has to find its way again is trained for some
steps, and "trained on" is the same without compression. Arms:

- 50, 80 and 90 % of the blocks' weights, gradually; 2 of every 4 weights, at once;
- a third of all heads, by their importance, and of all units besides; every second layer;
- blocks' kernels in factors;
- blocks' kernels and the table of words in 8 bits, in 4, and in 4 after training for them.

``MB`` is a file of what the model keeps (`fmjax.methods.compressed_files`), ``zipped MB`` the same
after zlib: zeros take room only in the first. ``texts/s`` is a batch's forward pass on this machine
and ``faster`` the ratio to the model before, timed turn by turn. The picture is frontier.png.

Two seeds (``--seeds 2``), some 20 minutes each on a busy CPU core, 1,076 test texts (a standard
error of 0.012):

    arm                  accuracy      MB    zipped MB  faster
    before               0.820, 0.820  90.9  83.8       1.00
    trained on           0.809, 0.818  90.9  83.8       1.00
    50 % of weights      0.796, 0.812  90.9  68.3       1.00
    80 %                 0.698, 0.680  90.9  55.8       1.00
    90 %                 0.516, 0.553  90.9  50.6       0.99
    2 of 4 weights       0.761, 0.790  90.9  68.9       1.08
    heads                0.812, 0.823  86.1  79.4       1.18
    heads and units      0.813, 0.816  76.7  70.6       1.46
    half the layers      0.741, 0.748  69.6  64.0       2.01
    low rank             0.746, 0.763  64.3  59.1       2.23
    8 bits               0.820, 0.820  24.1  22.0       0.95
    4 bits               0.813, 0.813  14.1  12.4       0.98
    4 bits, trained for  0.808, 0.811  14.1  12.3       0.95

Both seeds begin with one fine-tuned model: what is not trained again is the same in both. That the
model before was 0.98 and 1.02 times as fast as itself says how far to trust the last column.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comparison
import jax
import numpy as np
import optax
import tyro

import fmjax
from fmjax.data import encode
from fmjax.data.batches import batches
from fmjax.methods import compressed_files
from fmjax.methods.low_rank import factorise
from fmjax.methods.pruning import apply_masks, cubic, gradually, masked, n_of_m_masks
from fmjax.methods.quantization import quantization_aware, quantize
from fmjax.methods.shallower import student_of
from fmjax.methods.structured_pruning import (
    head_importance,
    least_important,
    remove_heads,
    remove_units,
    unit_importance,
)
from fmjax.perf.timing import time_alternately
from fmjax.recipes.texts import TextData, evaluation_batches, labels_of, load_splits, model_source
from fmjax.recipes.training import weights_of
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.apply import once
from fmjax.train import adamw, fit, gradient, init_state, jit_step, make_train_step, warmup_linear
from fmjax.tree import count_parameters
from fmjax.types import LossFn, Variables

BLOCKS = ("params/layers_*/kernel",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(comparison.Settings, TextData):
    """Compress a text classifier."""

    model: str = "minilm"
    """What is fine-tuned: a folder, a hub id, or "minilm"."""
    seeds: int = 1
    """Runs of each arm; the model they start from is the same."""
    max_length: int = 32
    """Tokens a text is cut and padded to."""
    batch_size: int = 32
    """Examples a step, and in the timed pass."""
    base_steps: int = 150
    """Steps of the model that is then compressed."""
    steps: int = 30
    """Steps of each arm that trains."""
    learning_rate: float = 1e-4
    """Peak of the schedule, which warms up over a tenth of the steps and then falls linearly."""
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9)
    """Shares of weights that are pruned."""
    removed: float = 1 / 3
    """Share of heads, and of units, that are removed."""
    measured_texts: int = 256
    """Training texts that heads and units are measured on."""
    rank: int = 96
    """Of the factors."""
    group: int = 64
    """Weights that share a scale in 4 bits."""
    repeats: int = 10
    """Timed passes."""


class Bench:
    """The data, the model before, and how any other is trained and measured on them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        source = model_source(settings.model)
        self.tokenizer = fmjax.load_tokenizer(source)
        self.examples = load_splits(settings)
        self.held = self.examples.get("test", self.examples["val"])
        self.buckets = [settings.max_length]
        folder = settings.output / "before"
        if not (folder / "config.json").exists():
            model, variables = fmjax.load(
                source, head="sequence_classification", new=("head/",),
                num_labels=self.examples["train"].label_names,
            )  # fmt: skip
            made = self.trained(model, variables, seed=0, steps=settings.base_steps)
            fmjax.save(folder, model, made)
        self.model, self.variables = fmjax.load(folder)

    def encoded(self, examples: Any, model: Any) -> Any:
        """Token ids of texts."""
        return encode(
            self.tokenizer, examples, max_length=self.settings.max_length,
            vocab_size=model.config.vocab_size,
        )  # fmt: skip

    def trained(
        self, model: Any, variables: Variables, *, seed: int, steps: int,
        loss: LossFn | None = None,
        through: Callable[[optax.GradientTransformation], Any] = lambda tx: tx,
    ) -> Variables:  # fmt: skip
        """The variables after so many steps on all texts."""
        settings = self.settings
        stream = batches(
            self.encoded(self.examples["train"], model), batch_size=settings.batch_size,
            pad_id=self.tokenizer.pad_token_id, seed=seed, buckets=self.buckets,
        )  # fmt: skip
        rate = warmup_linear(settings.learning_rate, steps=steps, warmup=steps // 10)
        tx = through(adamw(rate))
        step = jit_step(make_train_step(gradient(loss or task.loss(model)), tx))
        copies = jax.tree.map(np.asarray, variables)  # the state is donated
        state = fit(init_state(copies, tx, jax.random.key(seed)), step, stream, steps=steps)
        stream.close()
        return weights_of(state)

    def measured(self, model: Any, variables: Variables) -> dict[str, float]:
        """Accuracy on texts held out, sizes, and the time of a forward pass."""
        pad, size = self.tokenizer.pad_token_id, self.settings.batch_size
        encoded = self.encoded(self.held, model)
        held = evaluation_batches(encoded, pad, buckets=self.buckets, batch_size=size)
        found = task.evaluate(model, variables, held, labels_of(self.held))
        file = compressed_files.write(self.settings.output / "arm.safetensors", variables)
        content = file.read_bytes()
        file.unlink()
        tokens = np.ones((size, self.settings.max_length), np.int32)
        batch = {"input_ids": tokens, "attention_mask": tokens}

        def forward(model: Any, variables: Variables) -> Callable[[], Any]:
            predict = jax.jit(once(task.predict, model))  # the function that was compiled above
            return lambda: jax.block_until_ready(predict(variables, batch))

        times = time_alternately(
            {"before": forward(self.model, self.variables), "arm": forward(model, variables)},
            repeats=self.settings.repeats,
        )
        return {
            "accuracy": found.metrics["accuracy"],
            "MB": len(content) / 1e6,
            "zipped MB": len(zlib.compress(content, 1)) / 1e6,
            "M parameters": count_parameters(variables) / 1e6,
            "texts/s": size / times["arm"].min,
            "faster": times["before"].min / times["arm"].min,
        }


def arms(settings: Settings) -> Mapping[str, comparison.Arm]:
    """The model before, and every way to make it smaller."""
    bench = Bench(settings)
    model, before = bench.model, bench.variables
    train = functools.partial(bench.trained, steps=settings.steps)

    def pruned(share: float) -> comparison.Arm:
        # Half of the steps prune, half recover.
        last = max(1, settings.steps // 2)
        schedule = cubic(share, steps=last)

        def through(tx: optax.GradientTransformation) -> Any:
            return gradually(tx, schedule, every=max(1, last // 10), targets=BLOCKS)

        return lambda seed: bench.measured(model, train(model, before, seed=seed, through=through))

    def two_of_four(seed: int) -> dict[str, float]:
        masks = n_of_m_masks(before, targets=BLOCKS)
        start = apply_masks(before, masks)
        made = train(model, start, seed=seed, through=lambda tx: masked(tx, masks))
        return bench.measured(model, made)

    @functools.cache
    def importance() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Of heads and units, on training texts."""
        texts = comparison.drawn(bench.examples["train"], settings.measured_texts, 0)
        shown = [
            {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "weight")}
            for batch in evaluation_batches(
                bench.encoded(texts, model), bench.tokenizer.pad_token_id,
                buckets=bench.buckets, batch_size=settings.batch_size,
            )
        ]  # fmt: skip
        loss = task.loss(model, train=False)
        heads = head_importance(model, loss, before, shown)
        return heads, unit_importance(loss, before, shown)

    def removed(seed: int, *, with_units: bool) -> dict[str, float]:
        heads, units = importance()
        total = sum(values.size for values in heads.values())
        fewest = least_important(heads, int(settings.removed * total), scope="global")
        small, made = remove_heads(model, before, fewest)
        if with_units:
            each = int(settings.removed * next(iter(units.values())).size)
            small, made = remove_units(small, made, least_important(units, each))
        return bench.measured(small, train(small, made, seed=seed))

    def half_the_layers(seed: int) -> dict[str, float]:
        layers = range(0, model.config.num_hidden_layers, 2)
        small, made = student_of(model, before, layers)
        return bench.measured(small, train(small, made, seed=seed))

    def factored(seed: int) -> dict[str, float]:
        thin = factorise(before, targets=("layers_*",), rank=settings.rank)
        return bench.measured(model, train(model, thin, seed=seed))

    tables: dict[str, Any] = {"targets": (*BLOCKS, "params/embed/word/embedding")}
    four: dict[str, Any] = {"bits": 4, "group": settings.group, **tables}

    def for_four_bits(seed: int) -> dict[str, float]:
        loss = quantization_aware(task.loss(model), **four)
        made = train(model, before, seed=seed, loss=loss)
        return bench.measured(model, quantize(made, **four))

    return {
        "before": lambda seed: bench.measured(model, before),
        "trained on": lambda seed: bench.measured(model, train(model, before, seed=seed)),
        **{f"{share:.0%} of weights": pruned(share) for share in settings.sparsities},
        "2 of 4 weights": two_of_four,
        "heads": functools.partial(removed, with_units=False),
        "heads and units": functools.partial(removed, with_units=True),
        "half the layers": half_the_layers,
        "low rank": factored,
        "8 bits": lambda seed: bench.measured(model, quantize(before, bits=8, **tables)),
        "4 bits": lambda seed: bench.measured(model, quantize(before, **four)),
        "4 bits, trained for": for_four_bits,
    }


def draw_frontier(results: Mapping[str, Any], folder: Path) -> Path:
    """Accuracy against the zipped file and against speed, as frontier.png: means over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for number, key in enumerate(("zipped MB", "faster")):
        axes = figure.add_subplot(1, 2, number + 1)
        for name, accuracies in comparison.column(results, "accuracy").items():
            place = np.mean(comparison.column(results, key)[name]), np.mean(accuracies)
            axes.scatter(*place, s=24)
            axes.annotate(name, place, fontsize=7, xytext=(4, 3), textcoords="offset points")
        axes.set_xlabel(key)
        axes.set_ylabel("accuracy")
        axes.grid(alpha=0.3)
    path = folder / "frontier.png"
    figure.savefig(path, dpi=110)
    return path


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs what is missing, prints the table, draws the picture and returns the results."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    results = comparison.compare(settings, arms(settings))
    print(comparison.table(results))
    draw_frontier(results, settings.output)
    return results


if __name__ == "__main__":
    main()
