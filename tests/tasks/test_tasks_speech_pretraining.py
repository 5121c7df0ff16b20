"""Contrastive pretraining against PyTorch's, with the same masks, negatives and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from parity import assert_near, exported, torch_twin
from waves import SIZES, STABLE, waves

import fmjax
from fmjax.models import wav2vec2
from fmjax.tasks import speech_pretraining
from fmjax.train import gradient, init_state, make_train_step

STILL = dict.fromkeys(
    "hidden_dropout activation_dropout attention_dropout layerdrop feat_quantizer_dropout".split(),
    0.0,
)
SMALL = SIZES | STILL | {"num_negatives": 4}


def others(masked, count, seed=0):
    """Negatives [B, T, K] of each row's masked frames."""
    rng = np.random.default_rng(seed)
    result = np.zeros((*masked.shape, count), np.int64)
    for b, t in np.argwhere(masked):
        result[b, t] = rng.choice(np.setdiff1d(np.flatnonzero(masked[b]), [t]), count)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_equals_pytorch(train, tmp_path, monkeypatch):
    """The sum of both losses, and in training, by the same noise, the gradients."""
    config = wav2vec2.Config(**SMALL | STABLE)
    twin = torch_twin(wav2vec2, config, "pretraining")
    twin.save_pretrained(tmp_path / "torch")
    model, variables = fmjax.load(tmp_path / "torch")
    inputs = waves(config, masked=True)
    masked = inputs["mask_time_indices"]
    negatives = others(masked, config.num_negatives)
    rows, frames = masked.shape
    shape = (rows, frames, config.num_codevector_groups, config.num_codevectors_per_group)
    noise = np.random.default_rng(1).gumbel(size=shape)

    def drawn(logits, tau, hard):
        flat = torch.tensor(noise).reshape(logits.shape)
        soft = torch.softmax((logits + flat) / tau, -1)
        one = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        # PyTorch's rounds otherwise, and equal choices then seldom give equal vectors.
        return one + (soft - soft.detach())

    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", drawn)
    monkeypatch.setattr(jax.random, "gumbel", lambda key, shape: jnp.asarray(noise, jnp.float32))
    twin = twin.double().train(train)
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    tensors["input_values"] = tensors["input_values"].double()
    places = negatives + np.arange(rows)[:, None, None] * frames
    out = twin(**tensors, sampled_negative_indices=torch.tensor(places))

    def total(variables):
        rngs = {"dropout": jax.random.key(0)}
        ours = model.apply(variables, **inputs, train=train, rngs=rngs)
        each, _ = speech_pretraining.contrast(
            ours.projected_states, ours.projected_quantized_states, negatives, temperature=0.1
        )
        codes = config.num_codevector_groups * config.num_codevectors_per_group
        diversity = (codes - ours.codevector_perplexity) / codes * masked.sum()
        contrastive = jnp.where(masked, each, 0.0).sum()
        return contrastive + config.diversity_loss_weight * diversity, (contrastive, diversity)

    (loss, parts), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(variables)
    assert_near(loss, out.loss.detach(), "loss")
    assert_near(parts[0], out.contrastive_loss.detach(), "contrastive")
    assert_near(parts[1], out.diversity_loss.detach(), "diversity")
    out.loss.backward()
    ours = exported(wav2vec2, model, grads)
    theirs = {name: p.grad.numpy() for name, p in twin.named_parameters() if p.grad is not None}
    largest = max(np.abs(grad).max() for grad in theirs.values())
    for name, grad in theirs.items():
        scale = max(np.abs(grad).max(), 1e-2 * largest)
        assert np.abs(ours[name] - grad).max() / scale < 2e-5, name


def test_negatives_are_other_masked_frames_alike_often():
    masked = jnp.asarray(np.random.default_rng(0).random(20) < 0.4)
    drawn = np.asarray(speech_pretraining.draw_negatives(jax.random.key(0), masked, 3000))
    places = np.flatnonzero(masked)
    for place in places:
        counts = np.bincount(drawn[place], minlength=20)
        assert counts[place] == 0
        assert set(np.flatnonzero(counts)) == set(places) - {place}
        expected = 3000 / (len(places) - 1)
        assert np.abs(counts[counts > 0] / expected - 1).max() < 0.2
    few = speech_pretraining.draw_negatives(jax.random.key(0), jnp.arange(5) == 3, 2)
    assert few.shape == (5, 2)


def test_the_same_vector_is_no_negative():
    rng = np.random.default_rng(0)
    states, targets = rng.normal(size=(2, 1, 4, 3)).astype(np.float32)
    targets[0, 2] = targets[0, 0]
    negatives = np.array([[[2, 1], [0, 2], [1, 3], [3, 3]]])
    losses, _ = speech_pretraining.contrast(states, targets, negatives, temperature=0.5)

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    own, other = cosine(states[0, 0], targets[0, 0]), cosine(states[0, 0], targets[0, 1])
    expected = np.log1p(np.exp((other - own) / 0.5))
    assert float(losses[0, 0]) == pytest.approx(expected, rel=1e-5)
    assert float(losses[0, 3]) == pytest.approx(0.0, abs=1e-6)  # itself, twice


@pytest.mark.slow
def test_pretraining_learns_and_padding_rows_do_not_count():
    config = wav2vec2.Config(**SMALL | STABLE)
    model, variables = fmjax.create("wav2vec2", config, head="pretraining", rng=jax.random.key(0))
    values = waves(config, samples=200)
    loss = speech_pretraining.loss(model, mask_length=3, mask_probability=0.4)
    plain = speech_pretraining.loss(model, mask_length=3, mask_probability=0.4, train=False)
    state = init_state(variables, optax.adam(3e-3), jax.random.key(1))
    step = jax.jit(make_train_step(gradient(loss), optax.adam(3e-3)))
    before = float(jax.jit(plain)(variables, values, None)[0])
    for batch in speech_pretraining.annealed([values] * 60, decay=0.9):
        state, _ = step(state, batch)
    after, aux = jax.jit(plain)(state.trainable | state.non_trainable, values, None)
    assert float(after) < before - 0.3
    assert 1 <= float(aux.metrics["perplexity"].value) <= 12
    padded = {name: np.concatenate([value, value[::-1]]) for name, value in values.items()}
    padded |= {"weight": np.array([1.0, 1, 0, 0]), "index": np.array([0, 1, -1, -1])}
    again, aux_again = jax.jit(plain)(variables, padded, None)
    assert float(again) == pytest.approx(before, rel=1e-5)
    assert float(aux_again.weight) > 0


def test_the_temperature_falls():
    batches = [{"input_values": np.zeros((3, 4))}] * 4
    heats = [
        float(batch["gumbel_temperature"][0])
        for batch in speech_pretraining.annealed(batches, decay=0.5, first=1, end=0.3)
    ]
    assert heats == pytest.approx([1.0, 0.5, 0.3, 0.3])


def test_what_does_not_fit_is_refused():
    for settings, words in (
        ({"apply_spec_augment": False}, "masks no frames"),
        ({"add_adapter": True}, "makes states fewer"),
    ):
        model = wav2vec2.Model(wav2vec2.Config(**SIZES | settings), head="pretraining")
        with pytest.raises(ValueError, match=words):
            speech_pretraining.loss(model)
    model = wav2vec2.Model(wav2vec2.Config(**SIZES), head="pretraining")
    with pytest.raises(ValueError, match="mask_probability=0"):
        speech_pretraining.loss(model, mask_probability=0)
