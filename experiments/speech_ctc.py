"""Hears words: Deep Speech 2, or a wav2vec 2.0 encoder, trained from nothing by CTC.

    python experiments/speech_ctc.py --output runs/digits
    python experiments/speech_ctc.py --output runs/commands --data commands
    python experiments/speech_ctc.py --output runs/digits-wav2vec2 --model wav2vec2 \
        --optimizer muon --epochs 100

The sounds are sequences of one to five digits or commands: espeak-ng says two thirds of those of
training in 50 voices, flite the rest in four that are made of people's recordings; the 300 of test
are in 5 voices of espeak-ng that were not trained on. Beside them the model hears ten recordings of
a digit each, of a person it never heard, which differ from what is synthesised by what was measured
of both: they begin after 0.07 to 0.31 s of silence (0.03 s on average), their words take a third
more time, and above 1.2 kHz they have 4 to 11 dB less. So training sounds are slower, more of them
are single words, and at each step each is put behind another silence, into another room, over
another line and into another throat, with noise (`--no-augment` leaves that out).

Word error rates, symbol by symbol and by a search with 3-grams of the training texts ("searched"):
test digits 1.5 and 0.6 %, of the ten recordings one is misheard ("thre") and none, 7 minutes of
CPU; test commands, for `--epochs 30`, 0.8 and 0.5 %. Ten recordings say little: after 30 epochs two
and one of them are misheard, of the test digits 1.2 and 0.1 %. The wav2vec 2.0 encoder, which has
to find its own features of samples: test digits 2.1 and 0.7 %, one of the recordings misheard both
times, 41 minutes of CPU (after 24 epochs 73 % of the test digits). Deep Speech 2 without slower
sounds, flite and augmentation, on 20 voices of espeak-ng: 0.7 % of the test digits and 7 of the
recordings.

Any other sounds, in manifests (path and text):

    python experiments/speech_ctc.py --output runs/mine --data train.tsv --val dev.tsv \
        --test test.tsv

The folder `export` writes down any recording: `fmjax transcribe talk.wav --model
runs/digits/export`.

An interrupted run is continued by the same command. The folder gets checkpoints, metrics.jsonl,
TensorBoard events, report.html and the model as a folder.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array

import fmjax
from fmjax.data.audio_augment import SpecAugment, spec_augment
from fmjax.data.audio_rooms import Rooms, drawn, surround, through, with_noise, without_silence
from fmjax.data.audio_sets import AudioExamples, read_audio_manifest
from fmjax.data.batches import batches, shared_buckets
from fmjax.data.characters import Characters, characters_of
from fmjax.data.columns import Columns
from fmjax.data.mel_frames import MelFrames, mel_frames
from fmjax.data.waveform import EPSILON, WaveformProcessor
from fmjax.generate.ctc import greedy, prefix_beam
from fmjax.metrics.word_ngram import fit_word_ngram
from fmjax.models import deepspeech2, wav2vec2
from fmjax.recipes.ctc_transcription import Symbols
from fmjax.recipes.texts import evaluation_batches
from fmjax.recipes.training import (
    STOPPED,
    Schedule,
    Training,
    finish,
    plain_numbers,
    train,
    weights_of,
)
from fmjax.report import save_samples
from fmjax.tasks import ctc as task
from fmjax.types import Aux, Batch, LossFn, TrainState, Variables

RATE = 8_000  # of the recordings; what is synthesised is brought to it
MELS = 40
# 25 ms every 10 ms.
FRAMES = MelFrames(RATE, MELS, 200, 80, 256, low_frequency=60.0, dither=1e-3, peak=0.7)
SAMPLES = WaveformProcessor(RATE, return_attention_mask=True)
# About a tenth of the bins and of the time: sounds are of one to three seconds.
MASKS = SpecAugment(0, 6, 2, 12, 0.1, 2)
ROOMS = Rooms()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """Train a small model of speech."""

    model: Literal["deepspeech2", "wav2vec2"] = "deepspeech2"
    """Convolutions over log-mel frames and recurrent layers, or convolutions over samples and a
    transformer."""
    data: str = "digits"
    """"digits" or "commands", said by espeak-ng, or a manifest of sounds."""
    val: Path | None = None
    """Validation sounds, when data is a file."""
    test: Path | None = None
    """Test sounds, when data is a file."""
    train_sounds: int | None = None
    """Train on so many sounds only."""
    width: int = 128
    """Of recurrent layers, in each direction, or of the transformer."""
    layers: int = 2
    """Recurrent, or of the transformer."""
    augment: bool = True
    """Put each training sound into another room, at another distance, behind another silence and
    over another line each time; of Deep Speech 2, mask spans of frames and of bins, too."""
    epochs: float = 14.0
    """Passes over the training sounds."""
    batch_size: int = 32
    """Sounds a step."""
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    schedule: Schedule = "cosine"
    """See `Training`."""
    evaluations: float = 1.0
    """Evaluations an epoch; each may set the best checkpoint."""


def load(settings: Settings) -> dict[str, AudioExamples]:
    """The sounds of "train", "val" and, where there are any, "test" and "recorded"."""
    if settings.data in ("digits", "commands"):
        from fmjax.data.prompts import DIGITS, load_prompts
        from fmjax.data.spoken import load_spoken

        splits = ("train", "val", "test")
        sounds = {split: load_spoken(settings.data, split, rate=RATE) for split in splits}
        if settings.data == "digits":
            sounds["recorded"] = load_prompts("all", DIGITS, rate=RATE)
    else:
        if settings.val is None:
            raise ValueError(f"data={settings.data!r} is a file: give validation sounds, val=FILE")
        files = {"train": settings.data, "val": settings.val, "test": settings.test}
        sounds = {
            split: read_audio_manifest(path, rate=RATE)
            for split, path in files.items()
            if path is not None
        }
    if settings.train_sounds is not None:
        sounds["train"] = sounds["train"].select(range(settings.train_sounds))
    return sounds


def prepared(
    settings: Settings, split: str, sounds: AudioExamples, characters: Characters
) -> Columns:
    """The sounds as the model reads them, with their characters; of training, their samples."""
    if split == "train":
        cut = [without_silence(one, RATE) for one in sounds.samples]
        return dataclasses.replace(sounds, samples=cut).columns(encode=characters.encode)
    if settings.model == "deepspeech2":
        return sounds.columns(FRAMES.of, encode=characters.encode)
    values = [SAMPLES([one], RATE)["input_values"][0] for one in sounds.samples]
    return dataclasses.replace(sounds, samples=values).columns(encode=characters.encode)


def even(samples: Array, keep: Array) -> Array:
    """Samples [B, T] of mean 0 and variance 1 where they are kept, as `SAMPLES` makes them."""
    count = jnp.maximum(keep.sum(axis=1, keepdims=True), 1)
    centred = jnp.where(keep, samples - samples.sum(axis=1, keepdims=True) / count, 0)
    variance = jnp.square(centred).sum(axis=1, keepdims=True) / count
    return centred / jnp.sqrt(variance + EPSILON)


def config_of(settings: Settings, characters: Characters) -> Any:
    """The sizes of the model."""
    size, blank = len(characters.symbols), characters.numbers[characters.blank]
    if settings.model == "deepspeech2":
        return deepspeech2.Config(
            num_features=MELS, conv_channels=(16, 16), conv_sizes=((11, 11), (11, 7)),
            conv_strides=((2, 2), (1, 2)), cell="gru", hidden_size=settings.width,
            num_hidden_layers=settings.layers, dense_sizes=(), hidden_dropout=0.1, vocab_size=size,
            pad_token_id=blank, ctc_loss_reduction="mean",
        )  # fmt: skip
    width = settings.width
    return wav2vec2.Config(
        vocab_size=size, hidden_size=width, num_hidden_layers=settings.layers,
        num_attention_heads=4, intermediate_size=4 * width, feat_extract_norm="layer",
        do_stable_layer_norm=True, conv_bias=True,
        conv_dim=(64, 64, 64, width), conv_kernel=(10, 8, 4, 4), conv_stride=(5, 4, 4, 2),
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, mask_time_prob=0.05,
        mask_time_length=5, layerdrop=0.0, pad_token_id=blank, ctc_loss_reduction="mean",
    )  # fmt: skip


def heard(loss: LossFn, settings: Settings) -> LossFn:
    """The loss of samples, as the model reads them: in rooms that are drawn anew at each step."""

    def loss_fn(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        assert rng is not None  # the step has one always
        *keys, mask_key, key = jax.random.split(rng, 6)
        x = jnp.asarray(batch["input_values"])
        lengths = jnp.asarray(batch["attention_mask"]).sum(axis=1)
        speakers = None
        if settings.augment:
            x, lengths = surround(keys[0], x, lengths, RATE, ROOMS.silence)
            x = with_noise(keys[2], through(keys[1], x, RATE, ROOMS), lengths, ROOMS.noise)
            speakers = drawn(keys[3], len(x), ROOMS.speakers)
        keep = jnp.arange(x.shape[1]) < lengths[:, None]
        inputs = {name: batch[name] for name in ("labels", "weight", "index") if name in batch}
        if settings.model == "wav2vec2":
            inputs |= {"input_values": even(x, keep), "attention_mask": keep}
            return loss(variables, inputs, key)
        x = x * (FRAMES.peak or 1.0) / jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True), 1e-9)
        counts = jnp.maximum(FRAMES.cut.count(jnp.asarray(lengths)), 1)
        frames = mel_frames(FRAMES, x, counts, speakers)
        if settings.augment:
            frames = spec_augment(mask_key, frames, counts, MASKS)
        there = (jnp.arange(frames.shape[1]) < counts[:, None]).astype(jnp.int32)
        return loss(variables, inputs | {"input_features": frames, "attention_mask": there}, key)

    return loss_fn


def run(settings: Settings) -> dict[str, Any]:
    """Trains (or goes on), evaluates, and returns what results.json holds."""
    sounds = load(settings)
    characters = characters_of(text for text in sounds["train"].texts or ())
    columns = {split: prepared(settings, split, part, characters) for split, part in sounds.items()}
    for split, part in sounds.items():
        print(f"{split}: {len(part):,} sounds, {part.seconds / 60:.1f} minutes")
    model, variables = fmjax.create(
        settings.model, config_of(settings, characters), head="ctc",
        rng=jax.random.key(settings.seed), scan=settings.scan, remat=settings.remat,
    )  # fmt: skip
    blank = characters.numbers[characters.blank]
    for split, part in columns.items():
        inputs, labels = part.ragged
        lengths = inputs.lengths
        if split == "train" and settings.model == "deepspeech2":  # of samples
            lengths = np.maximum(FRAMES.cut.count(jnp.asarray(lengths)), 1)
        task.check_labels(model.frames(lengths), labels.rows("labels"), blank=blank)
    shapes = shared_buckets(*(part for split, part in columns.items() if split != "train"))
    stream = batches(columns["train"], batch_size=settings.batch_size, seed=settings.seed)

    scorer = fit_word_ngram(sounds["train"].texts or ()).scorer()

    def search(scores: np.ndarray) -> list[int]:
        return prefix_beam(scores, blank=blank, symbols=characters.pieces, scorer=scorer)[0].symbols

    symbol_by_symbol = partial(greedy, blank=blank)

    def evaluation(state: TrainState, split: str, *decodes: task.Decode) -> list[task.Evaluation]:
        once = evaluation_batches(columns[split], buckets=shapes, batch_size=32)
        size, text = len(sounds[split]), characters.decode
        return task.evaluate_ways(
            model, weights_of(state), once, size=size, text=text, decodes=decodes
        )

    state = train(
        settings,
        model,
        variables,
        heard(task.loss(model), settings),
        stream,
        evaluate=lambda state: evaluation(state, "val", symbol_by_symbol)[0].metrics,
        metric="wer",
        mode="min",
        about={
            "source": f"{settings.model}, random weights",
            "data": {
                "source": settings.data,
                "splits": {split: len(part) for split, part in sounds.items()},
            },
        },
    )
    if state is None:
        return STOPPED
    results: dict[str, Any] = {"best_step": int(state.step)}
    rows = []
    for split in [split for split in sounds if split != "train"]:
        plain, found = evaluation(state, split, symbol_by_symbol, search)
        results[split] = plain.metrics
        results[split] |= {f"searched_{name}": value for name, value in found.metrics.items()}
        pairs = zip(found.references[:10], found.predictions[:10], strict=True)
        rows += [(split, *pair) for pair in pairs]
    save_samples(settings.output, ("sounds", "said", "heard"), rows)
    symbols = Symbols(characters, FRAMES if settings.model == "deepspeech2" else SAMPLES)
    finish(settings.output, results, model, weights_of(state), symbols)
    return results


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints the error rates on sounds that were not trained on."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    results = run(settings)
    if results is STOPPED:
        print(f"stopped; run the same command again to continue {settings.output}")
        return
    for split in [name for name in results if name != "best_step"]:
        scores = plain_numbers(results[split])
        print(split, "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))


if __name__ == "__main__":
    main()
