"""Sentiment of one domain for another, of which there are texts without labels.

    python experiments/domain_shift.py --output runs/shift

MiniLM learns from rated movie sentences and is measured on sentences of product reviews (or on
tweets: ``--target sentiment/tweets``), whose training sentences are there without their labels:

- source: movie sentences alone;
- DANN: features whose domain a classifier cannot tell (Ganin et al. 2016);
- CORAL: logits with the same covariance in both domains (Sun & Saenko 2016);
- self-training: trained anew with its own confident labels of the target (Lee 2013);
- FixMatch: what it says of a text that lost a few tokens holds for the masked text too (Sohn et al.
  2020);
- continued pretraining: masked language modelling of the target first (Gururangan et al. 2020,
  arXiv:2004.10964);
- target: with the target's labels, which no other arm sees: what could be reached.

Every arm takes as many steps on as many labelled texts. Measured on all 663 held-out texts of the
target, from which nothing is chosen, by `--precision bfloat16`; accuracy, mean and deviation of 3
seeds, 4 minutes of CPU: 0.765 ± 0.02 source, 0.774 ± 0.02 DANN, 0.776 ± 0.03 CORAL, 0.775 ± 0.02
self-training (46 % of the texts pseudo-labelled), 0.778 ± 0.02 FixMatch, 0.572 ± 0.11 continued
pretraining, 0.804 ± 0.01 target. So the gains are of the size of their scatter, a third of what the
labels would bring; and MiniLM, which was trained to embed sentences and has no weights for masked
words, forgets more in the continued pretraining than it learns. FixMatch reads three times as many
texts a step as the source alone, DANN and CORAL twice as many.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import comparison
import jax
import numpy as np
import optax
import tyro

import fmjax
from fmjax.data import BatchStream, EncodedText, TextExamples, encode
from fmjax.data.batches import batches
from fmjax.data.mixture import Mixture, Stream
from fmjax.methods.domain_adaptation import (
    DOMAIN,
    annealed,
    coral,
    dann,
    is_adapted,
    model_only,
    with_domain_classifier,
)
from fmjax.methods.partly_labelled import (
    LABELLED,
    LOGITS,
    UNLABELLED,
    counting,
    pooled,
    with_progress,
)
from fmjax.methods.self_training import fix_match, self_train
from fmjax.recipes.texts import TextData, evaluation_batches, labels_of, load_splits, model_source
from fmjax.recipes.training import computed, weights_of
from fmjax.tasks import masked_lm
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.apply import collect, once
from fmjax.tasks.masking import Masking
from fmjax.tasks.text_views import dropped_view, masked_view
from fmjax.train import (
    adamw,
    fit,
    gradient,
    init_state,
    is_param,
    jit_step,
    make_train_step,
    warmup_linear,
)
from fmjax.tree import flatten, map_with_path, override, split, unflatten
from fmjax.types import GradFn, LossFn, Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(comparison.Settings, TextData):
    """Adapt a text classifier to another domain."""

    target: str = "sentiment/amazon"
    """Texts of the target: a named set, or a file with a header like the source's."""
    target_val: str | None = None
    """Texts to measure on, when target is a file."""
    model: str = "minilm"
    """What is trained: a folder, a hub id, or "minilm"."""
    max_length: int = 28
    """Tokens a text is cut to; the one shape of all batches."""
    batch_size: int = 16
    """Labelled texts a step, and unlabelled ones beside them."""
    source_texts: int = 2000
    """Labelled texts, drawn by the seed; as many of the target's for its own arm."""
    target_texts: int = 1000
    """Unlabelled texts, drawn by the seed."""
    steps: int = 50
    """Steps of each training."""
    pretraining_steps: int = 40
    """Steps of continued pretraining."""
    learning_rate: float = 3e-4
    """Peak of a schedule that warms up over a tenth of the steps and then falls linearly to 0."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the computation in training; the weights stay float32."""
    frozen_layers: int = 3
    """Layers, from the first on and with the embeddings, that stay as they are; not so in continued
    pretraining."""
    reversal: float = 0.02
    """What the strength of DANN's reversed gradient rises to; 1 in the paper. By Adam, which makes
    steps of one size of any gradient, features lost the task at 1 and at 0.1 (both with a domain
    classifier whose last layer began at random)."""
    faster: float = 10.0
    """The domain classifier's learning rate, as a multiple; the paper has 10 for new layers
    beside trained ones, too."""
    coral: float = 1.0
    """Weight of CORAL's distance."""
    rounds: int = 1
    """How often self-training labels the target."""
    threshold: float = 0.8
    """The least probability of a label in self-training."""
    tau: float = 0.8
    """The same in FixMatch; 0.95 in the paper, which few texts reach after so short a run."""
    ratio: int = 1
    """Unlabelled texts for each labelled one in FixMatch; 7 in the paper."""
    dropped: float = 0.1
    """Share of tokens that are left out of FixMatch's weakly changed texts."""
    masked: float = 0.3
    """Share of tokens that are masked in its strongly changed texts."""


