"""Names of emoji into pictures: a tokenizer of pictures, then a DALL-E over names and its codes.

    python experiments/dalle_emoji.py --output runs/dalle --precision bfloat16

Held-out pictures come back from their codes with a mean squared error of 0.011 (pixels from 0 to 1;
63 of 512 codes are used). Drawn for held-out names they have a FID of 594 and a KID of 0.35, those
that come back from codes 457, other real pictures 375 and 0.03: flags become flags and faces faces,
other things blurs. Validation losses of codes are least, 2.36 nats, after 375 of the transformer's
600 steps (of 2,000 they were least after 250): there are too few names. One seed, about 35 minutes
of one CPU core.

``--restarts 10`` begins unused codes anew where pictures are told worst. In a short run (160 steps
of 16 pictures) 506 of 512 codes are used then, of a perplexity of 295 over the training pictures,
in place of 38 and 14, at a squared error of 0.055 in place of 0.056; not measured yet: whole runs.

First a VQGAN (without its discriminator), or with ``--image-tokenizer dvae`` DALL-E's discrete
VAE, learns to write a picture as a grid of codes; then a transformer learns names and codes in a
row. FID and KID are of pictures drawn for held-out names against the true ones, by the features of
EfficientNet-Lite0: comparable between these runs, not with the published ones of Inception.

The folder gets image_tokenizer/ and transformer/, runs with their reports, sheets of pictures
(reconstructions.png, drawn.png) and export/, from which ``fmjax draw runs/dalle/export "a red
heart"`` draws. An interrupted run is continued by the same command.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
import tyro

import fmjax
from fmjax import hub
from fmjax.config import write_json
from fmjax.data.assets import fetch
from fmjax.data.batches import batches
from fmjax.data.columns import Columns
from fmjax.data.tokenizer import train_tokenizer
from fmjax.metrics import frechet_distance, kernel_distance
from fmjax.models import dalle, dvae, vqgan
from fmjax.recipes.drawing import Drawer, draw_pictures, save_drawer, text_ids
from fmjax.recipes.image_classification import data_url
from fmjax.recipes.image_generation import drawn_in_batches, save_picture, sheet
from fmjax.recipes.texts import evaluation_batches
from fmjax.recipes.training import STOPPED, carry_out, computed, weights_of
from fmjax.report import write_report
from fmjax.report.samples import save_samples
from fmjax.tasks import discrete_autoencoding as codes_of
from fmjax.tasks import text_to_image as task
from fmjax.tasks.apply import means
from fmjax.tasks.feature_extraction import embed
from fmjax.train import (
    adamw,
    gradient,
    init_state,
    jit_step,
    make_train_step,
    warmup_cosine,
)
from fmjax.train.recording import writable_folder
from fmjax.types import LossFn, StepFn, TrainState, Variables

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Train both models."""

    output: Path
    """The folder; what is in it already is continued."""
    image_size: int = 32
    """Rows and columns of the pictures."""
    image_tokenizer: Literal["vqgan", "dvae"] = "vqgan"
    """What makes codes of pictures."""
    codes: int = 512
    """Kinds of codes."""
    base_channels: int = 32
    """Features of the image tokenizer at full size; twice as many each time pixels are halved."""
    levels: int = 3
    """Sizes it sees pictures in; a code is 2 ** (levels - 1) pixels wide."""
    tokenizer_steps: int = 1200
    """Of its training."""
    tokenizer_rate: float = 1e-3
    """Peak of its learning rate."""
    restarts: int = 0
    """In the first half of its training, steps after which unused codes of a VQGAN begin anew at
    what is told worst; 0 for never."""
    vocab_size: int = 1024
    """Of the tokenizer of names, at most."""
    text_length: int = 16
    """Tokens of a name."""
    width: int = 256
    """Of the transformer's hidden states, whose heads have 64."""
    layers: int = 8
    """Its blocks."""
    dropout: float = 0.1
    """In them."""
    steps: int = 600
    """Of its training."""
    learning_rate: float = 1e-3
    """Peak of its learning rate."""
    batch_size: int = 64
    """Pictures a step, of both."""
    evaluations: int = 8
    """Along each training."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    temperature: float = 1.0
    """Of drawn codes."""
    measured: int = 200
    """Held-out names that pictures are drawn for, at most."""
    seed: int = 0
    """Of weights, order and draws."""


class Pictures(NamedTuple):
    """Pictures uint8 [N, X, Y, 3] and their names."""

    images: np.ndarray
    names: list[str]


def load_pictures(settings: Settings) -> dict[str, Pictures]:
    """The three splits."""
    from fmjax.data.emoji import named_emoji

    return {split: Pictures(*named_emoji(split, size=settings.image_size)) for split in SPLITS}


def learn(
    settings: Settings,
    part: str,
    model: Any,
    variables: Variables,
    loss: LossFn,
    stream: Any,
    *,
    steps: int,
    rate: float,
    evaluate: Any,
    metric: str,
    pictures: Mapping[str, Pictures],
    around: Callable[[StepFn], StepFn] = lambda step: step,
) -> TrainState | None:
    """One of the two trainings, a run in a folder of its own; None where a signal ended it."""
    schedule = warmup_cosine(rate, steps=steps, warmup=steps // 20)
    tx = adamw(schedule)
    loss = computed(loss, settings.precision)
    sizes = {split: len(one.names) for split, one in pictures.items()}
    family = hub.family_for(model).MODEL_TYPE
    return carry_out(
        dataclasses.replace(settings, output=settings.output / part),
        model,
        init_state(variables, tx, jax.random.key(settings.seed)),
        jit_step(around(make_train_step(gradient(loss), tx))),
        stream,
        steps=steps,
        every=max(1, math.ceil(steps / max(1, settings.evaluations))),
        evaluate=evaluate,
        metric=metric,
        mode="min",
        about={"source": f"{family}, new", "data": {"source": "emoji", "splits": sizes}},
        schedule=schedule,
    )


def image_model(settings: Settings) -> tuple[Any, Variables]:
    """The image tokenizer, new."""
    times = tuple(2**i for i in range(settings.levels))
    if settings.image_tokenizer == "dvae":
        config = dvae.Config(
            hidden_size=settings.base_channels, initial_size=2 * settings.base_channels,
            multipliers=times, blocks_per_group=1, codebook_size=settings.codes,
        )  # fmt: skip
    else:
        config = vqgan.Config(
            image_size=settings.image_size, base_channels=settings.base_channels,
            channel_multipliers=times, blocks_per_level=1,
            attention_sizes=(settings.image_size // times[-1],), latent_channels=64,
            embedding_size=16, num_embeddings=settings.codes,
            norm_groups=min(32, settings.base_channels),
        )  # fmt: skip
    rng = jax.random.key(settings.seed)
    return fmjax.create(settings.image_tokenizer, config, rng=rng)


@functools.lru_cache(maxsize=4)
def image_loss(settings: Settings, model: Any, trains: bool) -> LossFn:
    """The tokenizer's loss; the schedules of a dVAE are the paper's, in as many steps as there
    are."""
    if settings.image_tokenizer == "vqgan":
        return codes_of.vector_quantised(model, train=trains)
    steps = settings.tokenizer_steps
    return codes_of.relaxed(
        model,
        temperature=optax.cosine_decay_schedule(1.0, steps, alpha=1 / 16),
        divergence=optax.linear_schedule(0.0, 6.6, steps // 2),
        train=trains,
    )


def train_image_tokenizer(
    settings: Settings, pictures: Mapping[str, Pictures]
) -> tuple[Any, Variables] | None:
    """The image tokenizer, trained; None where a signal ended it early."""
    model, variables = image_model(settings)
    columns = {
        split: Columns((), {"pixel_values": part.images}) for split, part in pictures.items()
    }
    stream = batches(columns["train"], batch_size=settings.batch_size, seed=settings.seed)
    if settings.image_tokenizer == "dvae":
        variables = codes_of.with_steps(variables)

    def evaluate(state: TrainState) -> dict[str, float]:
        once = evaluation_batches(columns["val"], batch_size=settings.batch_size)
        totals = means(image_loss(settings, model, False), weights_of(state), once)
        return {name: total.value for name, total in totals.items()}

    around = {}
    if settings.restarts and settings.image_tokenizer == "vqgan":
        every, half = settings.restarts, settings.tokenizer_steps // 2
        around["around"] = lambda step: codes_of.restarting(step, model, every=every, steps=half)
    state = learn(
        settings, "image_tokenizer", model, variables, image_loss(settings, model, True), stream,
        steps=settings.tokenizer_steps, rate=settings.tokenizer_rate, evaluate=evaluate,
        metric="squared_error", pictures=pictures, **around,
    )  # fmt: skip
    if state is None:
        return None
    results = {"best_step": int(state.step), "val": evaluate(state)}
    write_json(settings.output / "image_tokenizer" / "results.json", results)
    return model, codes_of.without_steps(weights_of(state))


def encode_pictures(model: Any, variables: Variables, images: np.ndarray) -> np.ndarray:
    """Codes int [N, x, y]."""
    encode = jax.jit(codes_of.encode(model))
    return drawn_in_batches(lambda part: encode(variables, {"pixel_values": part}), images, 64)


def decode_codes(model: Any, variables: Variables, codes: np.ndarray) -> np.ndarray:
    """Pictures [N, X, Y, 3] from 0 to 1."""
    decode = jax.jit(codes_of.decode(model))
    return drawn_in_batches(lambda part: decode(variables, part), codes, 64)


def quality_of(real: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """FID and KID of uint8 pictures by the real EfficientNet-Lite0's pooled features."""
    (file,) = fetch("efficientnet-lite0").glob("*.pth")
    model, variables = fmjax.load_weights(file, "efficientnet_lite", "lite0", head="model")
    features = jax.jit(embed(model, pooling="pooler"))

    def vectors(images: np.ndarray) -> np.ndarray:
        def of_part(part: Any) -> Any:
            larger = jax.image.resize(part.astype(np.float32), (len(part), 128, 128, 3), "cubic")
            return features(variables, {"pixel_values": (larger - 127) / 128})

        return drawn_in_batches(of_part, images, 32)

    first, second = vectors(real), vectors(made)
    return {
        "fid": frechet_distance(first, second),
        "kid": kernel_distance(first, second)[0],
    }


