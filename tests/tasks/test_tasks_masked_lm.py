"""Masking as the paper has it; losses equal to PyTorch's; padding, gathering, evaluation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import fmjax
from fmjax.models.bert import Config
from fmjax.tasks import masked_lm
from fmjax.tasks.masking import Masking, gather_labels, mask_tokens
from fmjax.train import cast, gradient, init_state, jit_step, make_train_step

V, MASK = 60, 4
CONFIG = Config(
    vocab_size=V,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=40,
    initializer_range=0.3,
)
MASKING = Masking(mask_token_id=MASK, vocab_size=V, special_ids=(0, 1, 2, 3, MASK))


def make_batch(rows=6, length=20, seed=0):
    """Rows of different lengths with a first and last special token, the last one padding."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(length // 2, length + 1, rows)
    ids = draw.integers(5, V, (rows, length)).astype(np.int32)
    ids[:, 0] = 2
    ids[np.arange(rows), sizes - 1] = 3
    mask = (np.arange(length) < sizes[:, None]).astype(np.int32)
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "weight": (np.arange(rows) < rows - 1).astype(np.float32),
        "index": np.where(np.arange(rows) < rows - 1, np.arange(rows), -1).astype(np.int32),
    }


mask = jax.jit(mask_tokens, static_argnames="masking")


@pytest.fixture(scope="module")
def pretraining():
    return fmjax.create("bert", CONFIG, head="pretraining", rng=jax.random.key(0))


def test_shares_are_the_papers(rng):
    batch = make_batch(rows=400, length=40)
    masked = mask(rng, batch, MASKING)
    old, new = batch["input_ids"], np.asarray(masked.batch["input_ids"])
    used = np.asarray(masked.labels) != -100
    may = (old >= 5).sum(axis=1)
    np.testing.assert_array_equal(used.sum(axis=1), np.floor(0.15 * may + 0.5).clip(1))
    assert masked.labels.shape == (400, 6)  # 15% of 40
    at = np.asarray(masked.positions)[used]
    row = np.nonzero(used)[0]
    np.testing.assert_array_equal(np.asarray(masked.labels)[used], old[row, at])
    assert (old[row, at] >= 5).all()  # no special token and no padding
    changed = new.copy()
    changed[row, at] = old[row, at]
    np.testing.assert_array_equal(changed, old)  # nothing else has changed
    total, chosen = len(row), new[row, at]
    # binomial: 4 standard deviations
    for share, hits in ((0.8, chosen == MASK), (0.1 + 0.1 / V, chosen == old[row, at])):
        assert abs(hits.mean() - share) < 4 * math.sqrt(share * (1 - share) / total)
    others = chosen[(chosen != MASK) & (chosen != old[row, at])]
    assert len(np.unique(others)) > V / 2  # drawn from the whole vocabulary
    spread = np.bincount(at, minlength=40)[2:18]  # every row has these positions
    assert spread.min() > spread.mean() / 2
    np.testing.assert_array_equal(masked.weights, used * batch["weight"][:, None])
    again = mask(jax.random.key(1), batch, MASKING)
    assert (np.asarray(again.batch["input_ids"]) != new).any()


def test_evaluation_masks_each_example_alike():
    batch = make_batch()
    whole = np.asarray(mask(None, batch, MASKING).batch["input_ids"])
    order = np.array([3, 1, 4, 0])
    part = {name: np.pad(v[order], [(0, 0)] + [(0, 4)] * (v.ndim - 1)) for name, v in batch.items()}
    padded = np.asarray(
        mask(None, part, MASKING).batch["input_ids"]
    )  # in another order and longer rows
    np.testing.assert_array_equal(padded[:, :20], whole[order])


def test_whole_words(rng):
    draw = np.random.default_rng(0)
    rows, length = 300, 24
    ids = draw.integers(5, V, (rows, length)).astype(np.int32)
    words = np.cumsum(draw.random((rows, length)) < 0.5, axis=1).astype(np.int32)
    words[:, 0] = words[:, 12] = -1  # special tokens; the second text counts anew
    words[:, 13:] -= words[:, 13:14]
    masking = dataclasses.replace(
        MASKING, whole_words=True, probability=0.3, mask_share=1.0, random_share=0.0
    )
    batch = {"input_ids": ids, "word_ids": words}
    masked = mask(rng, batch, masking)
    chosen = np.asarray(masked.batch["input_ids"]) == MASK
    assert not chosen[words < 0].any()
    inside = (words[:, 1:] == words[:, :-1]) & (words[:, 1:] >= 0)
    np.testing.assert_array_equal(chosen[:, 1:][inside], chosen[:, :-1][inside])
    wanted = math.floor(0.3 * 22 + 0.5)  # 7 of 22
    counts = chosen.sum(axis=1)
    assert counts.max() <= wanted == masked.labels.shape[1]
    assert (counts == wanted).mean() > 0.8  # short words fill the rest
    np.testing.assert_array_equal((np.asarray(masked.labels) != -100).sum(axis=1), counts)
    single = {"input_ids": ids, "word_ids": np.arange(length, dtype=np.int32) + 0 * ids}
    assert (np.asarray(mask(rng, single, masking).labels) != -100).all()
    with pytest.raises(ValueError, match="needs word_ids"):
        mask_tokens(rng, {"input_ids": ids}, masking)


