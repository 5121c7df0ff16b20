"""Losses against transformers', metrics by weights, predictions in order."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import fmjax
from fmjax.models.bert import Config
from fmjax.tasks import sequence_classification as task
from fmjax.tasks.apply import collect
from fmjax.train import cast, gradient, init_state, jit_step, make_eval_step, make_train_step
from fmjax.types import Output

CONFIG = Config(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
    initializer_range=0.3,
)
LABELS = {
    task.SINGLE: np.array([0, 2, 1, 2], np.int32),
    task.MULTI: np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]], np.float32),
    task.REGRESSION: np.array([0.5, -1.0, 2.0, 0.0], np.float32),
}


def make_model(kind):
    names = ("value",) if kind == task.REGRESSION else ("a", "b", "c")
    config = dataclasses.replace(CONFIG, problem_type=kind, id2label=names)
    return fmjax.create("bert", config, head="sequence_classification", rng=jax.random.key(0))


def make_batch(kind, weight=(1, 1, 1, 1)):
    rng = np.random.default_rng(0)
    return {
        "input_ids": rng.integers(1, 40, (4, 9)).astype(np.int32),
        "attention_mask": np.ones((4, 9), np.int32),
        "labels": LABELS[kind],
        "weight": np.array(weight, np.float32),
        "index": np.arange(4, dtype=np.int32),
    }


@pytest.mark.parametrize("kind", LABELS)
def test_loss_and_gradient_equal_pytorch(kind, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model, variables = make_model(kind)
    fmjax.save(tmp_path, model, variables)
    twin = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert twin.config.problem_type == kind
    batch = make_batch(kind)
    labels = torch.tensor(batch["labels"])
    reference = twin(
        input_ids=torch.tensor(batch["input_ids"]),
        labels=labels.long() if kind == task.SINGLE else labels,
    )
    reference.loss.backward()
    grads, loss, aux = gradient(task.loss(model, train=False))(
        {"params": variables["params"]}, {}, batch, None
    )
    np.testing.assert_allclose(loss, reference.loss.item(), rtol=1e-5)
    kernel = grads["params"]["head"]["classifier"]["kernel"]
    np.testing.assert_allclose(kernel.T, twin.classifier.weight.grad, atol=1e-5)
    assert float(aux.weight) == 4


@pytest.mark.parametrize("kind", LABELS)
def test_padding_rows_do_not_count(kind):
    model, variables = make_model(kind)
    loss_fn = task.loss(model, train=False)
    part, aux = loss_fn(variables, make_batch(kind, (1, 0, 1, 0)), None)
    kept = {n: value[[0, 2]] for n, value in make_batch(kind).items() if n != "weight"}
    whole, kept_aux = loss_fn(variables, kept, None)
    np.testing.assert_allclose(part, whole, rtol=1e-5)
    for name, mean in aux.metrics.items():
        np.testing.assert_allclose(mean, kept_aux.metrics[name])


def test_labels_that_are_no_class():
    """-100 does not count, as in PyTorch; others make the loss nan, but in padding."""
    model, variables = make_model(task.SINGLE)
    batch = make_batch(task.SINGLE, (1, 1, 1, 0)) | {"labels": np.array([0, -100, 1, 7])}
    run = jax.jit(gradient(task.loss(model, train=False)))
    grads, loss, aux = run(variables, {}, batch, None)
    logits = np.array(model.apply(variables, input_ids=batch["input_ids"][:3]).logits)
    wanted = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(batch["labels"][:3])
    )
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert aux.weight == aux.metrics["accuracy"].weight == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    for wrong in (3, -1):
        assert np.isnan(run(variables, {}, batch | {"labels": np.array([0, wrong, 1, 7])}, None)[1])


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (task.SINGLE, (1,)), (task.SINGLE, (4, 1)), (task.SINGLE, (3,)),
        (task.MULTI, (4,)), (task.MULTI, (4, 1)), (task.REGRESSION, (1,)),
         (task.REGRESSION, (1, 4)),
    ],
)  # fmt: skip
def test_labels_are_not_broadcast(kind, shape):
    model, variables = make_model(kind)
    batch = make_batch(kind) | {"labels": np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=rf"labels have the shape \({shape[0]},.*takes \(4,"):
        jax.eval_shape(task.loss(model, train=False), variables, batch, None)


def test_heads_of_tokens_are_refused():
    model, variables = fmjax.create("bert", make_model(task.SINGLE)[0].config, head="masked_lm",
                                    rng=jax.random.key(0))  # fmt: skip
    with pytest.raises(ValueError, match=r"the head 'masked_lm', whose logits \(4, "):
        jax.eval_shape(task.loss(model, train=False), variables, make_batch(task.SINGLE), None)


def test_rows_without_weights_count_alike():
    model, variables = make_model(task.SINGLE)
    batch = make_batch(task.SINGLE)
    loss_fn = task.loss(model, train=False)
    weighed, aux = loss_fn(variables, batch, None)
    assert batch.pop("weight").sum() == 4
    plain, plain_aux = loss_fn(variables, batch, None)
    np.testing.assert_array_equal(plain, weighed)
    assert float(plain_aux.weight) == float(aux.weight) == 4
    batch["labels"] = np.eye(3, dtype=int)[batch["labels"]]  # whole shares are shares too
    np.testing.assert_allclose(loss_fn(variables, batch, None)[0], weighed, rtol=1e-6)


def test_label_smoothing_equals_pytorch():
    model, variables = make_model(task.SINGLE)
    batch = make_batch(task.SINGLE)
    loss, _ = task.loss(model, train=False, label_smoothing=0.2)(variables, batch, None)
    logits = model.apply(variables, input_ids=batch["input_ids"]).logits
    reference = torch.nn.functional.cross_entropy(
        torch.tensor(np.asarray(logits)),
        torch.tensor(batch["labels"]).long(),
        label_smoothing=0.2,
    )
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_few_sentences_are_learnt(precision):
    import optax

    model, variables = make_model(task.SINGLE)
    loss_fn = task.loss(model)
    if precision == "bfloat16":
        loss_fn = cast(loss_fn, "bfloat16")
    tx = optax.adam(1e-2)
    state, batch = init_state(variables, tx, jax.random.key(0)), make_batch(task.SINGLE)
    step = jit_step(make_train_step(gradient(loss_fn), tx))
    for _ in range(40):
        state, _ = step(state, batch)
    metrics = make_eval_step(task.loss(model, train=False))(state, batch)
    assert float(metrics["accuracy"].value) == 1.0
    assert float(metrics["loss"].value) < 0.1


def test_problem_type_by_default():
    model, _ = make_model(task.SINGLE)
    bare = model.clone(config=dataclasses.replace(model.config, problem_type=None))
    assert task.problem_type_of(bare) == task.SINGLE
    one = model.clone(config=dataclasses.replace(bare.config, id2label=("x",)))
    assert task.problem_type_of(one) == task.REGRESSION
    odd = model.clone(config=dataclasses.replace(model.config, problem_type="ranking"))
    with pytest.raises(ValueError, match="'ranking'"):
        task.problem_type_of(odd)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 is for single labels"):
        task.loss(make_model(task.MULTI)[0], label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.5"):
        task.loss(model, label_smoothing=1.5)


def test_collect_restores_the_order_and_refuses_gaps():
    def batch(index):
        return {"index": np.array(index, np.int32), "x": np.array(index, np.float32)}

    rows = collect(lambda v, b: b["x"][:, None], {}, [batch([2, 0]), batch([1, -1])], size=3)
    assert rows.tolist() == [[0], [1], [2]]
    with pytest.raises(ValueError, match="1 of 3 examples"):
        collect(lambda v, b: b["x"], {}, [batch([2, 0])], size=3)
    with pytest.raises(ValueError, match="1 of 2 examples"):
        collect(lambda v, b: b["x"], {}, [batch([0, 1]), batch([1])], size=2)


@pytest.mark.parametrize("kind", LABELS)
def test_evaluate(kind):
    model, variables = make_model(kind)
    result = task.evaluate(model, variables, [make_batch(kind)], LABELS[kind])
    assert result.predictions.shape == (4, 1 if kind == task.REGRESSION else 3)
    assert {task.SINGLE: "accuracy", task.MULTI: "micro_f1", task.REGRESSION: "mse"}[kind] in (
        result.metrics
    )


class Deep:
    """A model with classifiers at two earlier layers, whose logits are its variables."""

    config = types.SimpleNamespace(
        problem_type=None, id2label=("a", "b", "c"), auxiliary_weight=0.3
    )

    @staticmethod
    def apply(variables, *, train, rngs, mutable):
        earlier = (variables["first"], variables["second"]) if train else None
        return Output(logits=variables["last"], auxiliary_logits=earlier), {}


def test_classifiers_at_earlier_layers_count_in_training_alone():
    rng = np.random.default_rng(0)
    variables = {
        name: jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
        for name in ("first", "second", "last")
    }
    labels = np.array([0, 2, 1, 1])
    batch = {"labels": labels, "weight": np.array([1.0, 1.0, 1.0, 0.0])}
    of = {
        name: float(-jax.nn.log_softmax(logits)[np.arange(3), labels[:3]].mean())
        for name, logits in variables.items()
    }
    value, aux = task.loss(Deep())(variables, batch, None)
    np.testing.assert_allclose(value, of["last"] + 0.3 * (of["first"] + of["second"]), rtol=1e-6)
    assert aux.weight == 3
    value, _ = task.loss(Deep(), train=False)(variables, batch, None)
    np.testing.assert_allclose(value, of["last"], rtol=1e-6)
