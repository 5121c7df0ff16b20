"""Views of texts: what stays, what goes, and in which order."""

import jax
import numpy as np
import pytest

from fmjax.tasks.masking import Masking
from fmjax.tasks.text_views import dropped_view, masked_view

IDS = np.array([[2, 11, 12, 13, 14, 15, 3, 0], [2, 21, 22, 3, 0, 0, 0, 0]], np.int32)
BATCH = {
    "input_ids": IDS,
    "attention_mask": (IDS > 0).astype(np.int32),
    "token_type_ids": (IDS > 12).astype(np.int32),
    "labels": np.array([0, 1]),
}


def seen(share, key):
    return dropped_view(share, pad_id=0, special_ids=(2, 3))(jax.random.key(key), BATCH)


def test_dropped():
    lengths = []
    for key in range(20):
        found = {name: np.asarray(value) for name, value in seen(0.4, key).items()}
        for row, ids in enumerate(found["input_ids"]):
            left = ids[found["attention_mask"][row] == 1].tolist()
            assert left == [i for i in IDS[row] if i in left]  # in their order
            assert left[0] == 2
            assert left[-1] == 3
            assert not ids[len(left) :].any()
            types = found["token_type_ids"][row, : len(left)]
            assert types.tolist() == [int(i > 12) for i in left]
            lengths.append(len(left) - 2)
        np.testing.assert_array_equal(found["labels"], BATCH["labels"])
    # Of 7 words in 20 draws 84 are expected, with a deviation of 6.
    assert 60 < sum(lengths) < 108


def test_limits_of_dropping():
    np.testing.assert_array_equal(seen(0.0, 0)["input_ids"], IDS)
    nothing = np.asarray(seen(1.0, 0)["input_ids"])
    np.testing.assert_array_equal(nothing[:, :3], [[2, 3, 0]] * 2)
    bare = dropped_view(1.0, pad_id=0)(jax.random.key(0), {"input_ids": IDS})
    np.testing.assert_array_equal(bare["attention_mask"].sum(axis=1), [1, 1])
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        dropped_view(1.5, pad_id=0)


def test_masked():
    masking = Masking(
        mask_token_id=4, vocab_size=30, special_ids=(0, 2, 3), probability=0.4, mask_share=1.0,
        random_share=0.0,
    )  # fmt: skip
    found = np.asarray(masked_view(masking)(jax.random.key(0), BATCH)["input_ids"])
    changed = found != IDS
    assert (found[changed] == 4).all()
    np.testing.assert_array_equal(changed.sum(axis=1), [2, 1])
