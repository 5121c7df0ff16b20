"""Contrast of pictures and texts: against its formulas, on any number of devices, zero-shot."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import PartitionSpec as P

import fmjax
from fmjax.models import clip
from fmjax.tasks import image_text as task
from fmjax.tasks.contrast import sigmoid_contrast, softmax_contrast
from fmjax.train import (
    all_reduce,
    bounded,
    gradient,
    init_state,
    jit_step,
    make_mesh,
    make_train_step,
    pmap_step,
)

B = 8


def vectors(rows, seed=0):
    x = np.random.default_rng(seed).normal(size=(rows, 6)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def make_batch(rows=B, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 90, (rows, 6)).astype(np.int32)
    ids[:, -1] = 98
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "pixel_values": rng.normal(size=(rows, 8, 8, 3)).astype(np.float32),
        "weight": np.array([1, 2, 0, 1, 0.5, 1, 1, 0], np.float32)[:rows],
    }


def test_objectives_equal_their_formulas():
    images, texts = map(torch.tensor, (vectors(5), vectors(5, seed=1)))
    scores, target = 7.0 * images @ texts.T, torch.arange(5)
    entropy = torch.nn.functional.cross_entropy
    ones = jnp.ones(5)
    ours = softmax_contrast(
        images.numpy(), texts.numpy()[:, None], scale=7.0, weights=ones, symmetric=True
    )
    expected = (entropy(scores, target) + entropy(scores.T, target)) / 2
    np.testing.assert_allclose(ours.loss, expected, rtol=1e-5)
    # As the authors of SigLIP write it.
    signs = 2 * torch.eye(5) - 1
    expected = -torch.nn.functional.logsigmoid(signs * (scores - 3.0)).sum(dim=1).mean()
    ours = sigmoid_contrast(images.numpy(), texts.numpy(), scale=7.0, bias=-3.0, weights=ones)
    np.testing.assert_allclose(ours.loss, expected, rtol=1e-5)
    assert float(ours.weight) == 5


OBJECTIVES = {
    "softmax": lambda x, y, w, labels, **options: softmax_contrast(
        x, y[:, None], scale=7.0, weights=w, labels=labels, symmetric=True, **options
    ),
    "sigmoid": lambda x, y, w, labels, **options: sigmoid_contrast(
        x, y, scale=7.0, bias=-3.0, weights=w, labels=labels, **options
    ),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_devices_that_share_a_batch_equal_one(objective):
    """Loss and gradient under shard_map, which sees a device's rows, with unequal weights."""
    contrast = OBJECTIVES[objective]
    batch = {
        "x": vectors(B), "y": vectors(B, seed=1), "weight": make_batch()["weight"],
        "labels": np.array([0, 1, 2, 3, 4, 0, 1, 7]),
    }  # fmt: skip

    def loss_of(axis_name):
        def loss(variables, batch, rng):
            matrix = variables["params"]["matrix"]
            x, y = (jnp.tanh(batch[name] @ matrix) for name in "xy")
            options = {} if axis_name is None else {"axis_name": axis_name}
            out = contrast(x, y, batch["weight"], batch["labels"], **options)
            return out.loss, fmjax.types.Aux(out.weight, {"accuracy": out.accuracy}, {})

        return loss

    params = {"params": {"matrix": jnp.asarray(np.random.default_rng(2).normal(size=(6, 4)))}}
    grads, loss, aux = jax.jit(gradient(loss_of(None)))(params, {}, batch, None)
    shared = jax.shard_map(
        all_reduce(gradient(loss_of("data")), "data"),
        mesh=make_mesh(data=4),
        in_specs=(P(), P(), P("data"), P()),
        out_specs=P(),
        check_vma=False,
    )
    ours, value, reduced = jax.jit(shared)(params, {}, batch, None)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(ours["params"]["matrix"], grads["params"]["matrix"], rtol=2e-5)
    np.testing.assert_allclose(reduced.metrics["accuracy"], aux.metrics["accuracy"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_step_is_the_same_on_any_devices(family):
    """One device, a sharded jit, and pmap, each with its own loss."""
    model, variables = fmjax.create(family, "tiny", rng=jax.random.key(0))
    tx, batch = optax.sgd(0.1), make_batch()

    def result(step):
        state = init_state(jax.tree.map(jnp.copy, variables), tx, jax.random.key(0))
        state, metrics = step(state, batch)
        return jax.device_get((state.trainable, metrics))

    grad_fn = gradient(task.loss(model, train=False))
    one = result(jit_step(make_train_step(grad_fn, tx)))
    four = result(jit_step(make_train_step(grad_fn, tx), make_mesh(data=4)))
    mapped = result(pmap_step(gradient(task.loss(model, axis_name="batch", train=False)), tx))
    for other in (four, mapped):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other
        )


def test_rows_of_weight_0_and_of_one_label_are_no_negatives():
    """What is left of a batch without the padding; what a name shared leaves out."""
    images, texts = vectors(4), vectors(4, seed=1)
    weights = jnp.array([1.0, 1.0, 1.0, 0.0])
    for contrast in OBJECTIVES.values():
        contrast = jax.jit(contrast)
        whole = contrast(images, texts, weights, None)
        kept = contrast(images[:3], texts[:3], weights[:3], None)
        np.testing.assert_allclose(whole.loss, kept.loss, rtol=1e-6)
    alike = OBJECTIVES["sigmoid"](images, texts, jnp.ones(4), jnp.zeros(4, int))
    right = -3.0 + 7.0 * (images * texts).sum(axis=1)
    np.testing.assert_allclose(alike.loss, np.log1p(np.exp(-right)).mean(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_contrast_teaches_retrieval_and_classes(family):
    """Pictures of 8 shades and words for them, the scale kept within its limits."""
    model, variables = fmjax.create(family, "tiny", rng=jax.random.key(0))
    batch = make_batch()
    shades = np.linspace(-2, 2, B, dtype=np.float32)
    batch |= {
        "pixel_values": np.broadcast_to(shades[:, None, None, None], (B, 8, 8, 3)),
        "weight": np.ones(B, np.float32),
    }
    batch["input_ids"][:, 0] = np.arange(10, 10 + B)
    path = "params/logit_scale"
    limit = task.MOST_SCALE if family == "clip" else 2.4
    tx = optax.chain(optax.adam(3e-3), bounded({path: (0.0, limit)}))
    state = init_state(jax.tree.map(jnp.copy, variables), tx, jax.random.key(0))
    step = jit_step(make_train_step(gradient(task.loss(model)), tx))
    for _ in range(120):
        state, metrics = step(state, batch)
    assert float(metrics["accuracy"].value) > 0.8
    assert float(jnp.max(state.trainable["params"]["logit_scale"])) <= limit + 1e-6
    trained = state.trainable
    rows = [batch | {"index": np.arange(B)}]
    captions = [[n] for n in range(B)]
    scores = task.evaluate(model, trained, rows, rows, captions, num_texts=B)
    assert min(scores["image_to_text/recall@1"], scores["text_to_image/recall@1"]) > 0.8
    prompts = task.predict(model, side="text")(trained, batch)
    classes = task.class_vectors(prompts, np.arange(B) // 4, 2)
    logits = task.classify(model)(trained, batch, classes)
    assert (np.argmax(logits, axis=1) == np.arange(B) // 4).mean() > 0.8


def test_classes_are_the_means_of_their_prompts():
    prompts = vectors(4)
    ours = task.class_vectors(prompts, [1, 0, 1, 1], 2)
    mean = prompts[[0, 2, 3]].mean(axis=0)
    np.testing.assert_allclose(ours[1], mean / np.linalg.norm(mean), rtol=1e-5)
    np.testing.assert_allclose(ours[0], prompts[1], rtol=1e-5)
    with pytest.raises(ValueError, match=r"of 3 classes \[1\] have no prompt, and .* of \[7\]"):
        task.class_vectors(prompts, [0, 2, 0, 7], 3)


def test_the_scale_stays_within_its_limits():
    """And other leaves are none of its business."""
    params = {"params": {"logit_scale": jnp.float32(4.6), "kernel": jnp.ones(3)}}
    tx = optax.chain(optax.sgd(1.0), bounded({"params/logit_scale": (0.0, math.log(100))}))
    grads = jax.tree.map(lambda x: jnp.full_like(x, -9.0), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["params"]["logit_scale"], math.log(100), rtol=1e-6)
    np.testing.assert_array_equal(moved["params"]["kernel"], 10.0)
    with pytest.raises(ValueError, match="cross"):
        bounded({"params/logit_scale": (1.0, 0.0)})
    with pytest.raises(ValueError, match=r"nothing to keep within limits at \['params/scale'\]"):
        bounded({"params/scale": (0.0, 1.0)}).init(params)


def test_bad_settings_are_named():
    model = clip.Model(clip.VARIANTS["tiny"])
    variables, batch = fmjax.hub.abstract_variables(model), make_batch()
    with pytest.raises(ValueError, match="'triplet'"):
        task.loss(model, objective="triplet")
    with pytest.raises(ValueError, match="'sound'"):
        task.predict(model, side="sound")
    sigmoid = task.loss(model, objective="sigmoid", train=False)
    with pytest.raises(ValueError, match="no bias of its logits"):
        jax.eval_shape(sigmoid, variables, batch, None)
    texts = {name: value for name, value in batch.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="the batch has no pixel_values or image_features"):
        jax.eval_shape(task.loss(model), variables, texts, None)
