"""ELECTRA's joint loss: its parts against PyTorch's, sampling, sharing, learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import fmjax
from fmjax.models.electra import Config
from fmjax.tasks import replaced_token_detection as task
from fmjax.tasks.masked_lm import gather
from fmjax.tasks.masking import Masking, mask_tokens
from fmjax.tasks.vocabulary_loss import unembed_fn
from fmjax.train import gradient, init_state, jit_step, make_train_step
from fmjax.tree import flatten

V, MASK = 40, 4
DISCRIMINATOR = Config(
    vocab_size=V,
    embedding_size=12,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
    initializer_range=0.3,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
GENERATOR = dataclasses.replace(DISCRIMINATOR, hidden_size=8, num_hidden_layers=1)
MASKING = Masking(
    mask_token_id=MASK, vocab_size=V, special_ids=(0, MASK), mask_share=1.0, random_share=0.0
)
SHARED = ("embed/word/", "embed/position/")


@pytest.fixture(scope="module")
def models():
    generator, mine = fmjax.create("electra", GENERATOR, head="masked_lm", rng=jax.random.key(0))
    discriminator, theirs = fmjax.create(
        "electra", DISCRIMINATOR, head="pretraining", rng=jax.random.key(1)
    )
    return generator, discriminator, mine, theirs


def make_batch(rows=4, length=14, seed=0):
    draw = np.random.default_rng(seed)
    mask = (np.arange(length) < draw.integers(8, length + 1, rows)[:, None]).astype(np.int32)
    return {
        "input_ids": draw.integers(5, V, (rows, length)).astype(np.int32) * mask,
        "attention_mask": mask,
        "weight": np.ones(rows, np.float32),
        "index": np.arange(rows, dtype=np.int32),
    }


def test_loss_equals_pytorch_on_the_same_masks_and_samples(models, tmp_path):
    from transformers import ElectraForMaskedLM, ElectraForPreTraining

    generator, discriminator, mine, theirs = models
    batch = make_batch()
    masked = jax.jit(mask_tokens, static_argnames="masking")(None, batch, MASKING)

    @jax.jit
    def states(variables):
        inputs = {name: masked.batch[name] for name in ("input_ids", "attention_mask")}
        out = generator.apply(variables, **inputs, output_logits=False)
        hidden = gather(out.last_hidden_state, masked.positions)
        return task.corrupt(None, batch, masked, unembed_fn(generator, variables), hidden)

    fake = np.asarray(states(mine))
    old = batch["input_ids"]
    used = np.asarray(masked.labels) != -100
    at = np.zeros(old.shape, bool)
    at[np.nonzero(used)[0], np.asarray(masked.positions)[used]] = True
    np.testing.assert_array_equal(fake[~at], old[~at])
    assert (fake[at] != old[at]).any()

    variables = task.join(mine, theirs)
    loss_fn = task.loss(generator, discriminator, masking=MASKING, train=False, chunk_size=12)
    grads, loss, aux = jax.jit(gradient(loss_fn))(variables, {}, batch, None)
    fmjax.save(tmp_path / "g", generator, mine)
    fmjax.save(tmp_path / "d", discriminator, theirs)
    g = ElectraForMaskedLM.from_pretrained(tmp_path / "g").eval()
    d = ElectraForPreTraining.from_pretrained(tmp_path / "d").eval()
    mask = torch.tensor(batch["attention_mask"])
    labels = torch.tensor(np.where(at, old, -100)).long()
    masked_ids = torch.tensor(np.array(masked.batch["input_ids"]))
    first = g(input_ids=masked_ids, attention_mask=mask, labels=labels).loss
    second = d(
        input_ids=torch.tensor(fake),
        attention_mask=mask,
        labels=torch.tensor((fake != old).astype(np.int64)),
    ).loss
    (first + 50.0 * second).backward()
    np.testing.assert_allclose(aux.metrics["generator_nll"].value, first.item(), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["discriminator_loss"].value, second.item(), rtol=1e-5)
    np.testing.assert_allclose(loss, (first + 50.0 * second).item(), rtol=1e-5)
    assert float(aux.weight) == batch["attention_mask"].sum()
    for side, twin in (("generator", g), ("discriminator", d)):
        table = twin.electra.embeddings.word_embeddings.weight.grad
        ours = grads["params"][side]["embed"]["word"]["embedding"]
        np.testing.assert_allclose(ours, table, atol=2e-5 * table.abs().max().item())


@pytest.mark.slow
def test_samples_follow_the_generator():
    """The same two words' odds at every position, whatever the chunk."""
    rows, length = 200, 12
    logits = jnp.log(jnp.array([0.7, 0.3]))
    batch = {"input_ids": np.full((rows, length), 9, np.int32), "index": np.arange(rows)}
    masking = Masking(mask_token_id=4, vocab_size=10, probability=1.0)
    masked = mask_tokens(None, batch, masking)
    hidden = jnp.zeros((rows, length, 1))

    def draw(rng, chunk_size):
        return task.corrupt(
            rng,
            batch,
            masked,
            lambda h: jnp.broadcast_to(logits, (*h.shape[:-1], 2)),
            hidden,
            chunk_size=chunk_size,
        )

    fake = np.asarray(draw(jax.random.key(0), 500))
    assert set(np.unique(fake)) == {0, 1}
    share = fake.mean()
    assert abs(share - 0.3) < 4 * np.sqrt(0.21 / fake.size)
    np.testing.assert_array_equal(fake, draw(jax.random.key(0), 10_000))
    np.testing.assert_array_equal(draw(None, 500), draw(None, 700))