def test_special_tokens_mask_and_cap(rng):
    batch = make_batch()
    batch["special_tokens_mask"] = np.ones_like(batch["input_ids"])
    batch["special_tokens_mask"][:, 5:7] = 0
    masked = mask(rng, batch, dataclasses.replace(MASKING, probability=1.0))
    used = np.asarray(masked.labels) != -100
    assert set(np.asarray(masked.positions)[used]) == {5, 6}
    capped = dataclasses.replace(MASKING, probability=1.0, max_predictions=3)
    assert (np.asarray(mask(rng, make_batch(), capped).labels) != -100).sum() == 6 * 3
    batch["special_tokens_mask"][:] = 1
    assert (np.asarray(mask(rng, batch, MASKING).labels) == -100).all()


def test_loss_and_gradient_equal_pytorch(pretraining, tmp_path):
    from transformers import BertForMaskedLM, BertForPreTraining

    model, variables = pretraining
    fmjax.save(tmp_path, model, variables)
    batch = make_batch()
    batch["weight"] = np.ones(6, np.float32)
    labels = np.where(np.random.default_rng(1).random((6, 20)) < 0.3, batch["input_ids"], -100)
    pair = np.array([0, 1, 1, 0, 1, 0], np.int32)
    inputs = {name: torch.tensor(batch[name]) for name in ("input_ids", "attention_mask")}

    twin = BertForPreTraining.from_pretrained(tmp_path).eval()
    reference = twin(
        **inputs,
        labels=torch.tensor(labels).long(),
        next_sentence_label=torch.tensor(pair).long(),
    ).loss
    reference.backward()
    given = {**batch, "labels": labels, "next_sentence_label": pair}
    loss_fn = masked_lm.loss(model, train=False, chunk_size=30)
    grads, loss, aux = jax.jit(gradient(loss_fn))(variables, {}, given, None)
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-5)
    assert float(aux.weight) == (labels != -100).sum()
    for ours, theirs in (
        (grads["params"]["embed"]["word"]["embedding"], twin.bert.embeddings.word_embeddings),
        (grads["params"]["head"]["seq_relationship"]["kernel"].T, twin.cls.seq_relationship),
    ):
        np.testing.assert_allclose(ours, theirs.weight.grad, atol=1e-5)

    alone = BertForMaskedLM.from_pretrained(tmp_path).eval()
    reference = alone(**inputs, labels=torch.tensor(labels).long()).loss.item()
    del given["next_sentence_label"]
    for cap in (None, 12):
        capped = jax.jit(masked_lm.loss(model, train=False, max_predictions=cap))
        np.testing.assert_allclose(capped(variables, given, None)[0], reference, rtol=1e-5)
    short = jax.jit(masked_lm.loss(model, train=False, max_predictions=2))
    assert np.isnan(short(variables, given, None)[0])  # labels would be lost


def test_sentence_order_equals_pytorch(tmp_path):
    from transformers import AlbertForPreTraining

    from fmjax.models.albert import Config as AlbertConfig

    config = AlbertConfig(
        vocab_size=V,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        initializer_range=0.3,
    )
    model, variables = fmjax.create("albert", config, head="pretraining", rng=jax.random.key(0))
    fmjax.save(tmp_path, model, variables)
    twin = AlbertForPreTraining.from_pretrained(tmp_path).eval()
    batch = make_batch()
    batch["weight"] = np.ones(6, np.float32)
    batch["labels"] = np.where(batch["input_ids"] % 3 == 1, batch["input_ids"], -100)
    batch["sentence_order_label"] = np.array([1, 0, 0, 1, 0, 0], np.int32)
    names = ("input_ids", "attention_mask", "labels", "sentence_order_label")
    reference = twin(**{name: torch.tensor(batch[name]).long() for name in names}).loss
    loss, aux = jax.jit(masked_lm.loss(model, train=False))(variables, batch, None)
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-5)
    assert {"sentence_order_loss", "sentence_order_accuracy"} <= aux.metrics.keys()


