"""Speech-Transformer: PyTorch's convolutions and the Transformer's own parity; heads, padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import assert_near, exported, shuffled

import fmjax
from fmjax.models import speech_transformer, transformer
from fmjax.tasks import ctc, joint_transcription
from fmjax.train.step import gradient
from fmjax.tree import flatten

CONFIG = dataclasses.replace(speech_transformer.VARIANTS["tiny"], dropout=0.0)
FRAMES = np.array([13, 6])
LABELS = np.array([[5, 5, 7, 2], [9, 2, -100, -100]])


def draw(seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2, FRAMES.max(), CONFIG.num_mel_bins)).astype(np.float32)
    return {
        "input_features": features,
        "attention_mask": (np.arange(FRAMES.max()) < FRAMES[:, None]).astype(np.int32),
    }


@pytest.fixture(scope="module")
def joint():
    model, variables = fmjax.create(
        "speech_transformer", CONFIG, head="seq2seq_ctc", rng=jax.random.key(0)
    )
    return model, jax.tree.map(jnp.float32, shuffled(variables))


def test_states_are_the_transformers_of_pytorchs_convolutions(joint):
    """Without its padding: torch's Conv2d, then the Transformer, which has a test of its own."""
    model, variables = joint
    given = draw()
    out = jax.jit(model.apply)(variables, **given, decoder_input_ids=np.maximum(LABELS, 0))
    tensors = {
        name: torch.tensor(np.array(value))
        for name, value in exported(speech_transformer, model, variables).items()
    }
    names = {field.name for field in dataclasses.fields(transformer.Config)}
    plain = transformer.Config(**{name: getattr(CONFIG, name) for name in names})
    # Its two tables are one, and the rest of its parameters are ours.
    twin = transformer.Model(plain, head="seq2seq_lm")
    weights = {"params": {n: variables["params"][n] for n in ("embed", "encoder", "decoder")}}
    assert out.logit_lengths.tolist() == [4, 2]
    row, frames = 1, int(FRAMES[1])  # the one with padding
    x = torch.tensor(given["input_features"][row, :frames])[None, None]
    for number in range(2):
        kernel, bias = (tensors[f"front.conv.{number}.{n}"] for n in ("weight", "bias"))
        x = torch.relu(torch.nn.functional.conv2d(x, kernel, bias, stride=2, padding=1))
    x = x[0].transpose(0, 1).flatten(1)  # [S, C * M]
    x = x @ tensors["front.projection.weight"].T + tensors["front.projection.bias"]
    ids = np.maximum(LABELS[row : row + 1], 0)
    reference = jax.jit(twin.apply)(weights, inputs_embeds=x.numpy()[None], decoder_input_ids=ids)
    states = reference.encoder_last_hidden_state
    length = states.shape[1]
    assert length == speech_transformer.output_lengths(frames)
    assert_near(out.encoder_last_hidden_state[row, :length], states[0], "states")
    assert_near(out.logits[row], reference.logits[0], "logits")
    scores = torch.tensor(np.array(states[0])) @ tensors["ctc_head.weight"].T
    assert_near(out.ctc_logits[row, :length], scores + tensors["ctc_head.bias"], "ctc")


@pytest.mark.slow
def test_cached_decoding(joint):
    model, variables = joint
    model = model.clone(head="seq2seq_lm")
    params = {n: v for n, v in variables["params"].items() if n != "ctc_head"}
    given = draw()
    encoded = model.apply({"params": params}, **given, method="encode").last_hidden_state
    ids = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 6))
    full = model.apply({"params": params}, **given, decoder_input_ids=ids).logits
    cache = model.init_cache(2, 6, encoded.shape[1])
    mask = model.state_mask(given["attention_mask"], encoded.shape[1])  # there are no frames then
    parts = []
    for step in range(3):
        out = model.apply(
            {"params": params},
            encoder_outputs=encoded if step == 0 else None,
            attention_mask=mask,
            decoder_input_ids=ids[:, 2 * step : 2 * step + 2],
            cache=cache,
        )
        cache = out.cache
        parts.append(out.logits)
    assert_near(jnp.concatenate(parts, 1), full, "logits")


def test_joint_loss_is_its_parts(joint):
    """CTC's part is that of its own task, and they count as the weight says."""
    model, variables = joint
    batch = draw() | {"labels": LABELS, "weight": np.ones(2, np.float32)}
    total, aux = jax.jit(joint_transcription.loss(model, train=False))(variables, batch, None)
    sound, text = (float(aux.metrics[name].value) for name in ("ctc", "attention"))
    assert float(total) == pytest.approx(0.3 * sound + 0.7 * text)
    alone = model.clone(head="ctc")
    params = {n: variables["params"][n] for n in ("front", "encoder", "ctc_head")}
    batch["labels"] = np.where(LABELS == 2, -100, LABELS)
    of_ctc, _ = jax.jit(ctc.loss(alone, train=False))({"params": params}, batch, None)
    # Its mean is over examples, here it is over labels, the ends among them.
    assert sound == pytest.approx(float(of_ctc) * 2 / 6, rel=1e-5)


@pytest.mark.slow
def test_joint_losses_of_halves_make_the_whole(joint):
    model, variables = joint
    batch = draw() | {"labels": LABELS, "weight": np.ones(2, np.float32)}
    loss = jax.jit(joint_transcription.loss(model, train=False))
    whole, _ = loss(variables, batch, None)
    halves = [
        loss(variables, {name: value[row : row + 1] for name, value in batch.items()}, None)
        for row in range(2)
    ]
    total = sum(float(value) * float(aux.weight) for value, aux in halves)
    assert total / sum(float(aux.weight) for _, aux in halves) == pytest.approx(float(whole))


@pytest.mark.slow
def test_every_parameter_is_trained(joint):
    model, variables = joint
    batch = draw() | {"labels": LABELS, "weight": np.ones(2, np.float32)}
    grads, _, _ = jax.jit(gradient(joint_transcription.loss(model)))(
        variables, {}, batch, jax.random.key(0)
    )
    for path, grad in flatten(grads).items():
        assert np.any(np.asarray(grad) != 0), path


def test_wrong_inputs(joint):
    model, variables = joint
    given = draw()
    with pytest.raises(ValueError, match=r"they must be \[B, T, 10\]"):
        model.apply(variables, given["input_features"][..., :9], decoder_input_ids=LABELS)
    with pytest.raises(ValueError, match="exactly one of input_features and encoder_outputs"):
        model.apply(variables, decoder_input_ids=LABELS)
    with pytest.raises(ValueError, match="does not take decoder_input_ids"):
        model.clone(head="ctc").apply(variables, **given, decoder_input_ids=LABELS)
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        dataclasses.replace(CONFIG, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="ctc_weight=2"):
        joint_transcription.loss(model, ctc_weight=2)
