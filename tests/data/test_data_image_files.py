"""Pictures decoded as they are needed: which, in what order, by whom, and from where on."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from fmjax.data.batches import batches
from fmjax.data.image_files import find_images, image_batches
from fmjax.data.image_processor import ImageProcessor, Size
from fmjax.data.images import read_images

PROCESSOR = ImageProcessor(size=Size(5, 7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven pictures of different sizes and formats in three classes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(11):
        place = root / "cat dog owl".split()[number % 3]
        place.mkdir(exist_ok=True)
        size = rng.integers(4, 20, 2)
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        image.save(place / f"{number}.{('png', 'jpg', 'bmp')[number % 3]}")
    return root


def check_same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert mine[name].dtype == value.dtype
            np.testing.assert_array_equal(mine[name], value)


def test_batches_are_those_of_pictures_in_memory(folder):
    files = find_images(folder)
    examples = read_images(folder, read=PROCESSOR.pixels)
    assert files.label_names == examples.label_names == ("cat", "dog", "owl")
    options = {"batch_size": 4, "seed": 3, "epochs": 2}
    every = list(image_batches(files, PROCESSOR, **options))
    check_same(every, list(batches(examples.columns(), **options)))
    halves = [
        list(image_batches(files, PROCESSOR, **options, process_index=i, process_count=2))
        for i in (0, 1)
    ]
    for whole, *parts in zip(every, *halves, strict=True):
        for name, value in whole.items():
            for part, half in enumerate(parts):
                np.testing.assert_array_equal(half[name], value[part::2])
    # A process whose rows are padding alone.
    lonely = image_batches(
        files, PROCESSOR, batch_size=10, shuffle=False, epochs=1, process_index=9, process_count=10
    )
    last = list(lonely)[-1]
    assert last["pixel_values"].shape == (1, 5, 7, 3)
    np.testing.assert_array_equal(last["pixel_values"][0], examples.images[10])
    assert last["labels"].tolist() == [examples.labels[10]]
    assert (last["index"].tolist(), last["weight"].tolist()) == ([-1], [0.0])


def test_workers_change_nothing_and_a_position_is_exact(folder):
    """Begun by a thread, continued by two processes, ended by a thread."""
    files = find_images(folder)
    options = {"batch_size": 4, "seed": 3, "epochs": 2}
    expected = list(image_batches(files, PROCESSOR, **options))
    first = image_batches(files, PROCESSOR, **options)
    check_same([next(first)], expected[:1])
    stream = image_batches(files, PROCESSOR, **options, workers=2, prefetch=1)
    stream.set_state(json.loads(json.dumps(first.get_state())))
    check_same([next(stream) for _ in range(3)], expected[1:4])
    state = json.loads(json.dumps(stream.get_state()))  # both processes have made more than that
    stream.close()
    first.set_state(state)
    check_same(list(first), expected[4:])
    other = image_batches(files, ImageProcessor(size=Size(6, 7)), **options)
    with pytest.raises(ValueError, match="another stream"):
        other.set_state(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_files_are_named(folder, tmp_path, workers):
    for name in "ab":
        (tmp_path / name).mkdir()
    whole = next(iter(sorted((folder / "cat").glob("*.png")))).read_bytes()
    for name, content in (("a/0", whole), ("a/1", whole[:70]), ("b/2", b"no"), ("b/3", whole)):
        (tmp_path / f"{name}.png").write_bytes(content)
    stream = image_batches(find_images(tmp_path), PROCESSOR, batch_size=4, workers=workers)
    with pytest.raises(ValueError, match="2 problems") as error:
        next(stream)
    stream.close()
    assert "a/1.png: the file is broken" in str(error.value)
    assert "b/2.png: its 2 bytes are no picture" in str(error.value)


def test_what_cannot_be(folder, tmp_path):
    with pytest.raises(ValueError, match="the folder owl is none of the classes"):
        find_images(folder, label_names=("cat", "dog"))
    with pytest.raises(ValueError, match="there are no pictures"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match=r"batch_size=0 must be.*workers=-1 must be"):
        image_batches(find_images(folder), PROCESSOR, batch_size=0, workers=-1)
    none = dataclasses.replace(find_images(folder), names=(), labels=np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="there are no examples"):
        image_batches(none, PROCESSOR, batch_size=2)