def test_masking_here_equals_masking_before(pretraining):
    model, variables = pretraining
    batch = make_batch()
    masked = mask(None, batch, MASKING)
    labels = np.full((6, 20), -100)
    used = np.asarray(masked.labels) != -100
    row = np.nonzero(used)[0]
    labels[row, np.asarray(masked.positions)[used]] = np.asarray(masked.labels)[used]
    before = {**batch, "input_ids": masked.batch["input_ids"], "labels": labels}
    loss_fn = jax.jit(masked_lm.loss(model, masking=MASKING, train=False))
    a, aux = loss_fn(variables, batch, None)
    b, _ = jax.jit(masked_lm.loss(model, train=False))(variables, before, None)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    kept = {name: value[:5] for name, value in batch.items()}  # without the padding row
    c, kept_aux = loss_fn(variables, kept, None)
    np.testing.assert_allclose(a, c, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["masked_accuracy"], kept_aux.metrics["masked_accuracy"])
    assert float(aux.weight) == float(kept_aux.weight)


def test_gathering_keeps_the_first_labels():
    labels = jnp.array([[-100, 7, -100, 8, 9], [5, -100, -100, -100, -100]])
    found = gather_labels({"weight": np.array([1.0, 0.5])}, labels, 3)
    assert found.labels.tolist() == [[7, 8, 9], [5, -100, -100]]
    assert np.asarray(found.positions)[:, 0].tolist() == [1, 0]
    assert found.weights.tolist() == [[1, 1, 1], [0.5, 0, 0]]
    assert np.isnan(gather_labels({}, labels, 2).weights).any(axis=1).tolist() == [True, False]


def test_evaluate_and_predict(pretraining):
    model, variables = pretraining
    batch = make_batch()
    batch["next_sentence_label"] = np.array([0, 1, 1, 0, 1, 0], np.int32)
    halves = [
        {name: value[part] for name, value in batch.items()} for part in ([5, 2, 0], [1, 4, 3])
    ]
    whole = masked_lm.evaluate(model, variables, [batch], masking=MASKING)
    parts = masked_lm.evaluate(model, variables, halves, masking=MASKING)
    for name in ("masked_nll", "masked_accuracy", "next_sentence_loss", "next_sentence_accuracy"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name
    assert whole["masked_perplexity"] == pytest.approx(math.exp(whole["masked_nll"]))
    assert whole["loss"] == pytest.approx(whole["masked_nll"] + whole["next_sentence_loss"])
    predict = jax.jit(masked_lm.predict(model, top_k=3, chunk_size=16))
    ids, probabilities = predict(variables, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    full = jax.nn.softmax(jax.jit(model.apply)(variables, **inputs).prediction_logits)
    np.testing.assert_array_equal(ids[..., 0], full.argmax(-1))
    np.testing.assert_allclose(probabilities, np.sort(full)[..., :-4:-1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_pattern_is_learnt(precision):
    """A row repeats one token: a masked one follows from its neighbours."""
    config = dataclasses.replace(CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, variables = fmjax.create("bert", config, head="masked_lm", rng=jax.random.key(0))
    loss_fn = masked_lm.loss(model, masking=dataclasses.replace(MASKING, probability=0.3))
    loss_fn = cast(loss_fn, "bfloat16") if precision == "bfloat16" else loss_fn
    tx = optax.adam(2e-2)
    state = init_state(variables, tx, jax.random.key(1))
    step = jit_step(make_train_step(gradient(loss_fn), tx))
    ids = np.repeat(np.arange(5, 15, dtype=np.int32)[:, None], 8, axis=1)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(metrics["masked_nll"].value)
    assert np.mean(losses[:3]) > 3.0
    assert np.mean(losses[-10:]) < 1.0  # 2.3 if it knew only which tokens there are


def test_bad_settings_are_named(pretraining):
    model, variables = pretraining
    with pytest.raises(ValueError, match=r"probability is 0.*max_predictions is 0.*ids \[99\]"):
        Masking(mask_token_id=99, vocab_size=V, probability=0, max_predictions=0)
    with pytest.raises(ValueError, match="more than 1"):
        Masking(mask_token_id=4, vocab_size=V, mask_share=0.95)
    with pytest.raises(ValueError, match="give it there"):
        masked_lm.loss(model, masking=MASKING, max_predictions=3)
    with pytest.raises(ValueError, match="no labels"):
        jax.eval_shape(masked_lm.loss(model), variables, make_batch(), None)
    bare, weights = fmjax.create("bert", CONFIG, head="masked_lm", rng=jax.random.key(0))
    batch = {**make_batch(), "sentence_order_label": np.zeros(6, np.int32)}
    with pytest.raises(ValueError, match="head 'masked_lm' does not predict"):
        jax.eval_shape(masked_lm.loss(bare, masking=MASKING), weights, batch, jax.random.key(0))


def test_masking_of_a_tokenizer(tiny_bert):
    tokenizer = fmjax.load_tokenizer(tiny_bert)
    masking = Masking.of(tokenizer, whole_words=True)
    assert masking.mask_token_id == tokenizer.mask_token_id
    assert masking.vocab_size == len(tokenizer)
    assert set(masking.special_ids) == set(tokenizer.all_special_ids)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        Masking.of(tokenizer)
