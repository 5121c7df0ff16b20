"""Pictures with texts: folders, manifests, batches, and the processor against transformers'."""

import json

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fmjax.data import assets
from fmjax.data.batches import batches
from fmjax.data.emoji import load_emoji, load_emoji_names
from fmjax.data.image_processor import load_image_processor
from fmjax.data.image_text import ImageTexts, load_pair_processor, read_image_texts

PIECES = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b", "b</w>", "a", "ab</w>"]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(PIECES)}, merges=[("a", "b</w>")]
    )


@pytest.fixture
def folder(tmp_path):
    """Three pictures with texts, and a manifest of them."""
    rows = []
    for number, text in enumerate(("ab", "b a", "ab")):
        shade = np.full((6, 8, 3), 50 * number, np.uint8)
        Image.fromarray(shade).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f" {text}\n")
        rows.append({"image": f"{number}.png", "text": text})
    for name in ("._0.png", "._0.txt"):
        (tmp_path / name).write_bytes(b"of another system")
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "pairs.jsonl").write_text(lines + "\n")
    return tmp_path


def test_folders_and_manifests_are_read_alike(folder, tokenizer):
    one, two = read_image_texts(folder), read_image_texts(folder / "pairs.jsonl")
    np.testing.assert_array_equal(one.images, two.images)
    assert list(one.texts) == list(two.texts) == ["ab", "b a", "ab"]
    np.testing.assert_array_equal(one.numbers, [0, 1, 0])
    columns = one.select([2, 1]).columns(tokenizer, max_length=8)
    batch = next(iter(batches(columns, batch_size=2, shuffle=False, buckets=(8,))))
    assert batch["pixel_values"].dtype == np.uint8
    np.testing.assert_array_equal(batch["pixel_values"][:, 0, 0, 0], [100, 50])
    np.testing.assert_array_equal(batch["input_ids"], [[0, 6, *[1] * 6], [0, 4, 2, *[1] * 5]])
    np.testing.assert_array_equal(batch["attention_mask"].sum(axis=1), [3, 4])
    np.testing.assert_array_equal(batch["labels"], [0, 1])


def test_all_that_is_wrong_is_listed(folder):
    (folder / "1.txt").unlink()
    (folder / "9.txt").write_text("nothing")
    (folder / "2.txt").write_bytes(b"\xff")
    (folder / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1\.png has no text") as error:
        read_image_texts(folder)
    for words in ("9.txt has no picture", "2.png has no text", "0.png: its 10 bytes are no"):
        assert words in str(error.value)
    rows = [{"image": "../2.png", "text": "a"}, {"image": "2.png", "text": " "}, {"image": "7.png",
            "text": "b"}]  # fmt: skip
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"row 1: \.\./2\.png is not inside") as error:
        read_image_texts(folder / "pairs.jsonl")
    for words in ("row 2: image='2.png', text=' '", "7.png"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="2 texts for 1 images") as error:
        ImageTexts(np.zeros((1, 2, 2, 3), np.uint8), ["a", " "])
    assert "1 texts are empty, the first of image 1" in str(error.value)


def test_processor_equals_transformers(tokenizer, tmp_path):
    theirs = transformers.CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 10}, crop_size=9), tokenizer
    )
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    ours = load_pair_processor(tmp_path, tokenizer, max_length=4)
    image = np.random.default_rng(0).integers(0, 256, (14, 20, 3), np.uint8)
    batch = ours(images=[image], texts=["ab", "b a a a"])
    expected = theirs(
        images=[image], text=["ab", "b a a a"], padding=True, truncation=True, max_length=4,
        return_tensors="np",
    )  # fmt: skip
    pixels = np.moveaxis(expected["pixel_values"], 1, -1)
    np.testing.assert_allclose(batch["pixel_values"], pixels, atol=1e-5)
    np.testing.assert_array_equal(batch["input_ids"], expected["input_ids"])
    np.testing.assert_array_equal(batch["attention_mask"], expected["attention_mask"])
    (tmp_path / "again").mkdir()
    ours.save_pretrained(tmp_path / "again")
    assert load_image_processor(tmp_path / "again") == ours.image_processor
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    padded = load_pair_processor(tmp_path, tokenizer, max_length=6)(texts=["ab"])
    assert {name: x.shape for name, x in padded.items()} == {"input_ids": (1, 6)}
    with pytest.raises(ValueError, match="nothing to process"):
        ours()
    with pytest.raises(ValueError, match="text 1 is empty"):
        ours(texts=["a", " "])


@pytest.mark.asset
def test_emoji_have_their_names():
    if not assets.available("emoji"):
        pytest.skip("the asset emoji is not cached: fmjax.data.fetch('emoji')")
    pairs, pictures = load_emoji_names("val", size=16), load_emoji("val", size=16)
    np.testing.assert_array_equal(pairs.images, pictures.images)
    np.testing.assert_array_equal(pairs.labels, pictures.labels)
    by_name = dict(zip(pairs.texts, pairs.labels, strict=True))
    flags = [name for name, label in by_name.items() if pairs.label_names[label] == "Flags"]
    assert flags
    assert all("flag" in name for name in flags)


def test_examples_are_checked_and_selected():
    images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    whole = ImageTexts(images, ["a", "b", "c"], np.array([0, 1, 1]), ("x", "y"))
    part = whole.select([2, 0])
    assert (len(part), part.texts) == (2, ["c", "a"])
    np.testing.assert_array_equal(part.images, images[[2, 0]])
    np.testing.assert_array_equal(part.labels, [1, 0])
    with pytest.raises(ValueError, match="must be uint8") as error:
        ImageTexts(images / 2, ["a", " "], np.array([0, 5]), ("x", "y"))
    for said in (
        "2 texts for 3 images", "1 texts are empty, the first of image 1", "2 labels for 3 images",
        "not all of the 2 classes",
    ):  # fmt: skip
        assert said in str(error.value)


@pytest.mark.asset
@pytest.mark.slow
def test_emoji_have_names_and_categories():
    from fmjax.data.emoji import load_emoji_names

    if not assets.available("emoji"):
        pytest.skip("the asset emoji is not cached: fmjax.data.fetch('emoji')")
    parts = [load_emoji_names(split, size=16) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == 1_911 - 5
    one = parts[0].texts.index("cook")
    assert parts[0].labels is not None
    assert parts[0].label_names[parts[0].labels[one]] == "People & Body"
    with pytest.raises(ValueError, match="no split 'dev'"):
        load_emoji_names("dev", size=16)
