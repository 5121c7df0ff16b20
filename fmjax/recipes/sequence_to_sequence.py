"""Training an encoder-decoder on pairs of texts, and writing and measuring its answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fmjax.data import encode_seq2seq
from fmjax.data.batches import batches, shared_buckets
from fmjax.data.records import TextPairs
from fmjax.recipes.generation import Generator, write_texts, written_with
from fmjax.recipes.texts import evaluation_batches
from fmjax.recipes.training import STOPPED, Training, finish, train, weights_of
from fmjax.report import save_samples
from fmjax.tasks import seq2seq as task
from fmjax.types import TrainState, Variables

Measure = Callable[[Sequence[str], Sequence[str]], Mapping[str, float]]
"""(written texts, references) -> scores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTraining(Training):
    """How an encoder-decoder is trained and writes."""

    max_length: int = 128
    """Tokens a source is cut to."""
    max_target_length: int = 64
    """Tokens a target is cut to, and that are written."""
    label_smoothing: float = 0.1
    """Share of probability spread over the vocabulary."""
    num_beams: int = 4
    """Hypotheses of the beam search that writes."""
    evaluations: float = 1.0
    """Evaluations an epoch; each may set the best checkpoint."""


def train_on_pairs(
    settings: PairTraining,
    model: Any,
    variables: Variables,
    tokenizer: Any,
    pairs: Mapping[str, TextPairs],
    *,
    measure: Measure,
    baselines: Mapping[str, Callable[[str], str]],
    about: Mapping[str, Any],
    prefix: str = "",
) -> dict[str, Any]:
    """Trains (or goes on), writes the texts of the held-out splits and measures them.

    The run's folder gets what `fmjax.recipes.training.train` leaves, samples.json, results.json,
    report.html and export/.

    Args:
        settings: how to train and write.
        model: with the head "seq2seq_lm".
        variables: its variables; the run takes them over.
        tokenizer: the model's.
        pairs: "train", "val" and, where there are any, "test".
        measure: scores of written texts.
        baselines: by name, what else could be written: a function of the source.
        about: for run.json: ``source`` and ``data``'s ``source``.
        prefix: put before each source.

    Returns:
        The contents of results.json; STOPPED where a signal ended the run early.

    Raises:
        ValueError: the model's config has no decoder_start_token_id, and all that `train` refuses.
    """
    encoder, decoder = (
        getattr(model.config, side, model.config) for side in ("encoder", "decoder")
    )
    # BERT's config has no such token, and its tokenizer ends with [SEP].
    said = getattr(decoder, "eos_token_id", None)
    ends = (said, tokenizer.eos_token_id, tokenizer.sep_token_id)
    config = written_with(
        model,
        max_new_tokens=settings.max_target_length,
        num_beams=settings.num_beams,
        eos_token_id=next((end for end in ends if end is not None), None),
        pad_token_id=model.config.pad_token_id,
    )
    columns = {
        split: encode_seq2seq(
            tokenizer,
            part.sources,
            part.targets,
            max_length=settings.max_length,
            max_target_length=settings.max_target_length,
            vocab_size=min(encoder.vocab_size, decoder.vocab_size),
            prefix=prefix,
        )
        for split, part in pairs.items()
    }
    shapes = shared_buckets(*columns.values())

    def evaluate(state: TrainState, split: str = "val") -> dict[str, float]:
        once = evaluation_batches(columns[split], buckets=shapes, batch_size=settings.batch_size)
        return task.evaluate(model, weights_of(state), once)

    state = train(
        settings,
        model,
        variables,
        task.loss(model, label_smoothing=settings.label_smoothing),
        batches(
            columns["train"], batch_size=settings.batch_size, seed=settings.seed, buckets=shapes
        ),
        evaluate=evaluate,
        metric="nll",
        mode="min",
        about={
            "source": about["source"],
            "data": {
                "source": about["data"],
                "splits": {split: len(part) for split, part in pairs.items()},
            },
        },
    )
    if state is None:
        return STOPPED
    writer = Generator(model, weights_of(state), tokenizer, config)
    results: dict[str, Any] = {"best_step": int(state.step)}
    rivals: dict[str, dict[str, Any]] = {name: {} for name in baselines}
    for split in [split for split in ("val", "test") if split in pairs]:
        sources, references = list(pairs[split].sources), list(pairs[split].targets)
        written = write_texts(
            writer,
            [prefix + source for source in sources],
            batch_size=settings.batch_size,
            max_length=settings.max_length,
        )
        first = [several[0].strip() for several in written]
        results[split] = {**measure(first, references), **evaluate(state, split)}
        for name, rival in baselines.items():
            rivals[name][split] = dict(measure([rival(s) for s in sources], references))
        rows = list(zip(sources[:30], references[:30], first[:30], strict=True))
        save_samples(settings.output, ("source", "reference", "written"), rows)
    results["baselines"] = rivals
    config.write(finish(settings.output, results, model, weights_of(state), tokenizer))
    return results
