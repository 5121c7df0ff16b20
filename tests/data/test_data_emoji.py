"""Emoji: what emoji.json must say, splits by the first code point, ImageNet's names."""

import json

import numpy as np
import pytest
from PIL import Image

from fmjax.data import assets
from fmjax.data.emoji import load_emoji, named_emoji, read_emoji, rgba, split_of
from fmjax.data.imagenet import imagenet_labels


def write(folder, entries):
    for entry in entries:
        Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(folder / entry["image"])
    (folder / "emoji.json").write_text(json.dumps(entries))


def entry(code, category="Symbols"):
    return {"unified": code, "name": "HASH KEY", "category": category, "image": f"{code}.png"}


def test_entries_are_read_and_others_refused(tmp_path):
    write(tmp_path, [entry("0023-FE0F"), entry("1F600", "Food & Drink")])
    first, second = read_emoji(tmp_path, 2)
    assert (first.code, first.name, first.category) == ("0023-fe0f", "hash key", "Symbols")
    assert second.category == "Food & Drink"
    assert rgba(first.file).size == (64, 64)
    with pytest.raises(ValueError, match="where there are 3"):
        read_emoji(tmp_path, 3)
    wrong = [entry("0023"), {**entry("0024"), "category": "Nonsense"}]
    wrong.append({**entry("0025"), "image": "../outside.png"})
    (tmp_path / "0023.png").write_bytes(b"")
    (tmp_path / "emoji.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="'Nonsense'") as error:
        read_emoji(tmp_path, 3)
    assert "../outside.png" in str(error.value)


def test_variants_of_one_picture_are_in_one_split():
    assert len({split_of(f"1f9d1{rest}") for rest in ("", "-200d-1f373", "-1f3fb")}) == 1
    splits = [split_of(f"{code:x}") for code in range(0x1F300, 0x1F700)]
    shares = [splits.count(split) / len(splits) for split in ("train", "val", "test")]
    np.testing.assert_allclose(shares, (0.8, 0.1, 0.1), atol=0.05)


@pytest.mark.asset
def test_the_set_is_whole():
    if not assets.available("emoji"):
        pytest.skip("the asset emoji is not cached: fmjax.data.fetch('emoji')")
    parts = [load_emoji(split, size=32) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == 1_911 - 5
    for part in parts:
        assert part.images.shape[1:] == (32, 32, 3)
        assert part.num_labels == 9
    images, names = named_emoji("val", size=32)
    np.testing.assert_array_equal(images, parts[1].images)
    assert len(names) == len(images)
    assert "grinning face" in [*names, *named_emoji("train")[1], *named_emoji("test")[1]]
    for load in (load_emoji, named_emoji):
        with pytest.raises(ValueError, match="no split 'dev'"):
            load("dev")


@pytest.mark.asset
def test_imagenets_classes_have_their_names():
    if not assets.available("wordnet"):
        pytest.skip("the asset wordnet is not cached: fmjax.data.fetch('wordnet')")
    names = imagenet_labels()
    assert len(set(names)) == 1000
    assert (names[0], names[285], names[985]) == ("tench", "Egyptian cat", "daisy")
    assert names[134] == "crane"
    assert names[517].startswith("crane, ")
