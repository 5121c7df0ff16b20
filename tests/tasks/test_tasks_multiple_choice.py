import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import fmjax
from fmjax.models.bert import Config
from fmjax.tasks import multiple_choice as task
from fmjax.train import gradient, init_state, jit_step, make_train_step

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
    return fmjax.create("bert", CONFIG, head="multiple_choice", rng=jax.random.key(0))


def make_batch(rows=4):
    draw = np.random.default_rng(0)
    ids = draw.integers(1, 40, (rows, 3, 8)).astype(np.int32)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "labels": draw.integers(0, 3, rows).astype(np.int32),
        "weight": np.ones(rows, np.float32),
        "index": np.arange(rows, dtype=np.int32),
    }


def test_loss_and_gradient_equal_pytorch(model_and_variables, tmp_path):
    from transformers import BertForMultipleChoice

    model, variables = model_and_variables
    fmjax.save(tmp_path, model, variables)
    twin = BertForMultipleChoice.from_pretrained(tmp_path).eval()
    batch = make_batch()
    reference = twin(
        input_ids=torch.tensor(batch["input_ids"]), labels=torch.tensor(batch["labels"]).long()
    ).loss
    reference.backward()
    grads, loss, aux = jax.jit(gradient(task.loss(model, train=False)))(variables, {}, batch, None)
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-5)
    assert float(aux.weight) == 4
    np.testing.assert_allclose(
        grads["params"]["head"]["classifier"]["kernel"].T, twin.classifier.weight.grad, atol=1e-5
    )


def test_padding_rows_and_evaluation(model_and_variables):
    model, variables = model_and_variables
    batch = make_batch()
    loss_fn = jax.jit(task.loss(model, train=False))
    batch["weight"][1] = 0
    part, aux = loss_fn(variables, batch, None)
    kept = {name: value[[0, 2, 3]] for name, value in batch.items()}
    whole, kept_aux = loss_fn(variables, kept, None)
    np.testing.assert_allclose(part, whole, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["accuracy"], kept_aux.metrics["accuracy"])
    found = task.evaluate(model, variables, [batch], batch["labels"])
    np.testing.assert_allclose(found.predictions.sum(axis=1), 1, rtol=1e-5)
    right = found.predictions.argmax(axis=1) == batch["labels"]
    assert found.metrics["accuracy"] == right.mean()
    nll = -np.log(found.predictions[[0, 2, 3], batch["labels"][[0, 2, 3]]]).mean()
    np.testing.assert_allclose(part, nll, rtol=1e-5)


def test_choices_are_learnt(model_and_variables):
    model, variables = model_and_variables
    tx = optax.adam(1e-2)
    state = init_state(jax.tree.map(jnp.copy, variables), tx, jax.random.key(0))
    step = jit_step(make_train_step(gradient(task.loss(model)), tx))
    batch = make_batch(rows=8)
    for _ in range(40):
        state, metrics = step(state, batch)
    assert float(metrics["accuracy"].value) == 1.0


def test_labels_that_are_no_choice(model_and_variables):
    """-100 does not count, as in PyTorch; others make the loss nan, and do not wrap around."""
    model, variables = model_and_variables
    loss_fn = jax.jit(task.loss(model, train=False))
    batch = make_batch()
    loss, aux = loss_fn(variables, batch | {"labels": np.array([0, -100, 1, -100])}, None)
    logits = np.array(model.apply(variables, input_ids=batch["input_ids"]).logits)
    wanted = torch.nn.functional.cross_entropy(torch.tensor(logits[::2]), torch.tensor([0, 1]))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert float(aux.weight) == 2
    for wrong in (-1, 3):
        assert np.isnan(loss_fn(variables, batch | {"labels": np.array([0, wrong, 1, 2])}, None)[0])
    with pytest.raises(ValueError, match=r"labels have the shape \(1,\).* 4 examples"):
        loss_fn(variables, batch | {"labels": np.array([0])}, None)
