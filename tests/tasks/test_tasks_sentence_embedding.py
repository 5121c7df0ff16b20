"""InfoNCE against PyTorch's cross-entropy of the scores, what is no negative, retrieval."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import fmjax
from fmjax.models.bert import Config
from fmjax.tasks import sentence_embedding as task
from fmjax.train import gradient, init_state, jit_step, make_mesh, make_train_step

CONFIG = Config(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
    initializer_range=0.3,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


@pytest.fixture(scope="module")
def model_and_variables():
    return fmjax.create("bert", CONFIG, head="model", rng=jax.random.key(0))


def make_batch(rows=4, negatives=None, seed=0):
    draw = np.random.default_rng(seed)
    shape = (rows, 9) if negatives is None else (rows, 1 + negatives, 9)
    batch = {
        "query_input_ids": draw.integers(1, 40, (rows, 5)).astype(np.int32),
        "passage_input_ids": draw.integers(1, 40, shape).astype(np.int32),
    }
    masks = {
        name.replace("input_ids", "attention_mask"): (
            np.arange(ids.shape[-1]) < draw.integers(3, ids.shape[-1], (*ids.shape[:-1], 1))
        ).astype(np.int32)
        for name, ids in batch.items()
    }
    return {**batch, **masks, "weight": np.ones(rows, np.float32)}


def vectors(model, variables, batch):
    """(queries [B, D], passages [B, 1 + n, D]) by plain numpy."""
    found = []
    for side in ("query", "passage"):
        ids, mask = (batch[f"{side}_{name}"] for name in ("input_ids", "attention_mask"))
        flat = {"input_ids": ids.reshape(-1, ids.shape[-1]),
                "attention_mask": mask.reshape(-1, ids.shape[-1])}  # fmt: skip
        hidden = np.asarray(jax.jit(model.apply)(variables, **flat).last_hidden_state)
        keep = flat["attention_mask"][..., None]
        mean = (hidden * keep).sum(1) / keep.sum(1)
        mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
        found.append(mean.reshape(*ids.shape[:-1], -1))
    return found[0], found[1].reshape(len(found[0]), -1, found[0].shape[-1])


@pytest.mark.parametrize(("negatives", "symmetric"), [(None, False), (2, True)])
def test_loss_equals_cross_entropy_of_the_scores(model_and_variables, negatives, symmetric):
    model, variables = model_and_variables
    batch = make_batch(negatives=negatives)
    loss_fn = jax.jit(task.loss(model, temperature=0.1, symmetric=symmetric, train=False))
    loss, aux = loss_fn(variables, batch, None)
    queries, passages = map(torch.tensor, vectors(model, variables, batch))
    right, wrong = passages[:, 0], passages[:, 1:].reshape(-1, 16)
    entropy, target = torch.nn.functional.cross_entropy, torch.arange(4)
    expected = entropy(queries @ torch.cat([right, wrong]).T / 0.1, target)
    if symmetric:
        expected = (expected + entropy(right @ queries.T / 0.1, target)) / 2
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-4)
    assert float(aux.weight) == 4


@pytest.mark.slow
def test_padding_rows_are_no_negatives(model_and_variables):
    model, variables = model_and_variables
    loss_fn = task.loss(model, symmetric=True, train=False)
    differentiate = jax.jit(gradient(loss_fn))
    batch = make_batch(negatives=1)
    kept = {name: value[:3] for name, value in batch.items()}
    batch["weight"][3] = 0
    for name in ("query_attention_mask", "passage_attention_mask"):
        batch[name][3] = 0  # nothing there at all: vectors of length 0
    grads, loss, aux = differentiate(variables, {}, batch, None)
    expected, reference, kept_aux = differentiate(variables, {}, kept, None)
    np.testing.assert_allclose(loss, reference, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["accuracy"], kept_aux.metrics["accuracy"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, expected)


def test_rows_of_one_label_are_no_negatives(model_and_variables):
    model, variables = model_and_variables
    loss_fn = jax.jit(task.loss(model, train=False))
    batch = make_batch()
    queries, passages = vectors(model, variables, batch)
    scores = queries @ passages[:, 0].T / 0.05
    scores[0, 2] = scores[2, 0] = -np.inf
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    loss, _ = loss_fn(variables, {**batch, "labels": np.array([7, 1, 7, 2])}, None)
    np.testing.assert_allclose(loss, -np.diag(log_p).mean(), rtol=1e-4)


@pytest.mark.slow
def test_sharded_equals_one_device(model_and_variables):
    model, variables = model_and_variables
    tx, batch = optax.sgd(0.1), make_batch(rows=8)
    step = make_train_step(gradient(task.loss(model, train=False)), tx)

    def result(step):
        state = init_state(jax.tree.map(jnp.copy, variables), tx, jax.random.key(0))
        state, metrics = step(state, batch)
        return jax.device_get((state.trainable, metrics))

    one, four = result(jit_step(step)), result(jit_step(step, make_mesh(data=4)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, four)


@pytest.mark.slow
def test_contrast_teaches_retrieval(model_and_variables):
    """A passage is about the query's token: before training few are found, afterwards most."""
    model, variables = model_and_variables
    count = 32
    draw = np.random.default_rng(1)
    own = np.arange(5, 5 + count)
    queries = np.stack([own, np.full(count, 1)], axis=1).astype(np.int32)
    passages = draw.integers(1, 4, (count, 4)).astype(np.int32)
    passages[:, 2] = own
    batch = {
        "query_input_ids": queries,
        "query_attention_mask": np.ones_like(queries),
        "passage_input_ids": passages,
        "passage_attention_mask": np.ones_like(passages),
    }
    tx = optax.adam(1e-2)
    state = init_state(jax.tree.map(jnp.copy, variables), tx, jax.random.key(0))
    step = jit_step(make_train_step(gradient(task.loss(model)), tx))

    def search(variables):
        rows = [
            {"input_ids": ids, "attention_mask": np.ones_like(ids), "index": np.arange(count)}
            for ids in (queries, passages)
        ]
        return task.evaluate(
            model, variables, [rows[0]], [rows[1]], [[n] for n in range(count)], num_passages=count
        )

    before = search(variables)
    for _ in range(40):
        state, _ = step(state, batch)
    after = search(state.trainable)
    assert after["recall@1"] > max(0.9, before["recall@1"])
    assert after["mrr"] >= after["recall@1"]
    queries_again = task.predict(model, prefix="query_")(state.trainable, batch)
    np.testing.assert_allclose(np.linalg.norm(queries_again, axis=1), 1.0, rtol=1e-5)


def test_bad_settings_are_named(model_and_variables):
    model, variables = model_and_variables
    with pytest.raises(ValueError, match="temperature is 0"):
        task.loss(model, temperature=0)
    with pytest.raises(ValueError, match="'median'"):
        task.loss(model, pooling="median")
    batch = {name: value for name, value in make_batch().items() if "passage" not in name}
    with pytest.raises(ValueError, match="no passage_attention_mask, passage_input_ids"):
        jax.eval_shape(task.loss(model, train=False), variables, batch, None)
