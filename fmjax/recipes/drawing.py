"""Texts into pictures, by a DALL-E and the tokenizer of its pictures in one folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

import fmjax.hub as hub
from fmjax.models.dalle import padded_ids
from fmjax.recipes.image_generation import drawn_in_batches, save_picture, sheet
from fmjax.tasks import discrete_autoencoding, text_to_image
from fmjax.train.recording import writable_folder
from fmjax.types import Variables

IMAGE_TOKENIZER = "image_tokenizer"
"""The folder, inside a DALL-E's, of the model that makes pictures of its codes."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Draw pictures of texts."""

    model: Annotated[str, tyro.conf.Positional]
    """The folder of a DALL-E with the tokenizer of its pictures in it, as dalle_emoji.py leaves
    them."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What to draw."""
    out: Path = Path("drawn")
    """A folder for the pictures, NUMBER-TEXT.png each."""
    count: int = 4
    """Pictures of each text, side by side."""
    temperature: float = 1.0
    """Below 1 pictures are more alike."""
    top_k: int = 0
    """Only so many codes can be drawn; 0 for all."""
    zoom: int = 4
    """Rows and columns that a pixel is shown as."""
    seed: int = 0
    """Of the draws."""


class Drawer(NamedTuple):
    """What draws.

    Args:
        model, variables: a DALL-E with the head ``causal_lm``.
        tokenizer: of its texts.
        image_model, image_variables: a VQGAN or a dVAE with as many codes.
    """

    model: Any
    variables: Variables
    tokenizer: Any
    image_model: Any
    image_variables: Variables


def save_drawer(folder: str | Path, drawer: Drawer) -> Path:
    """Writes both models and the tokenizer into one folder, which `load_drawer` reads."""
    place = hub.save(folder, drawer.model, drawer.variables, drawer.tokenizer)
    hub.save(place / IMAGE_TOKENIZER, drawer.image_model, drawer.image_variables)
    return place


def load_drawer(model: str | Path) -> Drawer:
    """Reads a folder that `save_drawer` wrote.

    Raises:
        OSError: there is no such folder, or none of an image tokenizer in it.
        ValueError: models that do not belong together.
    """
    folder = hub.find_folder(model)
    module, variables = hub.load(folder)
    if hub.family_for(module).MODEL_TYPE != "dalle" or module.head != "causal_lm":
        raise ValueError(
            f"{folder} has a {hub.family_for(module).MODEL_TYPE} with the head {module.head!r}; "
            "only a dalle with the head 'causal_lm' draws"
        )
    image_model, image_variables = hub.load(folder / IMAGE_TOKENIZER)
    family = hub.family_for(image_model).MODEL_TYPE
    if family not in ("vqgan", "dvae") or image_model.head != "model":
        raise ValueError(f"{folder / IMAGE_TOKENIZER} has a {family}; it must be a vqgan or a dvae")
    if image_model.num_codes != module.config.image_vocab_size:
        raise ValueError(
            f"{folder} draws {module.config.image_vocab_size} codes, and its {IMAGE_TOKENIZER} has "
            f"{image_model.num_codes}: they must be trained together"
        )
    return Drawer(module, variables, hub.load_tokenizer(folder), image_model, image_variables)


def text_ids(drawer: Drawer, texts: Sequence[str]) -> np.ndarray:
    """int32 [B, text_length]: a text's tokens, its beginning where there are more.

    Raises:
        ValueError: texts without a token.
    """
    if empty := [number for number, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"the texts {empty} are empty; say what to draw")
    config = drawer.model.config
    options = {"truncation": True, "max_length": config.text_length}
    return padded_ids(config, [drawer.tokenizer(text, **options)["input_ids"] for text in texts])


def draw_pictures(
    drawer: Drawer,
    texts: Sequence[str],
    *,
    count: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int = 16,
) -> np.ndarray:
    """Pictures of texts: [B, count, X, Y, C] from 0 to 1.

    Args:
        drawer: from `load_drawer`.
        texts: B of them.
        count: pictures of each.
        temperature, top_k: of the draws.
        seed: of the draws.
        batch_size: texts that are drawn at once.

    Raises:
        ValueError: no texts, empty ones, or settings out of range.
    """
    if not texts or count < 1:
        raise ValueError(f"{len(texts)} texts, count={count}: give at least one of each")
    ids = text_ids(drawer, texts)
    rows, size = [], min(batch_size, len(ids))
    for first in range(0, len(ids), size):
        part = ids[first : first + size]
        filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        key = jax.random.fold_in(jax.random.key(seed), first)
        codes = text_to_image.draw_codes(
            drawer.model, drawer.variables, filled, rng=key, count=count, temperature=temperature,
            top_k=top_k,
        )  # fmt: skip
        rows.append(codes[: len(part)])
    codes = np.concatenate(rows)  # [B, count, x, y]
    decode = jax.jit(discrete_autoencoding.decode(drawer.image_model))
    images = drawn_in_batches(
        lambda part: decode(drawer.image_variables, part), codes.reshape(-1, *codes.shape[2:]), 64
    )
    return images.reshape(*codes.shape[:2], *images.shape[1:])


def save_drawings(settings: Settings) -> list[Path]:
    """Writes the pictures of each text, side by side; returns the files.

    Raises:
        OSError: no such model, or a folder that cannot be written to.
        ValueError: see `load_drawer` and `draw_pictures`; or a zoom below 1.
    """
    if not settings.texts:
        raise ValueError('no text; write it after the model: fmjax draw MODEL "a red heart"')
    if settings.zoom < 1:
        raise ValueError(f"zoom={settings.zoom} must be at least 1")
    place = writable_folder(settings.out)
    images = draw_pictures(
        load_drawer(settings.model),
        settings.texts,
        count=settings.count,
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=settings.seed,
    )
    files = []
    for number, (text, row) in enumerate(zip(settings.texts, images, strict=True), 1):
        words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]
        files.append(place / f"{number}-{words or 'text'}.png")
        pixels = sheet(row, settings.count)
        save_picture(files[-1], pixels.repeat(settings.zoom, axis=0).repeat(settings.zoom, axis=1))
    return files
