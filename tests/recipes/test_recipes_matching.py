"""``fmjax match``: texts for a picture, by a saved CLIP and a saved SigLIP."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import transformers
from PIL import Image

import fmjax
from fmjax.cli import main
from fmjax.data.image_processor import ImageProcessor, Size
from fmjax.data.image_text import PairProcessor
from fmjax.models import clip, siglip

PIECES = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b", "b</w>", "a", "ab</w>"]


def save(folder, family):
    """A tiny model with its tokenizer and its processor, and a picture."""
    tokenizer = transformers.CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(PIECES)}, merges=[("a", "b</w>")]
    )
    pair = family.VARIANTS["tiny"]
    text = {"vocab_size": len(PIECES)}
    if family is clip:
        text["eos_token_id"] = 1
    config = dataclasses.replace(pair, text_config=dataclasses.replace(pair.text_config, **text))
    model, variables = fmjax.create(family.MODEL_TYPE, config, rng=jax.random.key(0))
    pictures = ImageProcessor("ViTImageProcessor", size=Size(8, 8), image_mean=(0.5,) * 3)
    fmjax.save(folder, model, variables, PairProcessor(pictures, tokenizer, 32))
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return model, variables, pixels


def asked(capsys, *argv):
    assert main(["match", *map(str, argv)]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("family", [clip, siglip], ids=["clip", "siglip"])
def test_texts_are_ranked(family, tmp_path, capsys):
    save(tmp_path, family)
    words = ("a", "b", "ab")
    picture = tmp_path / "picture.png"
    found = json.loads(asked(capsys, tmp_path, picture, *words, "--json"))["texts"]
    assert {row["text"] for row in found} == set(words)
    cosines = [row["cosine"] for row in found]
    assert cosines == sorted(cosines, reverse=True)
    total = sum(row["probability"] for row in found)
    assert (abs(total - 1) < 1e-5) == (family is clip)
    # The same as the model says it, of inputs by the processor.
    model, variables = fmjax.load(tmp_path)
    processor = PairProcessor(
        fmjax.data.image_processor.load_image_processor(tmp_path),
        fmjax.load_tokenizer(tmp_path), 32, full_length=family is siglip,
    )  # fmt: skip
    out = model.apply(variables, **processor(images=[picture], texts=words))
    best = words[int(np.argmax(out.logits_per_image[0]))]
    assert found[0]["text"] == best
    lines = asked(capsys, tmp_path, picture, *words, "--prompts", "{}", "b {}").splitlines()
    assert len(lines) == 3
    assert lines[0].split("\t")[0] >= lines[1].split("\t")[0]


@pytest.mark.slow
def test_what_cannot_be_matched(tmp_path, capsys):
    save(tmp_path, clip)
    picture = str(tmp_path / "picture.png")
    for argv, words in (
        ([str(tmp_path), picture], "there are no texts"),
        ([str(tmp_path), picture, "a", "--prompts", "no place"], "must have one {}"),
        ([str(tmp_path), str(tmp_path / "config.json"), "a"], "are no picture"),
        ([str(tmp_path), picture, " "], "text 0 is empty"),
        ([str(tmp_path / "nowhere"), picture, "a"], "nowhere"),
    ):
        assert main(["match", *argv]) == 2
        assert words in capsys.readouterr().err
