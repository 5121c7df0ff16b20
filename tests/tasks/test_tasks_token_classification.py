import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import fmjax
from fmjax.models.bert import Config
from fmjax.tasks import token_classification as task
from fmjax.train import accumulate, gradient, init_state, jit_step, make_train_step

NAMES = ("O", "B-PER", "I-PER", "B-LOC")
CONFIG = Config(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
    initializer_range=0.3,
    id2label=NAMES,
)


@pytest.fixture(scope="module")
def model_and_variables():
    return fmjax.create("bert", CONFIG, head="token_classification", rng=jax.random.key(0))


def make_batch(rows=4, length=9, seed=0):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 4, (rows, length)).astype(np.int32)
    labels[draw.random((rows, length)) < 0.4] = -100
    return {
        "input_ids": draw.integers(1, 40, (rows, length)).astype(np.int32),
        "attention_mask": np.ones((rows, length), np.int32),
        "labels": labels,
        "weight": np.ones(rows, np.float32),
        "index": np.arange(rows, dtype=np.int32),
    }


def test_loss_and_gradient_equal_pytorch(model_and_variables, tmp_path):
    from transformers import BertForTokenClassification

    model, variables = model_and_variables
    fmjax.save(tmp_path, model, variables)
    twin = BertForTokenClassification.from_pretrained(tmp_path).eval()
    batch = make_batch()
    reference = twin(
        input_ids=torch.tensor(batch["input_ids"]), labels=torch.tensor(batch["labels"]).long()
    ).loss
    reference.backward()
    loss_fn = task.loss(model, train=False)
    grads, loss, aux = jax.jit(gradient(loss_fn))(variables, {}, batch, None)
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-5)
    np.testing.assert_allclose(
        grads["params"]["head"]["classifier"]["kernel"].T, twin.classifier.weight.grad, atol=1e-5
    )
    assert float(aux.weight) == (batch["labels"] != -100).sum()

    pieces = jax.jit(accumulate(gradient(loss_fn), 2))(variables, {}, batch, None)
    np.testing.assert_allclose(pieces[1], loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), pieces[0], grads)

    batch["weight"] = np.array([1, 0, 1, 0], np.float32)
    kept = {name: value[[0, 2]] for name, value in batch.items()}
    part, whole = (jax.jit(loss_fn)(variables, b, None) for b in (batch, kept))
    np.testing.assert_allclose(part[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(part[1].metrics["accuracy"], whole[1].metrics["accuracy"])
    kept["labels"] = np.where(kept["labels"] == 3, 4, kept["labels"])  # no class
    assert np.isnan(jax.jit(loss_fn)(variables, kept, None)[0])


def test_evaluate_scores_words_by_their_first_piece(model_and_variables):
    model, variables = model_and_variables
    batch = make_batch()
    best = np.asarray(jax.jit(task.predict(model))(variables, batch)).argmax(-1)
    first = {name: value[[2, 0]] for name, value in batch.items()}
    second = {name: value[[1, 3]] for name, value in batch.items()}
    second["index"] = np.array([1, -1], np.int32)  # the last row is padding
    result = task.evaluate(model, variables, [first, second], size=3)
    truth = [[NAMES[tag] for tag in row[row != -100]] for row in batch["labels"][:3]]
    found = [
        [NAMES[tag] for tag in row[labels != -100]]
        for row, labels in zip(best[:3], batch["labels"][:3], strict=True)
    ]
    assert result.labels == truth
    assert result.predictions == found
    right = [a == b for x, y in zip(found, truth, strict=True) for a, b in zip(x, y, strict=True)]
    assert result.metrics["accuracy"] == pytest.approx(np.mean(right))
    assert 0 <= result.metrics["f1"] <= 1

    every = np.abs(batch["labels"]) % 4  # a label on every piece
    words = np.tile([-1, 0, 0, 1, 2, 2, 2, 3, -1], (4, 1))
    every[words < 0] = -100
    full = {**batch, "labels": every, "word_ids": words}
    result = task.evaluate(model, variables, [full], size=4)
    assert result.labels[0] == [NAMES[every[0, at]] for at in (1, 3, 4, 7)]


def test_tags_without_entities_have_no_entity_scores():
    config = dataclasses.replace(CONFIG, id2label=("NN", "VB", "DT", "IN"))
    model, variables = fmjax.create(
        "bert", config, head="token_classification", rng=jax.random.key(0)
    )
    result = task.evaluate(model, variables, [make_batch()], size=4)
    assert set(result.metrics) == {"accuracy"}


def test_tags_are_learnt(model_and_variables):
    model, variables = model_and_variables
    tx = optax.adam(1e-2)
    state = init_state(jax.tree.map(jnp.copy, variables), tx, jax.random.key(0))
    step = jit_step(make_train_step(gradient(task.loss(model)), tx))
    batch = make_batch(rows=16, seed=1)
    batch["labels"] = np.where(batch["labels"] == -100, -100, batch["input_ids"] % 4)
    for _ in range(60):
        state, metrics = step(state, batch)
    assert float(metrics["accuracy"].value) > 0.9


def test_bad_settings_are_named(model_and_variables):
    model, variables = model_and_variables
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.5"):
        task.loss(model, label_smoothing=1.5)
    batch = {**make_batch(), "labels": np.zeros(4, np.int32)}
    with pytest.raises(ValueError, match=r"labels have shape \(4,\)"):
        jax.eval_shape(task.loss(model, train=False), variables, batch, None)
    with pytest.raises(ValueError, match="1 of 5 examples"):
        task.evaluate(model, variables, [make_batch()], size=5)
