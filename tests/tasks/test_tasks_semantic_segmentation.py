"""Segmentation's loss against transformers' and PyTorch's, its weights, predictions, scores."""

import jax
import numpy as np
import pytest
import torch

import fmjax
from fmjax.models import beit, segformer
from fmjax.tasks import semantic_segmentation as task
from fmjax.train import accumulate, gradient
from fmjax.types import Output

CONFIG = segformer.Config(
    num_encoder_blocks=1, depths=(1,), sr_ratios=(2,), hidden_sizes=(6,), patch_sizes=(3,),
    strides=(2,), num_attention_heads=(2,), mlp_ratios=(2,), decoder_hidden_size=5,
    initializer_range=0.5, drop_path_rate=0.0, classifier_dropout_prob=0.0,
    semantic_loss_ignore_index=9, id2label=("a", "b", "c"),
)  # fmt: skip


class Said:
    """A model whose two heads say what its variables hold."""

    head = "semantic_segmentation"
    config = beit.Config(
        id2label=("a", "b", "c"), semantic_loss_ignore_index=9, auxiliary_loss_weight=0.3
    )

    def apply(self, variables, **inputs):
        return Output(logits=variables["last"], auxiliary_logits=(variables["earlier"],)), {}


def test_auxiliary_heads_add_their_loss(batch):
    """As transformers' BEiT: 0.3 times the other head's, both enlarged to the labels' size."""
    rng = np.random.default_rng(1)
    variables = {
        name: rng.normal(size=(4, *size, 3)).astype(np.float32)
        for name, size in (("last", (6, 7)), ("earlier", (3, 4)))
    }
    loss, aux = task.loss(Said(), train=False)(variables, batch, None)
    labels = torch.tensor(batch["labels"])
    by_head = [
        torch.nn.functional.cross_entropy(
            torch.nn.functional.interpolate(
                torch.tensor(variables[name]).movedim(-1, 1),
                size=labels.shape[1:], mode="bilinear", align_corners=False,
            ),
            labels, ignore_index=9,
        )
        for name in ("last", "earlier")
    ]  # fmt: skip
    np.testing.assert_allclose(loss, by_head[0] + 0.3 * by_head[1], rtol=1e-5)
    assert float(aux.weight) == (batch["labels"] != 9).sum()


@pytest.fixture(scope="module")
def model():
    return fmjax.create("segformer", CONFIG, head="semantic_segmentation", rng=jax.random.key(0))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (4, 11, 14))
    return {
        "pixel_values": rng.normal(size=(4, 11, 14, 3)).astype(np.float32),
        "labels": np.where(rng.random(labels.shape) < 0.2, 9, labels),
        "weight": np.ones(4, np.float32),
    }


def torch_logits(model, batch):
    """Logits at the labels' size, by PyTorch's interpolation: [B, C, X, Y]."""
    net, variables = model
    logits = torch.tensor(np.asarray(net.apply(variables, batch["pixel_values"]).logits))
    return torch.nn.functional.interpolate(
        logits.movedim(-1, 1), size=batch["labels"].shape[1:], mode="bilinear", align_corners=False
    )


