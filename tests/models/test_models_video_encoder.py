"""Videos: any image family over frames, pooled over time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity import assert_near, shuffled

import fmjax
from fmjax.data.augment import each_clip, flip, shift_crop
from fmjax.models import video_encoder as family
from fmjax.models import vit
from fmjax.tasks import sequence_classification as task
from fmjax.train import gradient, init_state, jit_step, make_train_step
from fmjax.tree import flatten

TINY = family.VARIANTS["tiny"]
CONVNET = family.VARIANTS["tiny-cnn"]


def videos(config, *, batch=2, frames=3, seed=0):
    shape = (batch, frames, 8, 8, config.num_channels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_frames_are_pooled_as_by_hand(pooling):
    config = dataclasses.replace(CONVNET, pooling=pooling)
    model, variables = fmjax.create(
        "video-encoder", config, head="video_classification", rng=jax.random.key(0)
    )
    variables = shuffled(variables)
    pixels = videos(config)
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    logits = jax.jit(model.apply)(variables, pixels, mask).logits
    image_model = family.cnn.Model(config.encoder)
    image_variables = {"params": variables["params"]["encoder"]}
    by_frame = [image_model.apply(image_variables, pixels[:, i]).pooler_output for i in range(3)]
    vectors = np.stack(by_frame, axis=1)
    of = np.mean if pooling == "mean" else np.max
    pooled = np.stack([of(vectors[0], axis=0), of(vectors[1, :2], axis=0)])
    head = variables["params"]["head"]
    assert_near(logits, pooled @ head["kernel"] + head["bias"], "logits")


@pytest.mark.slow
def test_the_transformer_over_time_is_a_vit_over_frames():
    """Its class token, positions and blocks; order counts, and frames that fill up do not."""
    model, variables = fmjax.create("video-encoder", TINY, rng=jax.random.key(0))
    variables = shuffled(variables, spread=0.1)
    pixels = videos(TINY)
    run = jax.jit(lambda v, x, m: model.apply(v, x, m).pooler_output)
    full = np.ones((2, 3), np.int32)
    out = run(variables, pixels, full)
    assert np.abs(run(variables, pixels[:, ::-1], full) - out).max() > 1e-3
    short = np.array([[1, 1, 0], [1, 1, 0]])
    changed = pixels.copy()
    changed[:, 2] = 7.0
    cut = run(variables, pixels[:, :2], short[:, :2])
    assert_near(run(variables, changed, short), cut, "masked")
    # The same blocks over the same vectors, within ViT itself.
    params = variables["params"]
    image = {"params": params["encoder"]}
    frames = vit.Model(TINY.encoder).apply(image, pixels.reshape(-1, 8, 8, 3)).last_hidden_state
    hidden = np.concatenate(
        [np.broadcast_to(params["cls"], (2, 1, 16)), frames[:, 0].reshape(2, 3, 16)], axis=1
    )
    hidden = jnp.asarray(hidden + params["position"])
    for i in range(TINY.num_hidden_layers):
        block = vit.Block(TINY, False, False, False)
        hidden, _ = block.apply({"params": params[f"layers_{i}"]}, hidden, None, i, None)
    mean, variance = hidden.mean(-1, keepdims=True), hidden.var(-1, keepdims=True)
    norm = params["final_norm"]
    normed = (hidden - mean) / np.sqrt(variance + TINY.layer_norm_eps)
    assert_near(out, (normed * norm["scale"] + norm["bias"])[:, 0], "pooled")


@pytest.mark.parametrize("config", [TINY, CONVNET], ids=["transformer", "mean"])
def test_files_hold_everything(config, tmp_path):
    model, variables = fmjax.create(
        "video-encoder", config, head="video_classification", num_labels=("left", "right"),
        rng=jax.random.key(0),
    )  # fmt: skip
    fmjax.save(tmp_path, model, variables)
    again, read = fmjax.load(tmp_path)
    assert again == model
    for path, leaf in flatten(read).items():
        np.testing.assert_array_equal(leaf, flatten(variables)[path])


@pytest.mark.slow
def test_a_clip_classifier_learns_which_way_things_move():
    """What no single frame shows."""
    rng = np.random.default_rng(0)
    count = 64
    labels = np.arange(count) % 2
    clips = np.zeros((count, 3, 8, 8, 3), np.float32)
    for clip, label in zip(clips, labels, strict=True):
        row, column = rng.integers(0, 6), rng.integers(2, 4)
        for time in range(3):
            place = column + (time - 1) * (1 if label else -1) * 2
            clip[time, row : row + 2, place : place + 2] = 1.0
    config = dataclasses.replace(TINY, id2label=("left", "right"))
    model, variables = fmjax.create(
        "video-encoder", config, head="video_classification", rng=jax.random.key(0)
    )
    # From larger weights than published, whose first steps show little at these sizes.
    variables = jax.tree.map(jnp.float32, shuffled(variables))
    tx = optax.adam(3e-3)
    step = jit_step(make_train_step(gradient(task.loss(model)), tx))
    state = init_state(variables, tx, jax.random.key(1))
    batch = {"pixel_values": clips, "labels": labels, "weight": np.ones(count, np.float32)}
    for _ in range(100):
        state, metrics = step(state, batch)
    assert float(metrics["accuracy"].value) > 0.95


def test_clips_are_augmented_frame_by_frame_alike():
    pixels = np.random.default_rng(0).random((4, 3, 8, 8, 3)).astype(np.float32)
    still = np.repeat(pixels[:, :1], 3, axis=1)
    augment = each_clip(flip(), shift_crop(2))
    out = np.asarray(augment(jax.random.key(0), {"pixel_values": still})["pixel_values"])
    np.testing.assert_array_equal(out, np.repeat(out[:, :1], 3, axis=1))
    assert not np.array_equal(out, still)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="reads no pixel_values") as error:
        family.Config(fmjax.models.family_of("bert").Config(), pooling="sum", num_frames=0)
    assert "pooling='sum'" in str(error.value)
    assert "num_frames=0" in str(error.value)
    model, variables = fmjax.create("video-encoder", "tiny", rng=jax.random.key(0))
    with pytest.raises(ValueError, match=r"must be \[B, T, X, Y, C\]"):
        model.apply(variables, np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match="4 frames are more than num_frames=3"):
        model.apply(variables, np.zeros((1, 4, 8, 8, 3)))
    with pytest.raises(ValueError, match="frame_mask has the shape"):
        model.apply(variables, np.zeros((1, 3, 8, 8, 3)), np.ones((1, 2)))
