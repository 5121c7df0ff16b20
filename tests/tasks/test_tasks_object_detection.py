"""Detection's loss and detections against transformers' DETR."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import assert_near, torch_twin
from transformers import DetrImageProcessorPil
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

import fmjax
from fmjax.models import detr, resnet
from fmjax.tasks import object_detection as task
from fmjax.types import Output

SMALL = detr.Config(
    backbone_config=resnet.Config(embedding_size=4, hidden_sizes=(8,), depths=(1,)),
    num_queries=6, encoder_layers=1, encoder_ffn_dim=8, encoder_attention_heads=2,
    decoder_layers=2, decoder_ffn_dim=8, decoder_attention_heads=2, d_model=8,
    auxiliary_loss=True, class_cost=2, giou_cost=3, bbox_loss_coefficient=4, eos_coefficient=0.3,
    id2label=("a", "b", "c"),
)  # fmt: skip


def targets(batch=3, objects=4, seed=0):
    """Objects with padding; the last row is padding altogether."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.1, 0.5, (batch, objects, 2))
    centre = size / 2 + rng.uniform(0, 1, size.shape) * (1 - size)
    mask = np.arange(objects) < np.array([3, 1, 2])[:, None]
    boxes = np.concatenate([centre, size], -1)
    return {
        "boxes": np.where(mask[..., None], boxes, np.nan).astype(np.float32),
        "class_labels": np.where(mask, rng.integers(0, 3, mask.shape), -100),
        "object_mask": mask,
        "weight": np.array([1, 1, 0], np.float32),
    }


def torch_labels(batch):
    return [
        {
            "boxes": torch.tensor(boxes[mask]).double(),
            "class_labels": torch.tensor(labels[mask]),
        }
        for boxes, labels, mask, weight in zip(
            batch["boxes"], batch["class_labels"], batch["object_mask"], batch["weight"],
            strict=True,
        )
        if weight
    ]  # fmt: skip


def test_loss_equals_pytorch(tmp_path):
    """All layers' terms and the gradients of the heads; padding rows and objects do not count."""
    twin = torch_twin(detr, SMALL, "object_detection")
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    batch = targets()
    pixels = np.random.default_rng(1).normal(size=(3, 24, 20, 3)).astype(np.float32)
    loss_fn = task.loss(model, train=False)

    @jax.jit
    def run(variables):
        def of_params(params):
            return loss_fn(variables | {"params": params}, batch | {"pixel_values": pixels}, None)

        return jax.value_and_grad(of_params, has_aux=True)(variables["params"])

    (loss, aux), grads = run(variables)
    twin = twin.double()
    theirs = twin(torch.tensor(pixels[:2]).double().movedim(-1, 1), labels=torch_labels(batch))
    theirs.loss.backward()
    assert_near(loss, theirs.loss.detach(), "loss")
    names = {"class_loss": "loss_ce", "l1_loss": "loss_bbox", "giou_loss": "loss_giou"}
    for ours, name in names.items():
        assert_near(aux.metrics[ours].value, theirs.loss_dict[name].detach(), name)
    count = theirs.loss_dict["cardinality_error"]
    np.testing.assert_allclose(aux.metrics["count_error"].value, count, rtol=1e-6)
    assert float(aux.weight) == 2
    for ours, layer in (
        (grads["head_classes"], twin.class_labels_classifier),
        (grads["head_boxes"]["out"], twin.bbox_predictor.layers[2]),
    ):
        assert_near(ours["kernel"], layer.weight.grad.T, "gradient of a kernel", 2e-5)
        assert_near(ours["bias"], layer.bias.grad, "gradient of a bias", 2e-5)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()


def test_a_batch_without_objects_has_a_loss():
    batch = targets()
    batch["object_mask"] = np.zeros_like(batch["object_mask"])
    logits, boxes = jnp.zeros((3, 6, 4)), jnp.full((3, 6, 4), 0.5)
    parts = task.terms(SMALL, logits, boxes, batch)
    np.testing.assert_allclose(parts.classes.value, np.log(4), rtol=1e-6)
    assert parts.l1.value == parts.giou.value == 0


def test_perfect_predictions_cost_nothing():
    """Each object said once, by any query: what remains is the certainty of the classes."""
    batch = targets()
    order = np.array([5, 2, 0, 3])
    boxes = np.full((3, 6, 4), 0.5, np.float32)
    logits = np.zeros((3, 6, 4), np.float32)
    logits[..., 3] = 30.0
    for row in range(3):
        for slot in np.flatnonzero(batch["object_mask"][row]):
            boxes[row, order[slot]] = batch["boxes"][row, slot]
            logits[row, order[slot]] = 30.0 * np.eye(4)[batch["class_labels"][row, slot]]
    parts = task.terms(SMALL, jnp.asarray(logits), jnp.asarray(boxes), batch)
    for part in parts:
        assert abs(float(part.value)) < 1e-6


def test_detections_equal_transformers():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 6, 4)).astype(np.float32)
    boxes = rng.uniform(0.2, 0.6, size=(2, 6, 4)).astype(np.float32)
    sizes = [(48, 64), (48, 64)]
    theirs = DetrImageProcessorPil().post_process_object_detection(
        DetrObjectDetectionOutput(logits=torch.tensor(logits), pred_boxes=torch.tensor(boxes)),
        threshold=0.3,
        target_sizes=sizes,
    )
    output = Output(logits=jnp.asarray(logits), pred_boxes=jnp.asarray(boxes))
    batch = {"pixel_values": np.zeros((2, 48, 64, 3)), "index": np.array([1, 0])}
    found = task.detect(
        None, {}, [batch], size=2, predict_fn=lambda *_: task.detections(output), threshold=0.3
    )
    for ours, other in zip(found, theirs[::-1], strict=True):
        order = np.argsort(-other["scores"].numpy(), kind="stable")
        assert 0 < len(ours.scores) < 6
        np.testing.assert_allclose(ours.scores, other["scores"].numpy()[order], rtol=1e-5)
        np.testing.assert_array_equal(ours.labels, other["labels"].numpy()[order])
        np.testing.assert_allclose(ours.boxes, other["boxes"].numpy()[order], rtol=1e-5)


def test_auxiliary_losses_are_of_the_other_layers():
    """Without them the loss is the last layer's; transformers' switch changes the model itself."""
    config = dataclasses.replace(SMALL, auxiliary_loss=False)
    model, variables = fmjax.create("detr", config, head="object_detection", rng=jax.random.key(0))
    batch = targets() | {"pixel_values": np.ones((3, 16, 16, 3), np.float32)}

    @jax.jit
    def both(variables):
        return [
            task.loss(model, auxiliary=auxiliary, train=False)(variables, batch, None)
            for auxiliary in (False, True)
        ]

    (last, aux), (all_layers, same) = both(variables)
    terms = {name: float(mean.value) for name, mean in aux.metrics.items()}
    expected = terms["class_loss"] + 4 * terms["l1_loss"] + 2 * terms["giou_loss"]
    np.testing.assert_allclose(last, expected, rtol=1e-5)
    assert float(all_layers) > 1.3 * float(last)
    np.testing.assert_allclose(same.metrics["l1_loss"].value, terms["l1_loss"], rtol=1e-5)


def test_too_few_queries_are_refused():
    with pytest.raises(ValueError, match="room for 4 targets and only 2 queries"):
        task.terms(SMALL, jnp.zeros((3, 2, 4)), jnp.zeros((3, 2, 4)), targets())
