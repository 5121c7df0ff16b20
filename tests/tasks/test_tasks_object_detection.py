"""Detection's loss and detections against transformers' DETR."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import assert_near
from transformers import DetrConfig, DetrImageProcessorPil
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

from fmjax.config import config_to_json
from fmjax.models import detr
from fmjax.tasks import object_detection as task
from fmjax.types import Output

COSTS = detr.Config(
    class_cost=2, giou_cost=3, bbox_loss_coefficient=4, eos_coefficient=0.3, auxiliary_loss=True,
    decoder_layers=3, id2label=("a", "b", "c"),
)  # fmt: skip


class Said:
    """A model that says what its variables are: logits and boxes of every layer."""

    config = COSTS

    def apply(self, variables, *, output_intermediate=False, **_):
        logits, boxes = variables["params"]["logits"], variables["params"]["boxes"]  # [L, B, N, .]
        output = Output(logits=logits[-1], pred_boxes=boxes[-1])
        if output_intermediate:
            output = dataclasses.replace(
                output, auxiliary_logits=logits[:-1], auxiliary_boxes=boxes[:-1]
            )
        return output, {}


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


@pytest.fixture
def in_float64():
    """PyTorch's loss makes weights of its default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_loss_equals_pytorch(in_float64):
    """All layers' terms and gradients; padding rows and objects do not count."""
    rng = np.random.default_rng(1)
    said = {
        "logits": rng.normal(size=(3, 3, 6, 4)).astype(np.float32),
        "boxes": rng.uniform(0.2, 0.6, size=(3, 3, 6, 4)).astype(np.float32),
    }
    batch = targets() | {"pixel_values": np.zeros((3, 1, 1, 3), np.float32)}
    loss_fn = task.loss(Said(), train=False)
    last_fn = task.loss(Said(), auxiliary=False, train=False)

    @jax.jit
    def run(said):
        def total(said):
            return loss_fn({"params": said}, batch, None)

        last, _ = last_fn({"params": said}, batch, None)
        return *jax.value_and_grad(total, has_aux=True)(said), last

    (loss, aux), grads, last = run(said)
    logits, boxes = (
        torch.tensor(value[:, :2]).double().requires_grad_() for value in said.values()
    )
    theirs, terms, _ = ForObjectDetectionLoss(
        logits[-1], torch_labels(batch), "cpu", boxes[-1], hf_config(), logits, boxes
    )
    theirs.backward()
    assert_near(loss, theirs.detach(), "loss")
    names = {"class_loss": "loss_ce", "l1_loss": "loss_bbox", "giou_loss": "loss_giou"}
    for ours, name in (names | {"count_error": "cardinality_error"}).items():
        assert_near(aux.metrics[ours].value, terms[name].detach(), name)
    assert float(aux.weight) == 2
    for name, tensor in (("logits", logits), ("boxes", boxes)):
        assert_near(grads[name][:, :2], tensor.grad, f"gradient of {name}")
        assert not grads[name][:, 2].any()
    wanted = terms["loss_ce"] + 4 * terms["loss_bbox"] + 2 * terms["loss_giou"]
    assert_near(last, wanted.detach(), "loss of the last layer")


def hf_config():
    data = config_to_json(COSTS, {})
    data.pop("label2id")
    return DetrConfig(**data)


def test_a_batch_without_objects_has_a_loss():
    batch = targets()
    batch["object_mask"] = np.zeros_like(batch["object_mask"])
    logits, boxes = jnp.zeros((3, 6, 4)), jnp.full((3, 6, 4), 0.5)
    parts = task.terms(COSTS, logits, boxes, batch)
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
    parts = task.terms(COSTS, jnp.asarray(logits), jnp.asarray(boxes), batch)
    for part in parts:
        assert abs(float(part.value)) < 1e-6


def test_detections_equal_transformers():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 6, 4)).astype(np.float32)
    boxes = rng.uniform(0.2, 0.6, size=(2, 6, 4)).astype(np.float32)
    sizes = [(48, 64), (40, 50)]
    theirs = DetrImageProcessorPil().post_process_object_detection(
        DetrObjectDetectionOutput(logits=torch.tensor(logits), pred_boxes=torch.tensor(boxes)),
        threshold=0.3,
        target_sizes=sizes,
    )
    output = Output(logits=jnp.asarray(logits), pred_boxes=jnp.asarray(boxes))
    mask = np.zeros((2, 48, 64), np.int32)  # the second picture is smaller: the rest is padding
    for padded, (rows, columns) in zip(mask, sizes, strict=True):
        padded[:rows, :columns] = 1
    pixels = np.zeros((2, 48, 64, 3))
    batch = {"pixel_values": pixels, "pixel_mask": mask, "index": np.array([1, 0])}
    found = task.detect(
        None, {}, [batch], size=2, predict_fn=lambda *_: task.detections(output), threshold=0.3
    )
    for ours, other in zip(found, theirs[::-1], strict=True):
        order = np.argsort(-other["scores"].numpy(), kind="stable")
        assert 0 < len(ours.scores) < 6
        np.testing.assert_allclose(ours.scores, other["scores"].numpy()[order], rtol=1e-5)
        np.testing.assert_array_equal(ours.labels, other["labels"].numpy()[order])
        np.testing.assert_allclose(ours.boxes, other["boxes"].numpy()[order], rtol=1e-5)


def test_too_few_queries_are_refused():
    with pytest.raises(ValueError, match="room for 4 targets and only 2 queries"):
        task.terms(COSTS, jnp.zeros((3, 2, 4)), jnp.zeros((3, 2, 4)), targets())