def _of_domains(tree: Any) -> Any:
    """Which leaves are the domain classifier's."""
    return map_with_path(lambda path, _: path.startswith(f"{DOMAIN}/"), tree)


class Bench:
    """Both domains' texts, the model, and how it is trained and measured."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.source = load_splits(settings)["train"]
        target = {"data": settings.target, "val": settings.target_val}
        columns = {name: getattr(settings, name) for name in ("text", "text_pair", "label")}
        self.target = load_splits(TextData(**target, **columns))
        names = self.source.label_names
        if any(texts.label_names != names for texts in self.target.values()):
            raise ValueError(
                f"the source's classes are {names}, the target's "
                f"{self.target['train'].label_names}; they must be the same"
            )
        self.folder = model_source(settings.model)
        self.tokenizer = fmjax.load_tokenizer(self.folder)
        self.model, self.variables = fmjax.load(
            self.folder, head="sequence_classification", num_labels=names, new=("head/",),
            rng=jax.random.key(0),
        )  # fmt: skip
        self.held_out = {split: texts for split, texts in self.target.items() if split != "train"}
        self.predict = jax.jit(once(task.predict, self.model))

    def encoded(self, texts: TextExamples, *, labels: bool = True) -> EncodedText:
        found = encode(
            self.tokenizer, texts, max_length=self.settings.max_length,
            vocab_size=self.model.config.vocab_size,
        )  # fmt: skip
        return found if labels else dataclasses.replace(found, labels=None)

    def stream(self, encoded: EncodedText, seed: int, times: int = 1) -> BatchStream:
        return batches(
            encoded, batch_size=times * self.settings.batch_size, seed=seed,
            pad_id=self.tokenizer.pad_token_id, buckets=[self.settings.max_length],
        )  # fmt: skip

    def labelled(self, seed: int) -> TextExamples:
        return comparison.drawn(self.source, self.settings.source_texts, seed)

    def unlabelled(self, seed: int) -> TextExamples:
        return comparison.drawn(self.target["train"], self.settings.target_texts, seed)

    def mixture(self, seed: int, ratio: int = 1) -> Mixture:
        """Labelled texts of the source, and texts of the target."""
        return Mixture(
            {
                LABELLED: self.stream(self.encoded(self.labelled(seed)), seed),
                UNLABELLED: self.stream(
                    self.encoded(self.unlabelled(seed), labels=False), seed, ratio
                ),
            }
        )

    def is_trainable(self, path: str) -> bool:
        frozen = [f"params/layers_{number}/" for number in range(self.settings.frozen_layers)]
        return is_adapted(path) and not (frozen and path.startswith(("params/embed/", *frozen)))

    def trainer(
        self,
        loss: LossFn,
        steps: int,
        *,
        differentiate: Callable[[LossFn], GradFn] = gradient,
        is_trainable: Callable[[str], bool] | None = None,
    ) -> Callable[[Variables, Stream, int], Variables]:
        """``(variables, stream, seed) -> variables``, compiled once for all seeds."""
        settings = self.settings
        trains = self.is_trainable if is_trainable is None else is_trainable
        loss = computed(loss, settings.precision)
        schedule = warmup_linear(settings.learning_rate, steps=steps, warmup=steps // 10)
        # The encoder is trained already: a domain classifier that begins beside it must keep up.
        faster = optax.masked(optax.scale(settings.faster), _of_domains)
        tx = optax.chain(adamw(schedule), faster)
        step = jit_step(make_train_step(differentiate(loss), tx))

        def train(variables: Variables, stream: Stream, seed: int) -> Variables:
            copies = jax.tree.map(np.asarray, variables)  # the state is donated
            state = init_state(copies, tx, jax.random.key(seed), trains)
            state = fit(state, step, stream, steps=steps)
            stream.close()
            return weights_of(state)

        return train

    def probabilities(self, variables: Variables, texts: TextExamples) -> np.ndarray:
        once_each = evaluation_batches(
            self.encoded(texts), self.tokenizer.pad_token_id, buckets=[self.settings.max_length]
        )
        return collect(self.predict, variables, once_each, size=len(texts))

    def measured(self, variables: Variables) -> dict[str, float]:
        """Accuracy on all held-out texts of the target."""
        right = [
            self.probabilities(variables, texts).argmax(axis=1) == labels_of(texts)
            for texts in self.held_out.values()
        ]
        return {"target accuracy": float(np.concatenate(right).mean())}


def arms(settings: Settings) -> Mapping[str, comparison.Arm]:
    """What is learnt from the target: nothing, its texts, its labels."""
    bench = Bench(settings)
    model, tokenizer = bench.model, bench.tokenizer
    plain = bench.trainer(task.loss(model), settings.steps)

    def on(texts: TextExamples, seed: int, variables: Variables | None = None) -> Variables:
        start = bench.variables if variables is None else variables
        return plain(start, bench.stream(bench.encoded(texts), seed), seed)

    @functools.lru_cache(maxsize=1)
    def of_source(seed: int) -> Variables:
        return on(bench.labelled(seed), seed)

    rising = annealed(settings.steps)
    adversarial = bench.trainer(
        dann(
            task.loss,
            model,
            strength=lambda step: settings.reversal * rising(step),
            features=pooled("cls"),
        ),
        settings.steps,
        differentiate=lambda loss: counting(gradient(loss)),
    )

    def run_dann(seed: int) -> dict[str, float]:
        start = with_domain_classifier(
            bench.variables, jax.random.key(seed), width=model.config.hidden_size
        )
        made = adversarial(with_progress(start), bench.mixture(seed), seed)
        return bench.measured(model_only(made))

    correlated = bench.trainer(
        coral(task.loss, model, strength=settings.coral, features=LOGITS), settings.steps
    )

    def run_coral(seed: int) -> dict[str, float]:
        return bench.measured(correlated(bench.variables, bench.mixture(seed), seed))

    def run_self_training(seed: int) -> dict[str, float]:
        texts, rest = bench.labelled(seed), bench.unlabelled(seed)

        def train(chosen: np.ndarray, labels: np.ndarray) -> Variables:
            if not len(chosen):
                return of_source(seed)
            pseudo = rest.select(chosen)
            pairs = texts.text_pairs, pseudo.text_pairs
            every = TextExamples(
                texts=[*texts.texts, *pseudo.texts],
                labels=np.concatenate([labels_of(texts), labels]).astype(np.int32),
                label_names=texts.label_names,
                text_pairs=None if pairs[0] is None else [*pairs[0], *(pairs[1] or ())],
            )
            return on(every, seed)

        done = self_train(
            train, lambda variables: bench.probabilities(variables, rest),
            rounds=settings.rounds, threshold=settings.threshold,
        )  # fmt: skip
        share = len(done[-1].chosen) / len(rest)
        return {**bench.measured(done[-1].variables), "pseudo-labelled": share}

    masking = Masking.of(tokenizer, probability=settings.masked, mask_share=1.0, random_share=0.0)
    matched = bench.trainer(
        fix_match(
            task.loss, model, threshold=settings.tau, strong=masked_view(masking),
            weak=dropped_view(
                settings.dropped, pad_id=tokenizer.pad_token_id,
                special_ids=masking.special_ids,
            ),
        ),
        settings.steps,
    )  # fmt: skip

    def run_fix_match(seed: int) -> dict[str, float]:
        stream = bench.mixture(seed, settings.ratio)
        return bench.measured(matched(bench.variables, stream, seed))

    @functools.cache
    def language_model() -> tuple[Variables, Callable[[Variables, Stream, int], Variables]]:
        made, variables = fmjax.load(
            bench.folder, head="masked_lm", new=("head/",), rng=jax.random.key(0)
        )
        loss = masked_lm.loss(made, masking=Masking.of(tokenizer))
        return variables, bench.trainer(loss, settings.pretraining_steps, is_trainable=is_param)

    def run_pretraining(seed: int) -> dict[str, float]:
        start, train = language_model()
        texts = bench.encoded(bench.unlabelled(seed), labels=False)
        trunk = flatten(train(start, bench.stream(texts, seed), seed))
        shared = split(
            bench.variables, lambda path: path in trunk and not path.startswith("params/head/")
        )[0]
        adapted = unflatten({path: trunk[path] for path in flatten(shared)})
        return bench.measured(on(bench.labelled(seed), seed, override(bench.variables, adapted)))

    def run_target(seed: int) -> dict[str, float]:
        texts = comparison.drawn(bench.target["train"], settings.source_texts, seed)
        return bench.measured(on(texts, seed))

    return {
        "source": lambda seed: bench.measured(of_source(seed)),
        "DANN": run_dann,
        "CORAL": run_coral,
        "self-training": run_self_training,
        "FixMatch": run_fix_match,
        "continued pretraining": run_pretraining,
        "target": run_target,
    }


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    print(comparison.table(comparison.compare(settings, arms(settings))))


if __name__ == "__main__":
    main()
