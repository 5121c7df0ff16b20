"""`fmjax classify`, and pictures of a folder as a checkpoint's processor has them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from parity import shuffled
from PIL import Image

import fmjax
from fmjax.cli import main
from fmjax.data.image_processor import load_image_processor, parse_image_processor
from fmjax.models import cnn, detr
from fmjax.recipes import image_classification as recipe

NAMES = ("cat", "crane", "crane")
SHOWN = ("cat", "crane (1)", "crane (2)")


def picture(seed, size=(11, 17)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder with a tiny classifier and how it wants its pictures."""
    folder = tmp_path_factory.mktemp("classifier")
    config = cnn.Config(
        num_channels=3, image_size=8, hidden_sizes=(4,), depths=(1,), pooled_size=2,
        dense_sizes=(), id2label=NAMES,
    )  # fmt: skip
    model, variables = fmjax.create(
        "cnn", config, head="image_classification", rng=jax.random.key(0)
    )
    processor = parse_image_processor(
        {
            "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 10},
            "crop_size": 8, "image_mean": [0.3, 0.4, 0.5], "image_std": [0.01, 0.02, 0.03],
        }
    )  # fmt: skip
    return fmjax.save(folder, model, variables, processor)


def test_classify(classifier, tmp_path, capsys):
    """The classes that transformers' processor and the model itself give, best first."""
    from transformers import AutoImageProcessor

    paths = [str(tmp_path / f"{seed}.png") for seed in range(3)]
    for seed, path in enumerate(paths):
        picture(seed, (11 + 3 * seed, 17)).save(path)
    assert main(["classify", str(classifier), *paths, "--top", "2"]) == 0
    plain = capsys.readouterr().out.splitlines()
    assert main(["classify", str(classifier), *paths, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, variables = fmjax.load(classifier)
    peer = AutoImageProcessor.from_pretrained(classifier, backend="pil")
    pixels = peer([Image.open(path) for path in paths], return_tensors="np")["pixel_values"]
    logits = model.apply(variables, pixel_values=np.moveaxis(pixels, 1, -1)).logits
    expected = np.asarray(jax.nn.softmax(logits, axis=-1))
    assert expected.max(axis=-1).min() > 0.35  # not all the same
    for path, row, shares in zip(paths, rows, expected, strict=True):
        assert row["image"] == path
        assert list(row["scores"]) == [SHOWN[i] for i in np.argsort(-shares)]
        np.testing.assert_allclose([*row["scores"].values()], np.sort(shares)[::-1], atol=1e-5)
    assert plain[0] == paths[0]
    best = max(rows[0]["scores"].items(), key=lambda item: item[1])
    assert plain[1] == f"  {best[1]:.4f}\t{best[0]}"
    assert len(plain) == 9


def test_what_cannot_be_classified(classifier, tmp_path, capsys):
    def refused(*argv):
        assert main(["classify", *map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    picture(0).save(good := tmp_path / "good.png")
    (bad := tmp_path / "bad.png").write_bytes(good.read_bytes()[:200])
    error = refused(classifier, good, bad, tmp_path / "none.png")
    assert "2 problems" in error
    assert "bad.png: the file is broken" in error
    assert "none.png: [Errno 2]" in error
    assert "good.png" not in error
    assert "no pictures; write them" in refused(classifier)
    assert "top=0 must be" in refused(classifier, good, "--top", "0")
    model, variables = fmjax.load(classifier)
    without = fmjax.save(tmp_path / "without", model, variables)
    assert "has no preprocessor_config.json" in refused(without, good)
    for change, words in (
        ({"image_mean": [0.5], "image_std": [0.5]}, "of 3 channels, and its"),
        ({"image_processor_type": "DetrImageProcessor"}, "pads pictures"),
    ):
        data = {"image_processor_type": "ViTImageProcessor", "size": 8, **change}
        parse_image_processor(data).save_pretrained(without)
        assert words in refused(without, good)
    body, variables = fmjax.load(classifier, head="model")
    fmjax.save(without, body, variables, load_image_processor(classifier))
    assert "has the head 'model'" in refused(without, good)


def test_a_folder_is_read_as_the_checkpoint_says(classifier, tmp_path):
    for place, (split, name) in enumerate(
        (split, name) for split in ("train", "val", "test") for name in "ab"
    ):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        picture(place, (11 + place, 17)).save(folder / "0.png")
    settings = recipe.Settings(output=tmp_path, data=str(tmp_path), model=str(classifier))
    examples = recipe.load_images(settings)
    processor = load_image_processor(classifier)
    np.testing.assert_array_equal(
        examples["val"].images,
        processor.batch([tmp_path / "val" / name / "0.png" for name in "ab"])["pixel_values"],
    )
    mean, std = recipe.normalisation(settings.model, examples["train"].images)
    np.testing.assert_allclose(mean, [0.3, 0.4, 0.5])
    np.testing.assert_allclose(std, [0.01, 0.02, 0.03])
    assert recipe.processor_left(settings, (8, 8, 3), mean, std) == processor
    # Of another size, as `resized` makes them: what is left says nearly the same.
    other = recipe.Settings(
        output=tmp_path, data=str(tmp_path), model=str(classifier), image_size=6
    )
    images = recipe.load_images(other)["train"].images
    left = recipe.processor_left(other, images.shape[1:], mean, std)
    again = left.batch([tmp_path / "train" / name / "0.png" for name in "ab"])["pixel_values"]
    assert images.shape == again.shape == (2, 6, 6, 3)
    assert np.abs(images.astype(int) - again).mean() < 25  # of noise, whose own spread is 74
    new = recipe.Settings(output=tmp_path, data=str(tmp_path), model="cnn/tiny")
    with pytest.raises(ValueError, match="the pictures have 2 sizes"):
        recipe.load_images(new)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A folder with a tiny detector of four objects, all of which it is told to be sure of."""
    folder = tmp_path_factory.mktemp("detector")
    config = dataclasses.replace(detr.VARIANTS["tiny"], num_queries=4, id2label=NAMES)
    model, variables = fmjax.create("detr", config, head="object_detection", rng=jax.random.key(0))
    variables = jax.tree.map(jax.numpy.asarray, shuffled(variables))
    processor = parse_image_processor(
        {
            "image_processor_type": "DetrImageProcessor",
            "size": {"shortest_edge": 32, "longest_edge": 48},
        }
    )
    return fmjax.save(folder, model, variables, processor)


def test_detect(detector, tmp_path, capsys):
    """The objects that PyTorch finds in the same pictures, which are padded to one size."""
    import torch
    from transformers import AutoImageProcessor, DetrForObjectDetection

    paths = [str(tmp_path / f"{seed}.png") for seed in range(2)]
    pictures = [picture(seed, size) for seed, size in enumerate(((40, 60), (64, 50)))]
    for path, one in zip(paths, pictures, strict=True):
        one.save(path)
    options = ["--threshold", "0.2", "--out", str(tmp_path / "drawn")]
    assert main(["detect", str(detector), *paths, *options, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    processor = AutoImageProcessor.from_pretrained(detector, backend="pil")
    peer = DetrForObjectDetection.from_pretrained(detector).eval()
    with torch.no_grad():
        outputs = peer(**processor(pictures, return_tensors="pt"))
    sizes = [one.size[::-1] for one in pictures]
    expected = processor.post_process_object_detection(outputs, 0.2, target_sizes=sizes)
    assert sum(len(one["scores"]) for one in expected) >= 3
    for path, row, theirs in zip(paths, rows, expected, strict=True):
        assert row["image"] == path
        order = np.argsort(-theirs["scores"].numpy(), kind="stable")
        assert [one["label"] for one in row["objects"]] == [
            NAMES[i] for i in theirs["labels"].numpy()[order]
        ]
        ours = np.array([[one["score"], *one["box"]] for one in row["objects"]])
        both = np.concatenate([theirs["scores"].numpy()[:, None], theirs["boxes"].numpy()], axis=1)
        np.testing.assert_allclose(ours, both[order], atol=0.06)  # corners have one decimal
    for path, one in zip(("0.png", "1.png"), pictures, strict=True):
        with Image.open(tmp_path / "drawn" / path) as shown:
            assert shown.size == one.size
            assert np.any(np.asarray(shown) != np.asarray(one))
    assert main(["detect", str(detector), paths[0], "--threshold", "0.2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == paths[0]
    assert len(lines) == 1 + len(expected[0]["scores"])


def test_what_cannot_be_detected(classifier, detector, tmp_path, capsys):
    picture(0).save(good := tmp_path / "good.png")
    for argv, words in (
        ((detector,), "no pictures"),
        ((detector, good, "--threshold", "2"), "threshold=2.0 must be"),
        ((classifier, good), "has the head 'image_classification'"),
        ((detector, good, good, "--out", tmp_path), "would be drawn as ['good.png']"),
    ):
        assert main(["detect", *map(str, argv)]) == 2
        said = capsys.readouterr()
        assert words in said.err
        assert not said.out
