"""Pictures: folders of files, channels, batches, and the two sets of gray ones."""

import gzip

import numpy as np
import pytest
from PIL import Image

from fmjax.data import assets
from fmjax.data.batches import batches
from fmjax.data.decoding import decode
from fmjax.data.images import ImageExamples, read_images, resized
from fmjax.data.mnist import load_digits, load_fashion, read_csv, read_idx


def pictures(count=7, size=(4, 6), channels=3):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *size, channels), dtype=np.uint8)
    return ImageExamples(images, (np.arange(count) % 2).astype(np.int32), ("a", "b"))


def test_each_picture_comes_once_an_epoch_and_padding_repeats_some():
    examples = pictures()
    stream = batches(examples.columns(), batch_size=4, seed=1, epochs=2)
    assert stream.shapes == [(4,)]
    assert stream.batches_per_epoch == 2
    every = list(stream)
    assert len(every) == 4
    for epoch in (every[:2], every[2:]):
        index = np.concatenate([batch["index"] for batch in epoch])
        assert sorted(index) == [-1, *range(7)]
        for batch in epoch:
            assert batch["pixel_values"].dtype == np.uint8
            for row, number in enumerate(batch["index"]):
                own = examples.images[batch["index"][batch["index"] >= 0]]
                expected = examples.images[number] if number >= 0 else own
                same = (batch["pixel_values"][row] == expected).reshape(-1, 4 * 6 * 3).all(axis=-1)
                assert same.any()
                assert batch["weight"][row] == (number >= 0)
    orders = [tuple(np.concatenate([b["index"] for b in part])) for part in (every[:2], every[2:])]
    assert orders[0] != orders[1]
    again = batches(examples.columns(), batch_size=4, seed=1, epochs=2)
    next(again)
    state = again.get_state()
    resumed = batches(examples.columns(), batch_size=4, seed=1, epochs=2)
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed)["index"], every[1]["index"])
    other = batches(pictures(6).columns(), batch_size=4, seed=1)
    with pytest.raises(ValueError, match="another stream"):
        other.set_state(state)
    with pytest.raises(ValueError, match="for examples whose lengths vary"):
        batches(examples.columns(), batch_size=4, buckets=[4])


def test_channels_are_pillows():
    examples = pictures()
    gray = examples.with_channels(1)
    for ours, colours in zip(gray.images, examples.images, strict=True):
        np.testing.assert_array_equal(
            ours[..., 0], np.asarray(Image.fromarray(colours).convert("L"))
        )
    back = gray.with_channels(3)
    np.testing.assert_array_equal(back.images, np.repeat(gray.images, 3, axis=-1))
    assert examples.with_channels(3) is examples
    with pytest.raises(ValueError, match="3 channels do not become ones of 4"):
        examples.with_channels(4)


def test_a_folder_is_read_in_order(tmp_path):
    examples = pictures()
    for number, image in enumerate(examples.images):
        folder = tmp_path / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    read = read_images(tmp_path)
    assert read.label_names == ("a", "b")
    order = [0, 2, 4, 6, 1, 3, 5]
    np.testing.assert_array_equal(read.images, examples.images[order])
    np.testing.assert_array_equal(read.labels, examples.labels[order])
    small = read_images(tmp_path, read=lambda path: resized(decode(path), (2, 2)))
    assert small.images.shape == (7, 2, 2, 3)
    # Of a picture 4 x 6 the middle 4 x 4.
    whole = Image.fromarray(examples.images[0])
    middle = whole.resize((2, 2), Image.Resampling.BICUBIC, box=(1, 0, 5, 4))
    np.testing.assert_array_equal(small.images[0], np.asarray(middle))


