"""Next-token losses against PyTorch, packed documents against separate ones, bits per byte."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import fmjax
from fmjax.methods.policy_gradient import response_scores
from fmjax.models import bloom, gpt2, mixtral, roberta
from fmjax.models.bert import Config
from fmjax.tasks import causal_lm
from fmjax.train import accumulate, cast, gradient, init_state, jit_step, make_train_step

V, T = 50, 16
CONFIG = Config(
    vocab_size=V,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=T,
    initializer_range=0.3,
    is_decoder=True,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
VARIANTS = {
    "gpt2": gpt2.VARIANTS["tiny"],
    "bloom": bloom.VARIANTS["tiny"],
    "mixtral": mixtral.VARIANTS["tiny"],
}


@pytest.fixture(scope="module")
def model_and_variables():
    return fmjax.create("bert", CONFIG, head="causal_lm", rng=jax.random.key(0))


@pytest.fixture(scope="module")
def loss_fn(model_and_variables):
    return jax.jit(causal_lm.loss(model_and_variables[0], train=False, chunk_size=20))


def make_batch(rows=4, seed=0):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(T // 2, T + 1, rows)
    return {
        "input_ids": draw.integers(1, V, (rows, T)).astype(np.int32),
        "attention_mask": (np.arange(T) < sizes[:, None]).astype(np.int32),
        "weight": np.ones(rows, np.float32),
        "index": np.arange(rows, dtype=np.int32),
    }


def test_loss_and_gradient_equal_pytorch(model_and_variables, loss_fn, tmp_path):
    from transformers import BertLMHeadModel

    model, variables = model_and_variables
    fmjax.save(tmp_path, model, variables)
    twin = BertLMHeadModel.from_pretrained(tmp_path, is_decoder=True).eval()
    batch = make_batch()
    batch["labels"] = np.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    batch["labels"][0, :5] = -100  # a prompt
    reference = twin(
        input_ids=torch.tensor(batch["input_ids"]),
        attention_mask=torch.tensor(batch["attention_mask"]),
        labels=torch.tensor(batch["labels"]).long(),
    ).loss
    reference.backward()
    grads, loss, aux = jax.jit(gradient(loss_fn))(variables, {}, batch, None)
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-5)
    np.testing.assert_allclose(
        grads["params"]["embed"]["word"]["embedding"],
        twin.bert.embeddings.word_embeddings.weight.grad,
        atol=1e-5,
    )
    assert float(aux.weight) == (batch["labels"][:, 1:] != -100).sum()


def packed(rows):
    """Rows of documents -> one packed batch."""
    batch = {name: np.zeros((len(rows), T), np.int32) for name in ("input_ids", "segment_ids")}
    for row, documents in enumerate(rows):
        ids = np.concatenate(documents)
        batch["input_ids"][row, : len(ids)] = ids
        numbers = np.repeat(np.arange(1, len(documents) + 1), [len(d) for d in documents])
        batch["segment_ids"][row, : len(ids)] = numbers
    return batch


def separate(documents):
    """The same documents, a row each."""
    batch = packed([[document] for document in documents])
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["segment_ids"],
        "weight": np.ones(len(documents), np.float32),
    }


def test_packed_documents_equal_separate_ones(model_and_variables, loss_fn):
    model, variables = model_and_variables
    draw = np.random.default_rng(0)
    documents = [draw.integers(1, V, size) for size in (5, 7, 3, 9, 6, 1)]
    together = packed([documents[:3], documents[3:], [np.zeros(0, int)]])
    together |= {"weight": np.array([1, 1, 0], np.float32)}
    together |= {"attention_mask": np.minimum(together["segment_ids"], 1)}
    apart = separate(documents)
    differentiate = jax.jit(gradient(loss_fn))
    grads, loss, aux = differentiate(variables, {}, together, None)
    expected, reference, weight = differentiate(variables, {}, apart, None)
    np.testing.assert_allclose(loss, reference, rtol=1e-5)
    assert float(aux.weight) == float(weight.weight) == sum(len(d) - 1 for d in documents)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grads, expected)
    predict = jax.jit(causal_lm.predict(model))
    a, b = predict(variables, together), predict(variables, apart)
    np.testing.assert_allclose(a[0, 5:12], b[1, :7], atol=1e-5)
    np.testing.assert_allclose(a[1, 9:15], b[4, :6], atol=1e-5)
    assert a[0, 5] == a[0, 0] == a[0, 15] == 0.0


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mixtral"])
def test_families_keep_documents_apart(family):
    """Learned positions, alibi (which takes none), rotary ones under a window and experts."""
    config = VARIANTS[family]
    model, variables = fmjax.create(family, config, head="causal_lm", rng=jax.random.key(0))
    draw = np.random.default_rng(0)
    documents = [draw.integers(3, config.vocab_size, size) for size in (5, 7, 4, 9, 6, 8)]
    together, apart = packed([documents[:3], documents[3:5], documents[5:]]), separate(documents)
    together["weight"] = np.ones(3, np.float32)
    loss_fn = jax.jit(causal_lm.loss(model, train=False))
    a, b = (loss_fn(variables, batch, None)[0] for batch in (together, apart))
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_balanced_loss_equals_pytorch(tmp_path):
    from transformers import MixtralForCausalLM

    model, variables = fmjax.create(
        "mixtral", VARIANTS["mixtral"], head="causal_lm", rng=jax.random.key(0)
    )
    fmjax.save(tmp_path, model, variables)
    twin = MixtralForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    batch = make_batch()
    reference = twin(
        input_ids=torch.tensor(batch["input_ids"]),
        attention_mask=torch.tensor(batch["attention_mask"]),
        labels=torch.tensor(np.where(batch["attention_mask"], batch["input_ids"], -100)).long(),
        output_router_logits=True,
    )
    coefficient = twin.config.router_aux_loss_coef
    loss_fn = jax.jit(causal_lm.loss(model, train=False, balance=coefficient))
    loss, aux = loss_fn(variables, batch, None)
    np.testing.assert_allclose(loss, reference.loss.item(), rtol=1e-5)
    balance = aux.metrics["load_balance"].value
    np.testing.assert_allclose(balance, reference.aux_loss.item(), rtol=1e-5)


def test_unpack_restarts_positions():
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 0, 0, 0]])
    batch = causal_lm.unpack({"input_ids": segments, "segment_ids": segments})
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 1, 2]]
    assert batch["attention_mask"][0].astype(int).tolist()[3] == [0, 0, 1, 1, 1, 0]
    labels = causal_lm.next_tokens({"input_ids": segments + 10, "segment_ids": segments})
    assert labels.tolist() == [[11, -100, 12, 12, -100, -100], [-100] * 6]


def test_rows_of_the_table_are_those_without_positions():
    """RoBERTa's first token has another row than 0: packed, and as a drawn response."""
    sizes = {field: getattr(CONFIG, field) for field in ("hidden_size", "num_hidden_layers")}
    config = roberta.Config(
        **sizes, vocab_size=V, num_attention_heads=2, intermediate_size=24, is_decoder=True,
        max_position_embeddings=T + 2, initializer_range=0.3,
    )  # fmt: skip
    model, variables = fmjax.create("roberta", config, head="causal_lm", rng=jax.random.key(0))
    ids = np.random.default_rng(0).integers(4, V, (1, 8)).astype(np.int32)
    packed = {"input_ids": ids, "segment_ids": np.array([[1, 1, 1, 1, 1, 2, 2, 2]])}
    loss = jax.jit(causal_lm.loss(model, train=False))
    parts = [loss(variables, {"input_ids": part}, None)[0] for part in (ids[:, :5], ids[:, 5:])]
    expected = (4 * parts[0] + 2 * parts[1]) / 6
    np.testing.assert_allclose(loss(variables, packed, None)[0], expected, rtol=1e-5)

    drawn = {"input_ids": ids, "attention_mask": np.ones_like(ids), "response_mask": ids[:, 5:] > 0}
    scores = jax.jit(response_scores(model))(variables, drawn).log_probs
    logits = model.apply(variables, ids).logits
    plain = jnp.take_along_axis(jax.nn.log_softmax(logits[:, 4:7]), ids[:, 5:, None], axis=-1)
    np.testing.assert_allclose(scores, plain[..., 0], rtol=1e-5)


