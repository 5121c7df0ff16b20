"""CTC against PyTorch's loss, as transformers calls it; labels that do not fit; transcripts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import assert_near, torch_twin
from waves import SIZES, waves

import fmjax
from fmjax.generate.ctc import greedy, prefix_beam
from fmjax.models import wav2vec2
from fmjax.tasks import ctc

B, T, V, N, BLANK = 5, 12, 7, 6, 3


def case():
    """Random logits, frames and labels: repeats, an empty row, padding of both kinds inside."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, T, V)).astype(np.float32) * 2
    lengths = np.array([12, 9, 12, 7, 5])
    labels = np.array(
        [
            [1, 1, 2, 0, 6, -100],
            [5, -100, 4, 4, BLANK, -100],
            [-100] * 6,
            [2, 0, 2, 0, 2, 0],
            [6, 6, 6, 1, -100, -100],  # needs 6 frames and has 5
        ]
    )
    return logits, lengths, labels


def torchs(logits, lengths, labels, reduction, zero_infinity=False):
    from transformers.loss.loss_ctc import ForCTCLoss

    return ForCTCLoss(
        torch.tensor(logits) if isinstance(logits, np.ndarray) else logits,
        torch.tensor(labels), torch.tensor(lengths), BLANK, reduction, zero_infinity,
    )  # fmt: skip


def test_losses_and_gradients_equal_pytorch():
    logits, lengths, labels = case()
    run = jax.jit(lambda x: ctc.losses(x, lengths, labels, blank=BLANK)[0])
    ours, fits = run(logits), np.array([True, True, True, True, False])
    theirs = torchs(logits, lengths, labels, "none").numpy()
    assert np.isinf(ours[~fits]).all()
    assert np.isinf(theirs[~fits]).all()
    assert_near(ours[fits], theirs[fits], "losses")
    zeroed = jax.jit(
        jax.grad(lambda x: ctc.losses(x, lengths, labels, blank=BLANK, zero_infinity=True)[0].sum())
    )
    tensor = torch.tensor(logits, requires_grad=True)
    torchs(tensor, lengths, labels, "sum", True).backward()
    assert_near(zeroed(logits), tensor.grad, "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_a_models_loss_is_transformers(reduction, zero_infinity, tmp_path):
    config = wav2vec2.Config(
        **SIZES | {"ctc_loss_reduction": reduction, "ctc_zero_infinity": zero_infinity}
    )
    twin = torch_twin(wav2vec2, config, "ctc")
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    inputs = waves(config)
    labels = np.array([[1, 2, 2, 5, -100], [4, 1, 3, 9, 9] if zero_infinity else [4] + [-100] * 4])
    ours, aux = ctc.loss(model, train=False)(variables, inputs | {"labels": labels}, None)
    theirs = twin(**{k: torch.tensor(v) for k, v in (inputs | {"labels": labels}).items()}).loss
    scale = 2 if reduction == "sum" else 1  # PyTorch's sum is not divided by the batch
    assert float(ours) == pytest.approx(float(theirs.detach()) / scale, rel=1e-5)
    assert float(aux.weight) == 2
    assert float(aux.metrics["too_long"].value) == 0


def test_labels_that_do_not_fit_are_named():
    _, lengths, labels = case()
    ctc.check_labels(lengths[:4], labels[:4], blank=BLANK)
    with pytest.raises(ValueError, match="is infinite") as error:
        ctc.check_labels(lengths, labels, blank=BLANK, names=["a", "b", "c", "d", "e.wav"])
    assert "e.wav: 4 labels need 6 frames; it has 5" in str(error.value)
    assert "a:" not in str(error.value)


def test_rows_of_weight_0_do_not_count():
    """Even where their loss is infinite."""
    logits, lengths, labels = case()

    class Fixed:
        config, head = wav2vec2.Config(vocab_size=V, pad_token_id=BLANK), "ctc"

        def apply(self, variables, **inputs):
            out = fmjax.types.Output(logits=variables["x"], logit_lengths=jnp.asarray(lengths))
            return out, {}

    loss = jax.jit(ctc.loss(Fixed(), train=False))
    batch = {"labels": labels, "weight": np.array([1.0, 2, 0, 1, 0])}
    value, aux = loss({"x": jnp.asarray(logits)}, batch, None)
    each = jax.jit(lambda x: ctc.losses(x, lengths, labels, blank=BLANK)[0])(logits)
    assert float(value) == pytest.approx(float(each[0] + 2 * each[1] + each[3]) / 4, rel=1e-6)
    assert float(aux.weight) == 4
    value, aux = loss({"x": jnp.asarray(logits)}, {"labels": labels}, None)
    assert np.isinf(value)
    assert float(aux.metrics["too_long"].total) == 1


@pytest.mark.slow
def test_a_whole_set_is_transcribed():
    """Frames behind an example's last say nothing; decoders are exchanged; errors are counted."""
    config = wav2vec2.Config(**SIZES)
    model, variables = fmjax.create("wav2vec2", config, head="ctc", rng=jax.random.key(0))
    variables = jax.tree.map(lambda x: x + 0.3 * np.random.default_rng(1).normal(size=x.shape),
                             variables)  # fmt: skip
    batch = waves(config) | {"index": np.array([1, 0]), "labels": np.array([[1, 2], [3, -100]])}
    scores = np.asarray(jax.jit(ctc.predict(model))(variables, batch))
    length = model.frames(50)
    assert (scores[1, length:].argmax(-1) == 0).all()
    np.testing.assert_allclose(np.exp(scores).sum(-1), 1, rtol=1e-5)

    def text(ids):
        return " ".join(map(str, ids))

    result = ctc.evaluate(model, variables, [batch], size=2, text=text)
    assert result.references == ["3", "1 2"]
    assert set(result.metrics) == {"wer", "cer"}

    def search(scores):
        return prefix_beam(scores, blank=0, beams=64)[0].symbols

    alone = ctc.evaluate(model, variables, [batch], size=2, text=text, decode=search)
    plainly = partial(greedy, blank=0)
    both = ctc.evaluate_ways(
        model, variables, iter([batch]), size=2, text=text, decodes=(plainly, search)
    )
    assert both == [result, alone]
    cut = prefix_beam(scores[1, :length], blank=0, beams=64)[0].symbols
    assert alone.predictions[0] == text(cut)


def test_what_does_not_fit_is_refused():
    model = wav2vec2.Model(wav2vec2.Config(**SIZES | {"pad_token_id": None}), head="ctc")
    with pytest.raises(ValueError, match="pad_token_id=None is the blank"):
        ctc.loss(model)
    model = wav2vec2.Model(wav2vec2.Config(**SIZES), head="ctc")
    with pytest.raises(ValueError, match="reduction='none'"):
        ctc.loss(model, reduction="none")
