"""Pictures with texts: what is refused, and what is selected."""

import numpy as np
import pytest

from fmjax.data import assets
from fmjax.data.captions import Captions, load_emoji_captions


def test_examples_are_checked_and_selected():
    images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    whole = Captions(images, ["a", "b", "c"], np.array([0, 1, 1]), ("x", "y"))
    part = whole.select([2, 0])
    assert (len(part), part.texts) == (2, ["c", "a"])
    np.testing.assert_array_equal(part.images, images[[2, 0]])
    np.testing.assert_array_equal(part.labels, [1, 0])
    with pytest.raises(ValueError, match="must be uint8") as error:
        Captions(images / 2, ["a", " "], np.array([0, 5]), ("x", "y"))
    for said in (
        "2 texts for 3 images", "1 texts are empty, the first of image 1", "2 labels for 3 images",
        "not all of the 2 classes",
    ):  # fmt: skip
        assert said in str(error.value)


@pytest.mark.asset
@pytest.mark.slow
def test_emoji_have_names_and_categories():
    if not assets.available("emoji"):
        pytest.skip("the asset emoji is not cached: fmjax.data.fetch('emoji')")
    parts = [load_emoji_captions(split, size=16) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == 1_911 - 5
    one = parts[0].texts.index("cook")
    assert parts[0].labels is not None
    assert parts[0].label_names[parts[0].labels[one]] == "People & Body"
    with pytest.raises(ValueError, match="no split 'dev'"):
        load_emoji_captions("dev", size=16)
