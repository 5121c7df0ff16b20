"""Bytes into losses and predictions, normalised and augmented."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmjax
from fmjax.data.augment import each_image, flip, mixup
from fmjax.data.image_processor import parse_image_processor
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.feature_extraction import embed
from fmjax.tasks.pixels import augmented, averaged, mirrored, normalised, ten_crops


@pytest.fixture(scope="module")
def classifier():
    return fmjax.create(
        "cnn", "tiny", head="image_classification", num_labels=3, rng=jax.random.key(0)
    )


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "pixel_values": rng.integers(0, 256, (4, 8, 8, 1), dtype=np.uint8),
        "labels": np.array([0, 1, 2, 0]),
        "weight": np.array([1, 1, 1, 0], np.float32),
    }


def test_bytes_and_floats_are_normalised_alike(classifier, batch):
    model, variables = classifier
    mean, std = [0.3], [0.2]
    loss = task.loss(model, train=False)
    pixels = (batch["pixel_values"] / 255 - 0.3) / 0.2
    expected, _ = loss(variables, {**batch, "pixel_values": pixels.astype(np.float32)}, None)
    ours, _ = normalised(loss, mean, std)(variables, batch, None)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    floats = {**batch, "pixel_values": (batch["pixel_values"] / 255).astype(np.float32)}
    np.testing.assert_allclose(
        normalised(loss, mean, std)(variables, floats, None)[0], ours, rtol=1e-6
    )
    predict = normalised(task.predict(model), mean, std)
    assert predict(variables, batch).shape == (4, 3)
    with pytest.raises(ValueError, match="std is"):
        normalised(loss, [0.5], [0.0])


def test_bytes_that_nobody_has_normalised_are_refused(classifier, batch):
    model, variables = classifier
    for function in (task.predict(model), jax.jit(task.predict(model))):
        with pytest.raises(ValueError, match=r"are uint8; .* fmjax.tasks.pixels.normalised"):
            function(variables, batch)
    integers = {**batch, "pixel_values": batch["pixel_values"].astype(np.int32)}
    with pytest.raises(ValueError, match="are int32; they must be uint8, or floats from 0 to 1"):
        normalised(task.predict(model), [0.5], [0.5])(variables, integers)


def test_nothing_done_is_the_loss_itself(classifier, batch):
    model, variables = classifier
    loss = normalised(task.loss(model, train=False), [0.5], [0.5])
    expected, _ = loss(variables, batch, None)
    never = each_image(flip(0.0))
    for functions in ((), (never,)):
        ours, _ = augmented(loss, *functions)(variables, batch, jax.random.key(0))
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    turned = {**batch, "pixel_values": batch["pixel_values"][:, :, ::-1]}
    expected, _ = loss(variables, turned, None)
    ours, _ = augmented(loss, each_image(flip(1.0)))(variables, batch, jax.random.key(0))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="give it a key"):
        augmented(loss)(variables, batch, None)


def test_blended_labels_are_shares_of_cross_entropies(classifier, batch):
    model, variables = classifier
    loss = task.loss(model, train=False)
    batch = {**batch, "pixel_values": jnp.asarray(batch["pixel_values"] / 255, jnp.float32)}
    blended = mixup(0.5, 3)(jax.random.key(3), batch)
    value, aux = loss(variables, blended, None)
    logits = model.apply(variables, blended["pixel_values"]).logits
    each = -np.sum(np.asarray(blended["labels"]) * np.asarray(jax.nn.log_softmax(logits)), axis=1)
    np.testing.assert_allclose(value, each[:3].mean(), rtol=1e-5)
    right = np.argmax(logits, 1)[:3] == np.argmax(blended["labels"], 1)[:3]
    np.testing.assert_allclose(aux.metrics["accuracy"].value, right.mean(), rtol=1e-6)


def test_indices_and_their_shares_have_one_loss(classifier, batch):
    model, variables = classifier
    loss = task.loss(model, train=False, label_smoothing=0.1)
    batch["pixel_values"] = batch["pixel_values"] / np.float32(255)
    shares = {**batch, "labels": np.eye(3, dtype=np.float32)[batch["labels"]]}
    np.testing.assert_allclose(
        loss(variables, batch, None)[0], loss(variables, shares, None)[0], rtol=1e-6
    )


@pytest.mark.parametrize("pooling", ["mean", "max", "pooler"])
def test_pictures_have_features(pooling, batch):
    """Of convnets the mean over the grid, of transformers that over the tokens."""
    batch = {k: v for k, v in batch.items() if k == "pixel_values"}
    batch["pixel_values"] = np.repeat(batch["pixel_values"], 3, axis=-1) / np.float32(255)
    for family in ("resnet", "vit"):
        model, variables = fmjax.create(family, "tiny", rng=jax.random.key(0))
        vectors = embed(model, pooling=pooling)(variables, batch)
        out = model.apply(variables, batch["pixel_values"])
        flat = out.last_hidden_state.reshape(4, -1, vectors.shape[-1])
        expected = {"mean": flat.mean(1), "max": flat.max(1), "pooler": out.pooler_output}
        np.testing.assert_allclose(vectors, expected[pooling], atol=1e-5)


def test_a_processors_second_part_on_the_device():
    """What is left of the work after `batch` is what a call does, padding included."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((9, 7), (5, 8))]
    for data in (
        {
            "image_processor_type": "EfficientNetImageProcessor", "size": 6, "rescale_offset": True,
            "rescale_factor": 1 / 127.5, "image_std": [0.2, 0.3, 0.4],
        },
        {"image_processor_type": "DetrImageProcessor", "do_resize": False},
    ):  # fmt: skip
        processor = parse_image_processor(data)
        fn = normalised(lambda variables, batch: batch["pixel_values"], *processor.normalisation)
        # One rounding more or less, of numbers that are divided by std.
        np.testing.assert_allclose(
            fn({}, processor.batch(pictures)),
            processor(pictures)["pixel_values"],
            atol=1.2e-7 / min(processor.normalisation[1]),
        )


def test_means_over_views(classifier, batch):
    """By hand, from crops that are written out."""
    model, variables = classifier
    x = batch["pixel_values"] = np.random.default_rng(1).integers(0, 256, (4, 9, 10, 1), np.uint8)
    parts = [x[:, :6, :5], x[:, :6, 5:], x[:, 3:, :5], x[:, 3:, 5:], x[:, 1:7, 2:7]]
    for views, seen in (
        (ten_crops(6, 5), [*parts, *(part[:, :, ::-1] for part in parts)]),
        (mirrored(), [x, x[:, :, ::-1]]),
    ):
        predict = task.predict(model, through=lambda logits: averaged(logits, views))  # noqa: B023
        ours = jax.jit(normalised(predict, [0.5], [0.1]))(variables, batch)
        logits = [
            model.apply(variables, pixel_values=(part / np.float32(255) - 0.5) / 0.1).logits
            for part in seen
        ]
        np.testing.assert_allclose(ours, jax.nn.softmax(np.mean(logits, axis=0)), atol=1e-5)
        once = normalised(task.predict(model), [0.5], [0.1])(variables, batch)
        assert np.abs(ours - once).max() > 1e-4
    with pytest.raises(ValueError, match="9 x 10 pixels have no part of 6 x 11"):
        ten_crops(6, 11)[0](x)