@pytest.mark.slow
def test_padding_and_accumulation(model_and_variables, loss_fn):
    _, variables = model_and_variables
    batch = make_batch()
    batch["weight"][1] = 0.0
    kept = {name: value[[0, 2, 3]] for name, value in batch.items()}
    grads, loss, aux = jax.jit(gradient(loss_fn))(variables, {}, batch, None)
    expected, kept_aux = loss_fn(variables, kept, None)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert float(aux.weight) == float(kept_aux.weight)
    pieces = jax.jit(accumulate(gradient(loss_fn), 2))(variables, {}, batch, None)
    np.testing.assert_allclose(pieces[1], loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), pieces[0], grads)


def test_predict_and_evaluate(model_and_variables):
    model, variables = model_and_variables
    batch = make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_p = jax.nn.log_softmax(jax.jit(model.apply)(variables, **inputs).logits)
    expected = np.take_along_axis(np.asarray(log_p)[:, :-1], batch["input_ids"][:, 1:, None], -1)
    real = batch["attention_mask"][:, 1:] == 1
    predict = jax.jit(causal_lm.predict(model, chunk_size=16))
    ours = predict(variables, batch)
    np.testing.assert_allclose(ours[:, 1:], np.where(real, expected[..., 0], 0.0), atol=1e-5)
    assert not np.asarray(ours[:, 0]).any()
    halves = [{name: value[part] for name, value in batch.items()} for part in ([2, 0], [1, 3])]
    scores = causal_lm.evaluate(model, variables, halves, num_bytes=np.array([10, 20, 30, 40]))
    total = -expected[..., 0][real].sum()
    assert scores["tokens"] == real.sum()
    assert scores["nll"] == pytest.approx(total / real.sum(), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(total / real.sum()), rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(total / math.log(2) / 100, rel=1e-5)
    right = np.asarray(log_p).argmax(-1)[:, :-1] == batch["input_ids"][:, 1:]
    assert scores["accuracy"] == pytest.approx(right[real].mean(), rel=1e-5)

    def padded_before(rows):
        by = (T - batch["attention_mask"].sum(axis=1))[:, None]
        return np.take_along_axis(np.asarray(rows), (np.arange(T) - by) % T, axis=1)

    before = batch | {name: padded_before(batch[name]) for name in ("input_ids", "attention_mask")}
    np.testing.assert_array_equal(predict(variables, before), padded_before(ours))
    same = causal_lm.evaluate(model, variables, [before])
    assert same == pytest.approx({name: scores[name] for name in same}, rel=1e-5)


def test_load_balance_equals_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = np.random.default_rng(0).normal(size=(3, 2 * 5, 4)).astype(np.float32)
    keep = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    for mask in (keep, np.ones_like(keep)):
        ours = causal_lm.load_balance(tuple(map(jnp.asarray, logits)), 2, jnp.asarray(mask))
        theirs = load_balancing_loss_func(
            tuple(map(torch.tensor, logits)), 4, 2, torch.tensor(mask)
        )
        np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    even = jnp.eye(4)[jnp.arange(10) % 4][:8] * 30.0
    found = causal_lm.load_balance((even,), 1, jnp.ones((2, 4)))
    np.testing.assert_allclose(found, 1.0, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_counting_is_learnt(precision, model_and_variables):
    model, _ = model_and_variables
    config = dataclasses.replace(CONFIG, initializer_range=0.1)
    model, variables = fmjax.create("bert", config, head="causal_lm", rng=jax.random.key(0))
    loss_fn = causal_lm.loss(model)
    loss_fn = cast(loss_fn, "bfloat16") if precision == "bfloat16" else loss_fn
    tx = optax.adam(2e-2)
    state = init_state(variables, tx, jax.random.key(1))
    step = jit_step(make_train_step(gradient(loss_fn), tx))
    ids = (1 + np.arange(8)[:, None] + np.arange(T)).astype(np.int32)
    for _ in range(40):
        state, metrics = step(state, {"input_ids": ids})
    assert float(metrics["loss"].value) < 0.5
    assert float(metrics["accuracy"].value) > 0.95


def test_bad_batches_are_named(model_and_variables):
    model, variables = model_and_variables
    batch = {**make_batch(), "labels": np.zeros(4, np.int32)}
    with pytest.raises(ValueError, match=r"labels have shape \(4,\), input_ids \(4, 16\)"):
        jax.eval_shape(causal_lm.loss(model), variables, batch, None)
    with pytest.raises(ValueError, match="no batches"):
        causal_lm.evaluate(model, variables, [])
    empty = {**make_batch(), "weight": np.zeros(4, np.float32)}
    with pytest.raises(ValueError, match="num_tokens is 0"):
        causal_lm.evaluate(model, variables, [empty])


def test_a_model_that_sees_what_it_predicts_is_refused(model_and_variables):
    model, _ = model_and_variables
    seeing = model.clone(config=dataclasses.replace(model.config, is_decoder=False))
    for make in (causal_lm.loss, causal_lm.token_log_probs, causal_lm.predict):
        with pytest.raises(ValueError, match=r"is_decoder=False .* sees the tokens"):
            make(seeing)
