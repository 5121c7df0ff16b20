"""Losses of the three heads against PyTorch's; speakers told from each other."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import torch_twin
from waves import SIZES, waves

import fmjax
from fmjax.metrics.verification import equal_error_rate
from fmjax.models import wav2vec2
from fmjax.tasks import audio_classification
from fmjax.train import gradient
from fmjax.types import Output

CONFIG = wav2vec2.Config(**SIZES | {"id2label": ("a", "b", "c"), "xvector_output_dim": 8})


@pytest.mark.slow
@pytest.mark.parametrize(
    "head", ["sequence_classification", "audio_frame_classification", "xvector"]
)
def test_losses_equal_pytorch(head, tmp_path):
    twin = torch_twin(wav2vec2, CONFIG, head)
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    inputs = waves(CONFIG)
    labels = np.array([2, 0])
    theirs = labels
    if head == "audio_frame_classification":
        frames = wav2vec2.frames_of(CONFIG, inputs["input_values"].shape[1])
        labels = np.random.default_rng(0).integers(0, 3, (2, frames))
        theirs = np.eye(3)[labels]
    loss, _ = jax.jit(audio_classification.loss(model, train=False))(
        variables, inputs | {"labels": labels, "weight": np.ones(2)}, None
    )
    out = twin(**{k: torch.tensor(v) for k, v in (inputs | {"labels": theirs}).items()})
    assert float(loss) == pytest.approx(float(out.loss.detach()), rel=1e-5)
    found = jax.jit(audio_classification.predict(model))(variables, inputs)
    assert found.shape == (*labels.shape, 3)
    if head == "xvector":
        vectors = jax.jit(audio_classification.embed(model))(variables, inputs)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-5)
        cosine = torch.nn.functional.cosine_similarity(*out.embeddings.detach(), dim=0)
        assert float(vectors[0] @ vectors[1]) == pytest.approx(float(cosine), abs=1e-5)


def test_speakers_that_are_none():
    """-100 does not count; others make the loss nan, but in padding."""
    cosines = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 3)), jnp.float32)
    model = types.SimpleNamespace(apply=lambda v, **options: (Output(cosines=v["cosines"]), {}))
    loss_fn = audio_classification.speaker_loss(model)
    batch = {"labels": np.array([2, 0, -100, 9]), "weight": np.array([1.0, 1.0, 1.0, 0.0])}
    grads, loss, aux = gradient(loss_fn)({"cosines": cosines}, {}, batch, None)
    kept = {name: value[:2] for name, value in batch.items()}
    assert float(loss) == pytest.approx(float(loss_fn({"cosines": cosines[:2]}, kept, None)[0]))
    assert aux.weight == 2
    assert np.isfinite(grads["cosines"]).all()
    wrong = batch | {"labels": np.array([2, 3, -100, 9])}
    assert np.isnan(loss_fn({"cosines": cosines}, wrong, None)[0])


def test_equal_error_rate_by_hand():
    """One of four pairs of the same is below 0.5, one of four others above it."""
    scores = np.array([0.9, 0.8, 0.7, 0.2, 0.6, 0.4, 0.3, 0.1])
    same = np.arange(8) < 4
    rate, threshold = equal_error_rate(scores, same)
    assert rate == pytest.approx(0.25)
    assert 0.4 <= threshold <= 0.7
    assert equal_error_rate(scores, scores > 0.5)[0] == 0.0
    drawn = np.random.default_rng(0).normal(size=(2, 4000)) + np.array([[2.0], [0.0]])
    rate, threshold = equal_error_rate(drawn.ravel(), np.repeat([True, False], 4000))
    assert rate == pytest.approx(0.1587, abs=0.01)  # of two normal distributions 2 apart
    assert threshold == pytest.approx(1.0, abs=0.1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="the model has 'ctc'"):
        audio_classification.loss(wav2vec2.Model(CONFIG, head="ctc"))
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1"):
        audio_classification.loss(wav2vec2.Model(CONFIG, head="xvector"), label_smoothing=0.1)
    with pytest.raises(ValueError, match="needs pairs of the same"):
        equal_error_rate(np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match=r"must be \[N\] both"):
        equal_error_rate(np.zeros(3), np.ones(2))