@pytest.mark.slow
def test_shared_parameters_are_one(models):
    generator, discriminator, mine, theirs = models
    joined = task.join(mine, theirs, shared=SHARED)
    paths = flatten(joined["params"])
    assert "generator/embed/word/embedding" not in paths
    assert "generator/embed/token_type/embedding" in paths
    again = flatten(task.part(joined, "generator", shared=SHARED)["params"])
    assert again.keys() == flatten(mine["params"]).keys()
    table = theirs["params"]["embed"]["word"]["embedding"]
    np.testing.assert_array_equal(again["embed/word/embedding"], table)
    loss_fn = task.loss(generator, discriminator, masking=MASKING, shared=SHARED, train=False)
    grads, loss, _ = jax.jit(gradient(loss_fn))(joined, {}, make_batch(), None)
    # As if the generator had a copy: its gradient is added to the discriminator's.
    copied = {"params": {"generator": task.part(joined, "generator", shared=SHARED)["params"],
                         "discriminator": theirs["params"]}}  # fmt: skip
    apart = task.loss(generator, discriminator, masking=MASKING, train=False)
    expected, same, _ = jax.jit(gradient(apart))(copied, {}, make_batch(), None)
    np.testing.assert_allclose(loss, same, rtol=1e-6)
    total = sum(
        expected["params"][side]["embed"]["word"]["embedding"]
        for side in ("generator", "discriminator")
    )
    ours = grads["params"]["discriminator"]["embed"]["word"]["embedding"]
    np.testing.assert_allclose(ours, total, atol=1e-5 * np.abs(total).max())
    with pytest.raises(ValueError, match=r"no parameter 'embed/words/'.*must have one shape"):
        task.join(mine, theirs, shared=("embed/words/", "embed/project"))


@pytest.mark.slow
def test_padding_rows_and_evaluation(models):
    generator, discriminator, mine, theirs = models
    variables = task.join(mine, theirs)
    batch = make_batch()
    loss_fn = task.loss(generator, discriminator, masking=MASKING, train=False)
    halves = [{name: value[part] for name, value in batch.items()} for part in ([3, 0], [2, 1])]
    found = task.evaluate(generator, discriminator, variables, halves, masking=MASKING)
    whole = jax.jit(loss_fn)
    for name, mean in whole(variables, batch, None)[1].metrics.items():
        assert found[name] == pytest.approx(float(mean.value), rel=1e-5), name
    batch["weight"] = np.array([1, 0, 0, 1], np.float32)
    part, aux = whole(variables, batch, None)
    alone, half = jax.jit(loss_fn)(variables, halves[0], None)
    np.testing.assert_allclose(part, alone, rtol=1e-5)
    assert float(aux.weight) == float(half.weight)


@pytest.mark.slow
def test_replaced_tokens_are_found(models):
    """Rows repeat one token: what differs was replaced."""
    generator, discriminator, mine, theirs = models
    tx = optax.adam(1e-2)
    variables = jax.tree.map(jnp.copy, task.join(mine, theirs))
    state = init_state(variables, tx, jax.random.key(0))
    loss_fn = task.loss(generator, discriminator, masking=MASKING)
    step = jit_step(make_train_step(gradient(loss_fn), tx))
    ids = np.repeat(np.arange(8, 24, dtype=np.int32)[:, None], 12, axis=1)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["discriminator_loss"].value))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    trained = task.part(state.trainable, "discriminator")
    odd = ids.copy()
    odd[:, 5] = 7
    found = np.asarray(jax.jit(task.predict(discriminator))(trained, {**batch, "input_ids": odd}))
    assert (found.argmax(axis=1) == 5).mean() > 0.7


def test_a_discriminator_must_speak_of_every_token(models):
    generator, _, mine, _ = models
    wrong, weights = fmjax.create(
        "electra", DISCRIMINATOR, head="token_classification", rng=jax.random.key(0)
    )
    loss_fn = task.loss(generator, wrong, masking=MASKING, train=False)
    with pytest.raises(ValueError, match=r"logits have shape \(4, 14, 2\)"):
        jax.eval_shape(loss_fn, task.join(mine, weights), make_batch(), None)