def train_transformer(
    settings: Settings, pictures: Mapping[str, Pictures], drawer: Drawer
) -> TrainState | None:
    """The transformer over names and codes, trained."""
    model = drawer.model
    columns = {}
    for split, part in pictures.items():
        codes = encode_pictures(drawer.image_model, drawer.image_variables, part.images)
        rows = [text_ids(drawer, part.names), task.image_tokens(model.config, codes)]
        columns[split] = Columns((), {"input_ids": np.concatenate(rows, axis=1)})
    stream = batches(columns["train"], batch_size=settings.batch_size, seed=settings.seed)

    def evaluate(state: TrainState, split: str = "val") -> dict[str, float]:
        once = evaluation_batches(columns[split], batch_size=settings.batch_size)
        return task.evaluate(model, weights_of(state), once)

    state = learn(
        settings, "transformer", model, drawer.variables, task.loss(model), stream,
        steps=settings.steps, rate=settings.learning_rate, evaluate=evaluate, metric="image",
        pictures=pictures,
    )  # fmt: skip
    if state is not None:
        results: dict[str, Any] = {"best_step": int(state.step)}
        results |= {split: evaluate(state, split) for split in ("val", "test")}
        write_json(settings.output / "transformer" / "results.json", results)
    return state


def new_transformer(
    settings: Settings, pictures: Mapping[str, Pictures]
) -> tuple[Any, Variables, Any]:
    """(model, variables, tokenizer of names)."""
    tokenizer: Any = train_tokenizer(
        pictures["train"].names, kind="bytebpe", vocab_size=settings.vocab_size,
        max_length=settings.text_length,
    )  # fmt: skip
    config = dalle.Config(
        text_vocab_size=len(tokenizer), text_length=settings.text_length,
        image_vocab_size=settings.codes,
        grid_size=settings.image_size // 2 ** (settings.levels - 1), hidden_size=settings.width,
        num_hidden_layers=settings.layers, num_attention_heads=max(1, settings.width // 64),
        intermediate_size=4 * settings.width, window=5, dropout=settings.dropout,
    )  # fmt: skip
    rng = jax.random.key(settings.seed)
    model, variables = fmjax.create("dalle", config, head="causal_lm", rng=rng)
    return model, variables, tokenizer


def run(settings: Settings) -> dict[str, Any]:
    """Trains (or goes on), draws, and returns what results.json holds."""
    folder = writable_folder(settings.output)
    pictures = load_pictures(settings)
    trained = train_image_tokenizer(settings, pictures)
    if trained is None:
        return STOPPED
    test = pictures["test"]
    rebuilt = decode_codes(*trained, encode_pictures(*trained, test.images))
    shown = np.concatenate([test.images[:16] / 255, rebuilt[:16]])
    save_picture(folder / "reconstructions.png", sheet(shown, 16))
    save_samples(
        folder / "image_tokenizer", ("name", "picture", "from its codes"),
        [(name, data_url(image), data_url(sheet(again[None], 1)))
         for name, image, again in zip(test.names[:24], test.images, rebuilt, strict=False)],
    )  # fmt: skip
    drawer = Drawer(*new_transformer(settings, pictures), *trained)
    state = train_transformer(settings, pictures, drawer)
    if state is None:
        return STOPPED
    drawer = drawer._replace(variables=weights_of(state))
    export = save_drawer(folder / "export", drawer)
    count = min(settings.measured, len(test.names))
    drawn = draw_pictures(
        drawer, test.names[:count], temperature=settings.temperature, seed=settings.seed
    )[:, 0]
    real, made = test.images[:count], _bytes(drawn)
    error = np.square(rebuilt - test.images / 255).mean()
    results: dict[str, Any] = {
        "reconstruction": {
            "squared_error": float(error),
            "codes_used": len(np.unique(encode_pictures(*trained, pictures["train"].images))),
            **quality_of(test.images, _bytes(rebuilt)),
        },
        "test": quality_of(real, made),
        # What the same numbers are of other real pictures.
        "real": quality_of(real, pictures["train"].images[:count]),
    }
    seen = draw_pictures(drawer, pictures["train"].names[:16], seed=settings.seed)[:, 0]
    rows = [pictures["train"].images[:16] / 255, seen, real[:16] / 255, drawn[:16]]
    save_picture(folder / "drawn.png", sheet(np.concatenate(rows), 16))
    save_samples(
        folder / "transformer", ("name", "true picture", "drawn"),
        [(name, data_url(image), data_url(sheet(again[None], 1)))
         for name, image, again in zip(test.names[:48], real, drawn, strict=False)],
    )  # fmt: skip
    write_json(folder / "results.json", results)
    for part in ("image_tokenizer", "transformer"):
        write_report(folder / part)
    print(f"export: {export}")
    return results


def _bytes(images: np.ndarray) -> np.ndarray:
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints the numbers of both models."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    results = run(settings)
    if results is STOPPED:
        print(f"stopped; run the same command again to continue {settings.output}")
        return
    print(
        f"reconstruction: squared error {results['reconstruction']['squared_error']:.5f}, "
        f"{results['reconstruction']['codes_used']} codes used, FID "
        f"{results['reconstruction']['fid']:.2f}"
    )
    print(
        f"drawn for held-out names: FID {results['test']['fid']:.2f}, KID "
        f"{results['test']['kid']:.4f}; of other real pictures {results['real']['fid']:.2f}, "
        f"{results['real']['kid']:.4f}"
    )


if __name__ == "__main__":
    main()