def test_loss_and_gradient_equal_transformers(model, batch, tmp_path):
    from transformers import SegformerForSemanticSegmentation

    net, variables = model
    fmjax.save(tmp_path, net, variables)
    twin = SegformerForSemanticSegmentation.from_pretrained(tmp_path).eval()
    reference = twin(
        torch.tensor(batch["pixel_values"]).movedim(-1, 1), labels=torch.tensor(batch["labels"])
    ).loss
    reference.backward()
    statistics = {"batch_stats": variables["batch_stats"]}
    grads, loss, aux = jax.jit(gradient(task.loss(net, train=False)))(
        {"params": variables["params"]}, statistics, batch, None
    )
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-5)
    kernel = grads["params"]["head"]["classifier"]["kernel"][0, 0].T
    theirs = twin.decode_head.classifier.weight.grad[..., 0, 0]
    np.testing.assert_allclose(kernel, theirs, atol=1e-5 * float(theirs.abs().max()))
    assert float(aux.weight) == (batch["labels"] != 9).sum()
    right = torch_logits(model, batch).argmax(1).numpy() == batch["labels"]
    accuracy = right.sum() / (batch["labels"] != 9).sum()
    np.testing.assert_allclose(aux.metrics["accuracy"].value, accuracy, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_smoothing_and_class_weights_equal_pytorch(model, batch, smoothing):
    net, variables = model
    weights, batch["labels"][batch["labels"] == 9] = (0.5, 2.0, 1.0), 255
    reference = torch.nn.functional.cross_entropy(
        torch_logits(model, batch),
        torch.tensor(batch["labels"]),
        weight=torch.tensor(weights),
        ignore_index=255,
        label_smoothing=smoothing,
    )
    loss_fn = task.loss(
        net, train=False, ignored=255, label_smoothing=smoothing, class_weights=weights
    )
    loss, aux = loss_fn(variables, batch, None)
    np.testing.assert_allclose(loss, reference.item(), rtol=1e-5)
    counts = [(batch["labels"] == c).sum() for c in range(3)]
    np.testing.assert_allclose(aux.weight, np.dot(counts, weights), rtol=1e-6)


@pytest.mark.slow
def test_pieces_of_unequal_weight_give_the_gradient_of_the_whole(model, batch):
    """Ignored pixels and padding rows are spread unevenly; statistics are not the batch's."""
    net, variables = model
    batch["labels"][0, 2:] = 9
    batch["weight"][3] = 0
    batch["labels"][3] = 77  # no class, and no matter
    loss_fn = task.loss(net, train=False, class_weights=(0.5, 2.0, 1.0))
    rest = {"batch_stats": variables["batch_stats"]}
    params = {"params": variables["params"]}
    whole, halves = (
        jax.jit(accumulate(gradient(loss_fn), pieces))(params, rest, batch, None)
        for pieces in (1, 2)
    )
    for one, other in zip(*map(jax.tree.leaves, (whole[0], halves[0])), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(whole[1], halves[1], rtol=1e-5)
    assert np.isfinite(float(whole[1]))
    batch["weight"][3] = 1
    assert np.isnan(float(jax.jit(loss_fn)(variables, batch, None)[0]))


def test_predictions_and_their_scores(model, batch):
    net, variables = model
    expected = torch_logits(model, batch).softmax(1).movedim(1, -1)
    rows = task.predict(net)(variables, batch)
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    found = task.segment(net)(variables, batch)
    np.testing.assert_array_equal(found, expected.argmax(-1))
    perfect = {**batch, "labels": np.where(batch["labels"] == 9, 9, np.asarray(found))}
    spoilt = {**batch, "weight": np.zeros(4, np.float32)}
    scores = task.evaluate(net, variables, [perfect, spoilt])
    assert scores["mean_iou"] == scores["pixel_accuracy"] == 1.0
    scores = task.evaluate(net, variables, [batch])
    right = (np.asarray(found) == batch["labels"]).sum()
    np.testing.assert_allclose(scores["pixel_accuracy"], right / (batch["labels"] != 9).sum())


def test_what_does_not_fit_is_refused(model, batch):
    net, variables = model
    with pytest.raises(ValueError, match="label_smoothing is 1") as error:
        task.loss(net, label_smoothing=1.0, class_weights=(1.0, -1.0, 1.0))
    assert "class_weights is (1.0, -1.0, 1.0)" in str(error.value)
    one = net.clone(config=segformer.Config(id2label=("a",)))
    with pytest.raises(ValueError, match="the model has 1 class"):
        task.loss(one)
    with pytest.raises(ValueError, match=r"labels have shape \(4,\)"):
        task.loss(net)(variables, {**batch, "labels": np.zeros(4, int)}, None)
    with pytest.raises(ValueError, match="labels are outside"):
        task.evaluate(net, variables, [batch], ignored=255)
