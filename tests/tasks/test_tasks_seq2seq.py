"""Teacher forcing against PyTorch's BART, padding, generated texts, a copying task."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import fmjax
from fmjax.metrics import summarisation_metrics
from fmjax.models.bart import Config
from fmjax.tasks import seq2seq
from fmjax.train import accumulate, gradient, init_state, is_param, jit_step, make_train_step
from fmjax.tree import split

V, PAD, START = 40, 1, 2
CONFIG = Config(
    vocab_size=V,
    max_position_embeddings=16,
    d_model=16,
    encoder_layers=1,
    encoder_ffn_dim=24,
    encoder_attention_heads=2,
    decoder_layers=1,
    decoder_ffn_dim=24,
    decoder_attention_heads=2,
    dropout=0.0,
    init_std=0.2,
)


@pytest.fixture(scope="module")
def model_and_variables():
    return fmjax.create("bart", CONFIG, head="seq2seq_lm", rng=jax.random.key(0))


@pytest.fixture(scope="module")
def loss_fn(model_and_variables):
    return jax.jit(seq2seq.loss(model_and_variables[0], train=False, chunk_size=12))


def make_batch(rows=4, seed=0):
    draw = np.random.default_rng(seed)
    labels = draw.integers(5, V, (rows, 7)).astype(np.int32)
    labels[np.arange(7) >= draw.integers(3, 8, rows)[:, None]] = -100
    mask = (np.arange(9) < draw.integers(4, 10, rows)[:, None]).astype(np.int32)
    return {
        "input_ids": np.where(mask == 1, draw.integers(5, V, (rows, 9)), PAD).astype(np.int32),
        "attention_mask": mask,
        "labels": labels,
        "weight": np.ones(rows, np.float32),
        "index": np.arange(rows, dtype=np.int32),
    }


def test_shift_right():
    labels = jnp.array([[5, 6, 2, -100], [7, 8, 9, 2]])
    shifted = seq2seq.shift_right(labels, decoder_start_token_id=0, pad_token_id=1)
    assert shifted.tolist() == [[0, 5, 6, 2], [0, 7, 8, 9]]
    late = seq2seq.shift_right(labels[:, ::-1], decoder_start_token_id=0, pad_token_id=1)
    assert late.tolist() == [[0, 1, 2, 6], [0, 2, 9, 8]]
    from transformers.models.mbart.modeling_mbart import shift_tokens_right

    theirs = shift_tokens_right(torch.tensor(np.array(labels)).long(), 1)
    ours = seq2seq.shift_right(labels, decoder_start_token_id=None, pad_token_id=1)
    assert ours.tolist() == theirs.tolist()


def test_loss_and_gradient_equal_pytorch(model_and_variables, tmp_path):
    from transformers import BartForConditionalGeneration

    model, variables = model_and_variables
    fmjax.save(tmp_path, model, variables)
    twin = BartForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = make_batch()
    labels = torch.tensor(batch["labels"]).long()
    output = twin(
        input_ids=torch.tensor(batch["input_ids"]),
        attention_mask=torch.tensor(batch["attention_mask"]),
        labels=labels,
    )
    reference = torch.nn.functional.cross_entropy(
        output.logits.reshape(-1, V), labels.flatten(), label_smoothing=0.1
    )
    reference.backward()
    loss_fn = seq2seq.loss(model, train=False, label_smoothing=0.1, chunk_size=12)
    trainable, others = split(variables, is_param)
    grads, loss, aux = jax.jit(gradient(loss_fn))(trainable, others, batch, None)
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["nll"].value, output.loss.item(), rtol=1e-5)
    assert float(aux.weight) == (batch["labels"] != -100).sum()
    theirs = twin.model.shared.weight.grad.numpy()
    table = [g for g in jax.tree.leaves(grads) if g.shape == theirs.shape]
    assert len(table) == 1
    np.testing.assert_allclose(table[0], theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.slow
def test_padding_and_accumulation(model_and_variables, loss_fn):
    _, variables = model_and_variables
    batch = make_batch()
    trainable, others = split(variables, is_param)
    grads, loss, _ = jax.jit(gradient(loss_fn))(trainable, others, batch, None)
    pieces = jax.jit(accumulate(gradient(loss_fn), 2))(trainable, others, batch, None)
    np.testing.assert_allclose(pieces[1], loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), pieces[0], grads)
    batch["weight"] = np.array([1, 0, 0, 1], np.float32)
    part, aux = loss_fn(variables, batch, None)
    kept = {name: value[[0, 3]] for name, value in batch.items()}
    whole, kept_aux = loss_fn(variables, kept, None)
    np.testing.assert_allclose(part, whole, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["accuracy"], kept_aux.metrics["accuracy"])


def test_predict_and_evaluate(model_and_variables):
    model, variables = model_and_variables
    batch = make_batch()
    scores = np.asarray(jax.jit(seq2seq.predict(model))(variables, batch))
    count = (batch["labels"] != -100).sum()
    assert not scores[batch["labels"] == -100].any()
    given = {**batch, "decoder_input_ids": np.where(batch["labels"] < 0, PAD, batch["labels"])}
    given["decoder_input_ids"] = np.roll(given["decoder_input_ids"], 1, axis=1)
    given["decoder_input_ids"][:, 0] = START
    np.testing.assert_allclose(jax.jit(seq2seq.predict(model))(variables, given), scores, atol=1e-6)
    found = seq2seq.evaluate(
        model,
        variables,
        [batch],
        generated=["a small cat sat here"],
        references=["a small cat sat there"],
    )
    assert found["tokens"] == count
    assert found["nll"] == pytest.approx(-scores.sum() / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert 50 < found["bleu"] < 100
    summary = seq2seq.evaluate(
        model, variables, [batch], generated=["a"], references=["a"], measure=summarisation_metrics
    )
    assert summary["rouge1"] == 100
    assert "bleu" not in summary


@pytest.mark.slow
def test_copying_is_learnt(model_and_variables):
    model, variables = model_and_variables
    tx = optax.adam(1e-2)
    state = init_state(jax.tree.map(jnp.copy, variables), tx, jax.random.key(0))
    step = jit_step(make_train_step(gradient(seq2seq.loss(model, label_smoothing=0.05)), tx))
    source = np.random.default_rng(0).integers(5, 12, (8, 5)).astype(np.int32)
    batch = {"input_ids": source, "attention_mask": np.ones_like(source), "labels": source}
    for _ in range(60):
        state, metrics = step(state, batch)
    assert float(metrics["accuracy"].value) > 0.9


def test_bad_batches_are_named(model_and_variables):
    model, variables = model_and_variables
    batch = make_batch()
    del batch["labels"]
    with pytest.raises(ValueError, match="neither labels nor decoder_input_ids"):
        jax.eval_shape(seq2seq.loss(model, train=False), variables, batch, None)
