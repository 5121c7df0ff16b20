"""Which text fits a picture: a saved model of pictures and texts asked on the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import fmjax.hub as hub
from fmjax.data.files import raise_problems
from fmjax.data.image_text import load_pair_processor
from fmjax.tasks import image_text as task


@dataclasses.dataclass(frozen=True)
class Match:
    """Say which texts fit a picture."""

    model: Annotated[str, tyro.conf.Positional]
    """A folder or hub id of CLIP, SigLIP or another pair of encoders."""
    image: Annotated[Path, tyro.conf.Positional]
    """The file."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What may be in it."""
    prompts: tuple[str, ...] = ("{}",)
    """Sentences to put each text into, such as "a photo of a {}"; several are averaged."""
    json: bool = False
    """Print one JSON object."""


class Matches(NamedTuple):
    """How well texts fit pictures.

    Attributes:
        cosines: float32 [P, N].
        probabilities: float32 [P, N]: which of the texts it is, in sum 1; of a model with a bias of
            its logits (SigLIP), whether it is this one, each by itself.
    """

    cosines: np.ndarray
    probabilities: np.ndarray


def match_texts(
    model: str,
    images: Sequence[str | Path],
    texts: Sequence[str],
    *,
    prompts: Sequence[str] = ("{}",),
) -> Matches:
    """How well each of N texts fits each of P pictures.

    Args:
        model: a folder or hub id, with its tokenizer and preprocessor_config.json.
        images: P files.
        texts: N texts.
        prompts: templates with one "{}" for the text; what they make of it is averaged.

    Raises:
        OSError: no such model or file.
        ValueError: no texts, templates of another form, files that are no pictures, or a model that
            compares no pictures with texts.
    """
    problems = [f"prompt {one!r} must have one {{}}" for one in prompts if one.count("{}") != 1]
    problems += ["there are no texts"] if not texts else []
    problems += ["there are no prompts"] if not prompts else []
    raise_problems("match", problems)
    folder = hub.find_folder(model)
    module, variables = hub.load(folder, head="model")
    tokenizer = hub.load_tokenizer(folder)
    most = module.max_positions
    processor = load_pair_processor(
        folder, tokenizer, max_length=tokenizer.model_max_length if most is None else most
    )
    sentences = [prompt.replace("{}", text) for text in texts for prompt in prompts]
    batch = processor(images=images, texts=sentences)
    owners = np.arange(len(texts)).repeat(len(prompts))
    pictures = {"pixel_values": batch.pop("pixel_values")}

    @jax.jit
    def compare(variables, pictures, batch):
        out = module.apply(variables, **pictures)
        spoken = task.predict(module, side="text")(variables, batch)
        cosines = out.image_embeds @ task.class_vectors(spoken, owners, len(texts)).T
        logits = out.logit_scale * cosines
        if out.logit_bias is None:
            return cosines, jax.nn.softmax(logits, axis=-1)
        return cosines, jax.nn.sigmoid(logits + out.logit_bias)

    cosines, probabilities = compare(variables, pictures, jax.tree.map(jnp.asarray, batch))
    return Matches(np.asarray(cosines), np.asarray(probabilities))


def print_matches(args: Match) -> None:
    """What ``fmjax match`` prints: the texts, the likeliest first.

    Raises:
        OSError, ValueError: see `match_texts`.
    """
    found = match_texts(args.model, [args.image], args.texts, prompts=args.prompts)
    order = np.argsort(-found.cosines[0], kind="stable")
    rows = [
        {
            "text": args.texts[n],
            "probability": round(float(found.probabilities[0, n]), 6),
            "cosine": round(float(found.cosines[0, n]), 6),
        }
        for n in order
    ]
    if args.json:
        print(json.dumps({"image": str(args.image), "texts": rows}, ensure_ascii=False))
        return
    for row in rows:
        print(f"{row['probability']:.4f}\t{row['cosine']:.4f}\t{row['text']}")
