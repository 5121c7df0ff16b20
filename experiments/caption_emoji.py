"""A picture encoder and a small decoder that write the names of emoji.

    python experiments/caption_emoji.py --output runs/caption

Takes about three minutes on 2 CPU cores. On the test pictures: BLEU 10.2, chrF 21.6, word F1 0.213,
and 1.1 % of the names right altogether. The baseline, the name of the training picture whose mean
feature is most alike, has BLEU 13.5, chrF 28.4, word F1 0.250 and no name right: 1,500 names are
too few for a decoder from scratch to beat it.

The encoder is EfficientNet-Lite0 with ImageNet's weights, which stay as they are (--no-frozen
trains it too); the decoder, a GPT-2 that attends to its last feature map (Xu et al. 2015,
arXiv:1502.03044), starts from scratch. The held-out pictures are of other emoji than the training
ones.

The folder gets checkpoints, metrics.jsonl, report.html with pictures and what was written, and
export/, for `fmjax caption export PICTURE`. An interrupted run is continued by the same command.
"""

import dataclasses
from typing import Any

import jax
import tyro

import fmjax
from fmjax.data.emoji import load_emoji_names
from fmjax.data.image_text import ImageTexts
from fmjax.data.splits import SPLITS
from fmjax.data.tokenizer import train_tokenizer
from fmjax.models import gpt2, vision_encoder_decoder
from fmjax.recipes.captioning import CaptionTraining, train_on_captions
from fmjax.recipes.image_classification import create_model, image_processor, normalisation
from fmjax.recipes.training import STOPPED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(CaptionTraining):
    """Train a small captioner."""

    encoder: str = "efficientnet-lite0"
    """Of the pictures: "efficientnet-lite0", FAMILY/VARIANT for new weights, a folder or hub id."""
    image_size: int = 128
    """Rows and columns that pictures are resized to."""
    layers: int = 3
    """Blocks of the decoder."""
    width: int = 256
    """Of its hidden states; heads have 64."""
    dropout: float = 0.3
    """Of the decoder."""
    vocab_size: int = 3000
    """Of the tokenizer, at most: most words are one token."""
    num_beams: int = 1
    """Hypotheses of the beam search that writes."""
    epochs: float = 30.0
    """Passes over the training pictures."""
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    weight_decay: float = 0.1
    """Of kernels and embeddings."""
    smoke: bool = False
    """A few pictures for a few steps, to see that everything works."""


def load(settings: Settings) -> dict[str, ImageTexts]:
    """The pictures and names of "train", "val" and "test"."""
    found = {split: load_emoji_names(split, size=settings.image_size) for split in SPLITS}
    if settings.smoke:
        return {split: part.select(range(24)) for split, part in found.items()}
    return found


def run(settings: Settings) -> dict[str, Any]:
    """Trains (or goes on), names the held-out pictures, and returns what results.json holds."""
    examples = load(settings)
    tokenizer: Any = train_tokenizer(
        examples["train"].texts, kind="unigram", vocab_size=settings.vocab_size, sentinels=0,
        max_length=settings.max_target_length,
    )  # fmt: skip
    encoder, weights = create_model(settings.encoder, "model", seed=settings.seed)
    decoder = gpt2.Config(
        vocab_size=len(tokenizer),
        n_positions=settings.max_target_length + 1,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=max(1, settings.width // 64),
        add_cross_attention=True,
        embd_pdrop=settings.dropout,
        resid_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
    )
    config = vision_encoder_decoder.Config(
        encoder.config,
        decoder,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model, variables = fmjax.create(
        "vision-encoder-decoder", config, head="seq2seq_lm", rng=jax.random.key(settings.seed),
        scan=settings.scan, remat=settings.remat,
    )  # fmt: skip
    for name, collection in weights.items():
        variables[name]["encoder"] = collection
    images = examples["train"].images
    processor = image_processor(
        images.shape[1:], *normalisation(settings.encoder, images), cropped=True
    )
    return train_on_captions(
        settings, model, variables, tokenizer, examples, processor,
        about={
            "source": f"{settings.encoder} and a GPT-2 of {settings.layers} layers, new",
            "data": "emoji",
        },
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints its scores beside those of the nearest neighbour."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    if settings.smoke:
        settings = dataclasses.replace(
            settings, max_steps=4, epochs=1.0, batch_size=8, width=64, layers=1, num_beams=2,
            image_size=64,
        )  # fmt: skip
    results = run(settings)
    if results is STOPPED:
        print(f"stopped; run the same command again to continue {settings.output}")
        return
    for split in ("val", "test"):
        rivals = (("captioner", results), *results["baselines"].items())
        for name, scores in rivals:
            shown = "  ".join(
                f"{key} {scores[split][key]:.3f}"
                for key in ("bleu", "chrf", "token_f1", "exact_match")
            )
            print(f"{split} {name}: {shown}")


if __name__ == "__main__":
    main()
