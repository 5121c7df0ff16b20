import jax
import numpy as np
import pytest
import torch

import fmjax
from fmjax.models.visual_bert import Config
from fmjax.tasks import visual_question_answering as task
from fmjax.train import gradient

ANSWERS = (["Yes"] * 3 + ["no"], ["2", "two", "three"], ["a dog", "dog", "dog", "cat"], ["maybe"])
NAMES = ("yes", "no", "2", "3", "dog")
CONFIG = Config(
    vocab_size=40, hidden_size=16, visual_embedding_dim=5, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=24, max_position_embeddings=16, initializer_range=0.3,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, id2label=NAMES,
)  # fmt: skip


@pytest.fixture(scope="module")
def model_and_variables():
    return fmjax.create("visual_bert", CONFIG, head="question_answering", rng=jax.random.key(0))


def make_batch():
    draw = np.random.default_rng(0)
    return {
        "input_ids": draw.integers(1, 40, (4, 6)),
        "attention_mask": np.ones((4, 6), np.int32),
        "visual_embeds": draw.normal(size=(4, 3, 5)).astype(np.float32),
        "labels": task.targets(ANSWERS, NAMES),
        "weight": np.ones(4, np.float32),
        "index": np.arange(4),
    }


def test_targets_and_names():
    third, two = 1 / 3, 2 / 3
    expected = [[1, third, 0, 0, 0], [0, 0, two, third, 0], [0, 0, 0, 0, 1], [0] * 5]
    np.testing.assert_allclose(task.targets(ANSWERS, NAMES), expected, rtol=1e-6)
    assert task.frequent_answers(ANSWERS, at_least=2) == ("dog", "yes", "2")
    with pytest.raises(ValueError, match="no answer occurs 9 times; 7 occur"):
        task.frequent_answers(ANSWERS)


def test_softmax_loss_and_gradient_equal_pytorch(model_and_variables, tmp_path):
    from transformers import VisualBertForQuestionAnswering

    model, variables = model_and_variables
    fmjax.save(tmp_path, model, variables)
    twin = VisualBertForQuestionAnswering.from_pretrained(tmp_path).eval()
    batch = make_batch()
    tensors = {k: torch.tensor(v) for k, v in batch.items() if k not in ("weight", "index")}
    reference = twin(**tensors).loss
    reference.backward()
    loss = task.loss(model, train=False, softmax=True)
    grads, value, aux = jax.jit(gradient(loss))(variables, {}, batch, None)
    np.testing.assert_allclose(value, reference.item(), rtol=1e-5)
    assert float(aux.weight) == 4
    np.testing.assert_allclose(
        grads["params"]["head"]["classifier"]["kernel"].T, twin.cls.weight.grad, atol=1e-5
    )


@pytest.mark.slow
def test_binary_loss_is_summed_over_answers(model_and_variables):
    model, variables = model_and_variables
    batch = make_batch()
    logits = model.apply(
        variables, batch["input_ids"], batch["attention_mask"],
        visual_embeds=batch["visual_embeds"],
    ).logits  # fmt: skip
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(np.asarray(logits)), torch.tensor(batch["labels"]), reduction="none"
    ).sum(dim=1)
    batch["weight"] = np.array([1, 1, 0, 2], np.float32)
    expected = (each.numpy() * batch["weight"]).sum() / 4
    value, aux = task.loss(model, train=False)(variables, batch, None)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chosen = batch["labels"][np.arange(4), np.asarray(logits).argmax(axis=1)]
    accuracy = (chosen * batch["weight"]).sum() / 4
    np.testing.assert_allclose(aux.metrics["accuracy"].value, accuracy, rtol=1e-6)


@pytest.mark.slow
def test_evaluation(model_and_variables):
    model, variables = model_and_variables
    batch = make_batch()
    halves = [
        {name: value[part] for name, value in batch.items()} for part in (np.s_[:2], np.s_[2:])
    ]
    found = task.evaluate(model, variables, halves[::-1], ANSWERS, ("a", "a", "b", "b"))
    assert found.answers == tuple(NAMES[i] for i in found.predictions.argmax(axis=1))
    worth = batch["labels"][np.arange(4), found.predictions.argmax(axis=1)]
    assert found.metrics["accuracy"] == pytest.approx(worth.mean())
    assert found.metrics["accuracy of b"] == pytest.approx(worth[2:].mean())
