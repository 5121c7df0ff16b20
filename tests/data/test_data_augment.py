"""Augmentation: what each function may do to a picture, and that it does it at its rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.data.augment import (
    cutmix,
    each_image,
    erase,
    flip,
    flip_segments,
    mixup,
    resized_crop,
    shift_crop,
)


def batch_of(count=64, size=(8, 6), channels=2):
    rng = np.random.default_rng(0)
    return {
        "pixel_values": rng.uniform(0.1, 1, (count, *size, channels)).astype(np.float32),
        "labels": rng.integers(0, 3, count),
        "weight": np.ones(count, np.float32),
    }


def apply(function, batch, seed=0):
    return jax.jit(function)(jax.random.key(seed), batch)


def test_flips_are_the_share_of_the_pictures():
    batch = batch_of(400)
    out = np.asarray(apply(each_image(flip(0.25)), batch)["pixel_values"])
    same = (out == batch["pixel_values"]).all(axis=(1, 2, 3))
    turned = (out == batch["pixel_values"][:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same | turned).all()
    # Five standard deviations of a binomial share.
    assert abs(turned.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 400)


def test_labels_of_pixels_are_turned_with_them():
    batch = batch_of(64)
    batch["labels"] = np.argmax(batch["pixel_values"], axis=-1)
    out = apply(flip_segments(0.5), batch)
    np.testing.assert_array_equal(out["labels"], np.argmax(out["pixel_values"], axis=-1))
    turned = (np.asarray(out["labels"]) != batch["labels"]).any(axis=(1, 2))
    assert 16 < turned.sum() < 48


def test_crops_are_shifts_with_zeros_behind():
    batch = batch_of(300)
    out = np.asarray(apply(each_image(shift_crop(2)), batch)["pixel_values"])
    padded = np.pad(batch["pixel_values"], ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for image, wide in zip(out, padded, strict=True):
        places = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if (wide[row : row + 8, column : column + 6] == image).all()
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 25


def test_resized_crops_are_parts_of_the_picture():
    """A picture whose pixels say where they are: the part's size, place and order."""
    rows, columns = np.meshgrid(np.arange(16.0), np.arange(12.0), indexing="ij")
    picture = jnp.asarray(np.stack([rows, columns], axis=-1), jnp.float32)
    crop = resized_crop(scale=(0.2, 0.5))
    out = np.asarray(
        jax.vmap(lambda key: crop(key, picture))(jax.random.split(jax.random.key(0), 200))
    )
    assert out.shape == (200, 16, 12, 2)
    inner = out[:, 2:-2, 2:-2]  # at the border the interpolation repeats pixels
    assert (np.diff(inner[..., 0], axis=1) > 0).all()
    assert (np.diff(inner[..., 1], axis=2) > 0).all()
    height = np.diff(inner[:, :, 0, 0], axis=1).mean(axis=1) * 16
    width = np.diff(inner[:, 0, :, 1], axis=1).mean(axis=1) * 12
    share = height * width / (16 * 12)
    assert share.min() > 0.15  # some parts are cut at the picture's border
    assert share.max() < 0.55
    ratio = width / height
    assert ratio.min() > 0.6
    assert ratio.max() < 1.5
    whole = resized_crop(scale=(1.0, 1.0), ratio=(0.75, 0.75))  # the picture's own
    np.testing.assert_allclose(whole(jax.random.key(1), picture), picture, atol=1e-4)


def test_erased_are_rectangles():
    batch = batch_of(400, size=(20, 20))
    out = np.asarray(apply(each_image(erase(0.5, area=(0.1, 0.3))), batch)["pixel_values"])
    gone = (out == 0).all(axis=-1)
    np.testing.assert_array_equal(out[~gone], batch["pixel_values"][~gone])
    hit = gone.any(axis=(1, 2))
    assert abs(hit.mean() - 0.5) < 5 * np.sqrt(0.25 / 400)
    for mask in gone[hit]:
        inside = np.ix_(mask.any(axis=1), mask.any(axis=0))
        assert mask[inside].all()
        assert mask.sum() == mask[inside].size
        assert 0.05 < mask.mean() < 0.35


