"""Pseudo-labels and FixMatch: by hand, in their limits, in rounds."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import made, pictures
from sklearn.linear_model import LogisticRegression

from fmjax.methods.self_training import (
    fix_match,
    picture_views,
    pseudo_labelled,
    pseudo_labels,
    ramped,
    self_train,
)
from fmjax.tasks import sequence_classification as task

MODEL, VARIABLES = made("mlp", "classification")
KEY = jax.random.key(0)


def moved(by):
    return lambda rng, batch: {**batch, "features": batch["features"] + by}


def same(rng, batch):
    return batch


def rows():
    draw = np.random.default_rng(0)
    return {
        "labelled/features": draw.normal(size=(4, 3)).astype(np.float32),
        "labelled/labels": np.arange(4) % 2,
        "labelled/weight": np.array([1, 1, 1, 0], np.float32),
        "unlabelled/features": 3 * draw.normal(size=(9, 3)).astype(np.float32),
        "unlabelled/labels": np.full(9, 7),
        "unlabelled/weight": np.array([1] * 7 + [0] * 2, np.float32),
    }


def test_fix_match_is_its_equations():
    batch = rows()
    inputs = batch["labelled/features"] + 0.1, batch["unlabelled/features"] + 0.1
    every = np.concatenate([*inputs, batch["unlabelled/features"] - 1])
    logits = np.asarray(jax.jit(MODEL.apply)(VARIABLES, every).logits)
    said = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    shown, weak, strong = np.split(said, [4, 13])
    classes, sure = weak.argmax(1), np.exp(weak.max(1))
    threshold = float(np.sort(sure[:7])[3]) - 1e-6
    mask = (sure >= threshold) & (np.arange(9) < 7)
    assert mask.sum() == 4
    unlabelled = -(mask * strong[np.arange(9), classes]).sum() / 7
    labelled = -shown[np.arange(3), batch["labelled/labels"][:3]].mean()
    loss = fix_match(
        task.loss, MODEL, weak=moved(0.1), strong=moved(-1.0), threshold=threshold, strength=2.0
    )

    # Predictions of the weak view have no gradient: it is that of labels which were there before.
    def by_hand(variables):
        logits = jax.nn.log_softmax(MODEL.apply(variables, every).logits)
        first = logits[np.arange(3), batch["labelled/labels"][:3]].mean()
        return -first - 2 * jnp.sum(mask * logits[np.arange(13, 22), classes]) / 7

    @jax.jit
    def all_of(variables):
        of_loss = jax.value_and_grad(lambda v: loss(v, batch, KEY), has_aux=True)
        return of_loss(variables), jax.grad(by_hand)(variables)

    ((value, aux), grads), expected = all_of(VARIABLES)
    np.testing.assert_allclose(value, labelled + 2 * unlabelled, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["chosen"].value, 4 / 7, rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["unsupervised"].value, unlabelled, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["supervised"].value, labelled, rtol=1e-5)
    assert aux.weight == 3
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)


def test_limits():
    batch = rows()
    own = {k.split("/")[1]: x for k, x in batch.items() if k.startswith("labelled")}
    plain = task.loss(MODEL)
    # Nothing is as sure as that: only what is labelled counts.
    never = fix_match(task.loss, MODEL, weak=same, strong=moved(-1.0), threshold=1.0)
    # Views that change nothing are Lee's pseudo-labels.
    lee = pseudo_labelled(task.loss, MODEL, threshold=0.6)
    match = fix_match(task.loss, MODEL, weak=same, strong=same, threshold=0.6)
    # alpha(t) is 0 before its beginning, and half way it has half its height.
    growing = pseudo_labelled(task.loss, MODEL, threshold=0.6, strength=ramped(begin=2, end=6))

    @jax.jit
    def all_of(variables):
        of = lambda f, rows: jax.value_and_grad(lambda v: f(v, rows, KEY)[0])(variables)  # noqa: E731
        grown = [
            growing(variables | {"progress": {"step": jnp.int32(step)}}, batch, KEY)[0]
            for step in (0, 4)
        ]
        return of(plain, own), of(never, batch), of(lee, batch), of(match, batch), grown

    alone, nothing, first, second, (before, half) = all_of(VARIABLES)
    chex.assert_trees_all_close(nothing, alone, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(first, second, rtol=1e-5, atol=1e-7)
    assert first[0] > alone[0] + 0.01
    np.testing.assert_allclose(before, alone[0], rtol=1e-6)
    np.testing.assert_allclose(half, alone[0] + 1.5 * (first[0] - alone[0]), rtol=1e-5)


def test_rounds():
    """Two clouds, of which four points are labelled: later rounds label more, and rightly."""
    draw = np.random.default_rng(0)
    truth = np.arange(200) % 2
    x = draw.normal(size=(200, 2)) + 4 * truth[:, None]
    trained_on = []

    def train(chosen, labels):
        trained_on.append(len(chosen))
        assert (truth[4:][chosen] != labels).sum() <= 0.05 * len(labels)
        model = LogisticRegression(C=0.05)
        return model.fit(np.concatenate([x[:4], x[4:][chosen]]), np.append(truth[:4], labels))

    done = self_train(train, lambda model: model.predict_proba(x[4:]), rounds=3, threshold=0.7)
    assert trained_on == [len(part.chosen) for part in done]
    assert 0 == trained_on[0] < trained_on[1] < trained_on[2] <= trained_on[3]
    assert done[-1].variables.score(x, truth) > 0.95
    ended = self_train(train, lambda model: np.full((9, 2), 0.5), rounds=3, threshold=0.7)
    assert len(ended) == 1


def test_chosen():
    chosen, labels = pseudo_labels(np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]), 0.8)
    assert chosen.tolist() == [0, 2]
    assert labels.tolist() == [0, 1]


@pytest.mark.slow
def test_picture_views():
    batch = pictures()
    weak, strong = (
        np.asarray(jax.jit(view)(KEY, batch)["pixel_values"]) for view in picture_views(8, 8)
    )
    assert weak.shape == strong.shape == batch["pixel_values"].shape
    gray = (np.abs(strong - 0.5) < 1e-6).sum(axis=(1, 2, 3))
    assert (gray >= 16).all()  # a square of 4 x 4
    model, variables = made("cnn", "image_classification")
    first, second = picture_views(8, 8)
    loss = fix_match(task.loss, model, weak=first, strong=second)
    parts = {f"labelled/{k}": x for k, x in batch.items()}
    parts["labelled/pixel_values"] = (255 * batch["pixel_values"]).astype(np.uint8)
    parts["unlabelled/pixel_values"] = parts["labelled/pixel_values"]
    value, _ = jax.jit(loss)(variables, parts, KEY)
    assert np.isfinite(value)


def test_refusals():
    for threshold in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"threshold={threshold}"):
            fix_match(task.loss, MODEL, weak=same, strong=same, threshold=threshold)
        with pytest.raises(ValueError, match="threshold"):
            pseudo_labels(np.eye(2), threshold)
    numbers = MODEL.clone(config=dataclasses.replace(MODEL.config, problem_type="regression"))
    with pytest.raises(ValueError, match=r"strength=-1\.0.*problem_type is regression"):
        pseudo_labelled(task.loss, numbers, threshold=0.5, strength=-1.0)
    loss = fix_match(task.loss, MODEL, weak=same, strong=same)
    with pytest.raises(ValueError, match="give it a key"):
        jax.eval_shape(loss, VARIABLES, rows(), None)
    labelled = {k: x for k, x in rows().items() if k.startswith("labelled")}
    with pytest.raises(ValueError, match="nothing called unlabelled"):
        jax.eval_shape(loss, VARIABLES, labelled, KEY)
    with pytest.raises(ValueError, match="no unlabelled rows"):
        pseudo_labels(np.zeros((0, 2)), 0.9)
    with pytest.raises(ValueError, match="sum 1"):
        pseudo_labels(np.ones((3, 2)), 0.9)
    with pytest.raises(ValueError, match="rounds=0"):
        self_train(lambda *_: {}, lambda _: np.eye(2), rounds=0, threshold=0.9)
    with pytest.raises(ValueError, match="one after the other"):
        ramped(begin=3, end=3)
