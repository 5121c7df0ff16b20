"""Captions of pictures: training a model that writes them, and writing with a saved one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmjax.hub as hub
from fmjax.data.batches import batches, shared_buckets
from fmjax.data.columns import Columns
from fmjax.data.encoding import encode_targets
from fmjax.data.image_processor import ImageProcessor, load_image_processor
from fmjax.data.image_text import ImageTexts
from fmjax.generate import generate
from fmjax.metrics.captioning import captioning_metrics
from fmjax.recipes.generation import Generator, load_generator, written_with
from fmjax.recipes.image_classification import data_url
from fmjax.recipes.pictures import check_channels
from fmjax.recipes.texts import evaluation_batches
from fmjax.recipes.training import STOPPED, Training, finish, train, weights_of
from fmjax.report import save_samples
from fmjax.tasks import seq2seq as task
from fmjax.tasks.apply import collect
from fmjax.tasks.pixels import normalised
from fmjax.train import is_param
from fmjax.types import Batch, TrainState, Variables

SHOWN = 30  # captions in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionTraining(Training):
    """How a model that writes captions is trained and writes."""

    max_target_length: int = 24
    """Tokens a caption is cut to, and that are written."""
    label_smoothing: float = 0.1
    """Share of probability spread over the vocabulary."""
    num_beams: int = 4
    """Hypotheses of the beam search that writes."""
    frozen: bool = True
    """The picture encoder stays as it is, and each picture passes it once."""
    evaluations: float = 1.0
    """Evaluations an epoch; each may set the best checkpoint."""


def train_on_captions(
    settings: CaptionTraining,
    model: Any,
    variables: Variables,
    tokenizer: Any,
    examples: Mapping[str, ImageTexts],
    processor: ImageProcessor,
    *,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Trains (or goes on), writes captions for the held-out splits and measures them beside those
    of each picture's nearest neighbour among the training pictures.

    The run's folder gets what `fmjax.recipes.training.train` leaves, samples.json with the
    pictures, results.json, report.html and export/, for `fmjax caption`.

    Args:
        settings: how to train and write.
        model: a vision encoder-decoder with the head "seq2seq_lm".
        variables: its variables; the run takes them over.
        tokenizer: of the captions.
        examples: "train", "val" and, where there are any, "test".
        processor: which makes such pictures of files.
        about: for run.json: ``source`` and ``data``'s ``source``.

    Returns:
        The contents of results.json; STOPPED where a signal ended the run early.

    Raises:
        ValueError: the model's config has no decoder_start_token_id, and all that `train` refuses.
    """
    config = written_with(
        model,
        max_new_tokens=settings.max_target_length,
        num_beams=settings.num_beams,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    mean, std = processor.normalisation
    encode = jax.jit(normalised(_encoded(model), mean, std))
    seen = {
        split: _states(encode, variables, part.images, settings.batch_size)
        for split, part in examples.items()
    }
    columns = {
        split: Columns(
            (
                encode_targets(
                    tokenizer,
                    part.texts,
                    max_length=settings.max_target_length,
                    vocab_size=model.config.vocab_size,
                ),
            ),
            {"encoder_outputs": seen[split]} if settings.frozen else {"pixel_values": part.images},
        )
        for split, part in examples.items()
    }
    shapes = shared_buckets(*columns.values())
    smoothed = task.loss(model, label_smoothing=settings.label_smoothing)
    judged = task.loss(model, train=False)
    if not settings.frozen:
        smoothed, judged = (normalised(loss, mean, std) for loss in (smoothed, judged))

    def evaluate(state: TrainState, split: str = "val") -> dict[str, float]:
        once = evaluation_batches(columns[split], buckets=shapes, batch_size=settings.batch_size)
        return task.scores_of(judged, weights_of(state), once)

    state = train(
        settings,
        model,
        variables,
        smoothed,
        batches(
            columns["train"], batch_size=settings.batch_size, seed=settings.seed, buckets=shapes
        ),
        evaluate=evaluate,
        # What is written is what counts: probabilities get worse long before words do.
        metric="accuracy",
        mode="max",
        about={
            "source": about["source"],
            "data": {
                "source": about["data"],
                "splits": {split: len(part) for split, part in examples.items()},
            },
        },
        is_trainable=is_decoder if settings.frozen else is_param,
    )
    if state is None:
        return STOPPED
    weights = weights_of(state)
    writer = Generator(model, weights, tokenizer, config)
    results: dict[str, Any] = {"best_step": int(state.step)}
    neighbour: dict[str, Any] = {}
    for split in [split for split in ("val", "test") if split in examples]:
        part = examples[split]
        states = seen[split]
        if not settings.frozen:
            states = _states(encode, weights, part.images, settings.batch_size)
        written = write_captions(writer, states, batch_size=settings.batch_size)
        nearest = nearest_texts(seen["train"], examples["train"].texts, seen[split])
        references = list(part.texts)
        results[split] = {**captioning_metrics(written, references), **evaluate(state, split)}
        neighbour[split] = captioning_metrics(nearest, references)
        pictures = [data_url(image) for image in part.images[:SHOWN]]
        rows = zip(pictures, references, written, nearest, strict=False)
        names = ("picture", "reference", "written", "nearest neighbour's")
        save_samples(settings.output, names, list(rows))
    results["baselines"] = {"nearest neighbour": neighbour}
    folder = finish(settings.output, results, model, weights, tokenizer)
    config.write(folder)
    processor.save_pretrained(folder)
    return results


def is_decoder(path: str) -> bool:
    """Whether a leaf is a parameter outside the picture encoder."""
    return is_param(path) and not path.startswith("params/encoder/")


def _encoded(model: Any) -> Any:
    """``(variables, batch) -> [B, S, D]``: the encoder's states of ``pixel_values``."""

    def encode(variables: Variables, batch: Batch) -> jax.Array:
        return model.apply(variables, batch["pixel_values"], method="encode").last_hidden_state

    return encode


def _states(encode: Any, variables: Variables, images: np.ndarray, batch_size: int) -> np.ndarray:
    """The encoder's states of N pictures, float32 [N, S, D]."""
    once = evaluation_batches(
        Columns((), {"pixel_values": images}), batch_size=min(batch_size, len(images))
    )
    return collect(encode, variables, once, size=len(images))


def nearest_texts(train: np.ndarray, texts: Sequence[str], queries: np.ndarray) -> list[str]:
    """The text of the training picture whose mean state is most alike by its cosine.

    Args:
        train: [N, S, D], states of the training pictures.
        texts: N of them.
        queries: [M, S, D].
    """

    def unit(states: np.ndarray) -> np.ndarray:
        vectors = states.mean(axis=1)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    return [texts[int(i)] for i in (unit(queries) @ unit(train).T).argmax(axis=1)]


def write_captions(
    generator: Generator,
    states: np.ndarray,
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 32,
) -> list[str]:
    """A caption of each picture.

    Args:
        generator: whose model is a vision encoder-decoder.
        states: [N, S, D] of its encoder.
        seed: of draws.
        options: fields of `GenerationConfig` in place of its authors' values.
        batch_size: pictures at a time.
    """
    config = generator.config.replace(**(options or {}))
    written = []
    size = min(batch_size, len(states))
    for start in range(0, len(states), size):
        part = states[start : start + size]
        # A short last batch is filled up, so that it compiles nothing of its own.
        filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        rng = jax.random.fold_in(jax.random.key(seed), start) if config.do_sample else None
        out = generate(
            generator.model,
            generator.variables,
            encoder_outputs=jnp.asarray(filled),
            generation_config=config,
            tokenizer=generator.tokenizer,
            rng=rng,
        )
        tokens = out.tokens[:: config.num_return_sequences][: len(part)]
        lengths = out.lengths[:: config.num_return_sequences][: len(part)]
        for row, length in zip(tokens, lengths, strict=True):
            text = str(generator.tokenizer.decode(row[:length], skip_special_tokens=True))
            written.append(text.strip())
    return written


def caption_images(
    model: str,
    images: Sequence[str | Path],
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
) -> list[str]:
    """Captions of pictures by a saved vision encoder-decoder.

    Args:
        model: a folder or hub id, with its tokenizer and preprocessor_config.json.
        images: N files.
        seed, options: see `write_captions`.
        batch_size: pictures that are computed at once.

    Raises:
        OSError: no such model.
        ValueError: files that are no pictures, all of them named, or a model of another kind.
    """
    folder = hub.find_folder(model)
    processor = load_image_processor(folder)
    batch = processor.batch(images)
    generator = load_generator(folder)
    kind = hub.family_for(generator.model).MODEL_TYPE
    if kind != "vision-encoder-decoder":
        raise ValueError(f"{model} is of model_type {kind!r}, which writes nothing of pictures")
    check_channels(processor, generator.model.config)
    encode = jax.jit(normalised(_encoded(generator.model), *processor.normalisation))
    states = _states(encode, generator.variables, batch["pixel_values"], batch_size)
    return write_captions(generator, states, seed=seed, options=options, batch_size=batch_size)