@pytest.mark.parametrize("make", [mixup, cutmix])
def test_blends_are_of_two_examples_in_the_labels_shares(make):
    batch = batch_of(8, size=(10, 10))
    batch["weight"][6:] = 0
    ones = np.eye(3)[batch["labels"]]
    shares = []
    for seed in range(5):
        out = apply(make(1.0, 3), batch, seed)
        np.testing.assert_allclose(np.asarray(out["labels"]).sum(axis=1), 1, atol=1e-6)
        for i in range(6):
            other = (i + 1) % 6
            mine, theirs = batch["pixel_values"][i], batch["pixel_values"][other]
            picture = np.asarray(out["pixel_values"][i])
            if make is mixup:
                share = np.vdot(picture - theirs, mine - theirs) / np.vdot(
                    mine - theirs, mine - theirs
                )
                np.testing.assert_allclose(picture, share * mine + (1 - share) * theirs, atol=1e-5)
            else:
                foreign = (picture == theirs).all(axis=-1)
                assert ((picture == mine).all(axis=-1) | foreign).all()
                share = 1 - foreign.mean()
            expected = share * ones[i] + (1 - share) * ones[other]
            np.testing.assert_allclose(out["labels"][i], expected, atol=1e-4)
            shares.append(share)
    assert np.std(shares) > 0.05
    unweighed = {name: value[:6] for name, value in batch.items() if name != "weight"}
    np.testing.assert_array_equal(apply(make(1.0, 3), unweighed, 0)["weight"], np.ones(6))
    again = apply(make(1.0, 3), {**batch, "labels": ones}, 0)  # shares stay shares
    np.testing.assert_allclose(again["labels"], apply(make(1.0, 3), batch, 0)["labels"])


@pytest.mark.parametrize("make", [mixup, cutmix])
def test_blends_pass_over_rows_without_a_label(make):
    batch = batch_of(4, size=(10, 10)) | {"labels": np.array([0, -100, 2, 1])}
    out = apply(make(1.0, 3), batch)
    np.testing.assert_array_equal(out["weight"], [1, 0, 1, 1])
    rest = apply(make(1.0, 3), {name: value[[0, 2, 3]] for name, value in batch.items()})
    for name in ("labels", "pixel_values"):  # as if it were not there
        np.testing.assert_allclose(np.asarray(out[name])[[0, 2, 3]], rest[name], atol=1e-6)
    with pytest.raises(ValueError, match=r"must be class indices \[B\] or shares \[B, 3\]"):
        apply(make(1.0, 3), batch | {"labels": np.zeros((4, 10, 10), int)})
    out = apply(make(1.0, 3), batch | {"labels": np.array([0, 3, 2, 1])})
    assert np.isnan(out["labels"]).any(axis=1).tolist() == [True, True, False, False]


def test_bytes_are_refused():
    batch = batch_of(2)
    batch["pixel_values"] = (batch["pixel_values"] * 255).astype(np.uint8)
    for function in (each_image(flip()), mixup(1.0, 3)):
        with pytest.raises(ValueError, match=r"are uint8; .* fmjax.tasks.pixels.augmented"):
            apply(function, batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flip(1.5), "share is 1.5"),
        (lambda: shift_crop(-1), "padding is -1"),
        (lambda: resized_crop(scale=(0.5, 0.1)), r"scale is \(0.5, 0.1\)"),
        (lambda: resized_crop(ratio=(0.0, 1.0)), r"ratio is \(0.0, 1.0\)"),
        (lambda: erase(area=(0.5, 2)), r"area is \(0.5, 2\)"),
        (lambda: mixup(0, 3), "alpha is 0"),
        (lambda: cutmix(-1, 3), "alpha is -1"),
    ],
)
def test_strengths_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