def test_hidden_and_empty_folders_are_no_classes(tmp_path):
    picture = Image.fromarray(np.zeros((2, 2, 3), np.uint8))
    for name in ("cat", "dog", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "1.png")
    (tmp_path / "cat" / "._1.png").write_bytes(b"of another system")
    read = read_images(tmp_path)
    assert (read.label_names, read.labels.tolist()) == (("cat", "dog"), [0, 1])
    (tmp_path / "__MACOSX").mkdir()
    with pytest.raises(ValueError, match="1 problem\n  the folder __MACOSX holds no pictures"):
        read_images(tmp_path)
    assert len(read_images(tmp_path, label_names=("cat", "dog", "__MACOSX"))) == 2


def test_transparency_is_white_and_cameras_are_turned(tmp_path):
    (tmp_path / "a").mkdir()
    clear = np.zeros((2, 3, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    Image.fromarray(clear).save(tmp_path / "a" / "0.png")
    turned = Image.fromarray(np.zeros((3, 2, 3), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "a" / "1.png", exif=exif)
    read = read_images(tmp_path)
    assert read.images.shape == (2, 2, 3, 3)
    assert read.images[0, 0, 0].tolist() == [10, 20, 30]
    assert (read.images[0, 1] == 255).all()


def test_what_is_no_picture_is_listed(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there are no pictures"):
        read_images(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "a" / "1.jpg").write_text("text")
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "b" / "2.png")
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(tmp_path / "b" / "3.png")
    with pytest.raises(ValueError, match="2 sizes") as error:
        read_images(tmp_path, label_names=("a", "c"))
    for words in ("a/0.png", "a/1.jpg", "the folder b is none of the classes"):
        assert words in str(error.value)


def test_examples_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be uint8") as error:
        ImageExamples(np.zeros((2, 3, 3)), np.array([0, 5]), ("a", "b"))
    assert "1 labels are none of the 2 classes, the first is 5 of image 1" in str(error.value)


def test_idx_files_of_another_form_are_refused(tmp_path):
    path = tmp_path / "images.gz"
    header = np.array([0x803, 2, 3, 3], ">u4").tobytes()
    pixels = np.arange(18, dtype=np.uint8)
    path.write_bytes(gzip.compress(header + pixels.tobytes()))
    np.testing.assert_array_equal(read_idx(path, (2, 3, 3)), pixels.reshape(2, 3, 3))
    for content in (header + pixels.tobytes()[:-1], header + bytes(19), b"\0\0\x08\1" + bytes(30)):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=r"an IDX file of bytes \(2, 3, 3\)"):
            read_idx(path, (2, 3, 3))


def test_tables_of_another_form_are_refused(tmp_path):
    path = tmp_path / "digits.csv.gz"
    rows = np.zeros((2, 785), int)
    rows[1, 783:] = (255, 9)
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode()))
    images, labels = read_csv(path, 2)
    assert images.shape == (2, 28, 28, 1)
    assert images[1, 27, 27] == 255
    assert labels.tolist() == [0, 9]
    rows[0, 0] = 256
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode()))
    with pytest.raises(ValueError, match="2 rows of 784 bytes and a digit"):
        read_csv(path, 2)


@pytest.mark.asset
@pytest.mark.parametrize(
    ("asset", "load", "sizes"),
    [
        pytest.param(
            *("fashion-mnist", load_fashion, (54_000, 6_000, 10_000)), marks=pytest.mark.slow
        ),
        ("mnist-5k", load_digits, (4_029, 501, 470)),
    ],
)
def test_the_sets_are_whole(asset, load, sizes):
    if not assets.available(asset):
        pytest.skip(f"the asset {asset} is not cached: fmjax.data.fetch({asset!r})")
    splits = [load(split) for split in ("train", "val", "test")]
    assert tuple(map(len, splits)) == sizes
    labels = np.concatenate([part.labels for part in splits])
    assert (np.bincount(labels) == sum(sizes) // 10).all()
    for part in splits:
        assert part.images.shape[1:] == (28, 28, 1)
        assert len(part.label_names) == 10
    with pytest.raises(ValueError, match="no split 'dev'"):
        load("dev")
