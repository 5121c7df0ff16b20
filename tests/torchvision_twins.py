"""Nets that Hugging Face does not have against PyTorch layers under torchvision's names."""

import dataclasses

import jax
import numpy as np
import torch
from parity import assert_near, exported
from torch import nn

import fmjax
from fmjax.tasks.apply import apply_fn
from fmjax.tree import count_parameters, flatten

LABELS = ("a", "b", "c")
HEAD = "image_classification"


def conv_norm(width, features, size, stride=1, padding=0):
    """Torchvision's BasicConv2d."""
    module = nn.Module()
    module.conv = nn.Conv2d(width, features, size, stride, padding, bias=False)
    module.bn = nn.BatchNorm2d(features, eps=0.001)
    module.forward = lambda x: torch.relu(module.bn(module.conv(x)))
    return module


def randomise(twin):
    """Every weight random; what layers give is neither lost nor grows."""
    torch.manual_seed(0)
    for name, tensor in twin.state_dict().items():
        if tensor.ndim > 1:
            tensor.copy_(torch.randn_like(tensor) * (2 / tensor[0].numel()) ** 0.5)
        elif name.endswith(("bias", "running_mean")):
            tensor.copy_(0.2 * torch.randn_like(tensor))
        elif tensor.is_floating_point():
            tensor.copy_(0.8 + 0.4 * torch.rand_like(tensor))


def check_twin(family, config, twin, pixels, tmp_path, *, gradient_tolerance=2e-5, floor=1e-2):
    """Logits, at earlier layers too; training's gradients and statistics; the way there and back.

    Args:
        family: a module of fmjax.models.
        config: its Config, without dropout.
        twin: gives logits, or in training them and a list of those of earlier layers.
        pixels: [B, X, Y, C].
        tmp_path: an empty folder.
        gradient_tolerance: relative to a tensor's largest gradient, or `floor` times the model's.
        floor: sums that nearly cancel have no more than that.
    """
    randomise(twin)
    torch.save(twin.state_dict(), tmp_path / "twin.pth")
    model, variables = fmjax.load_weights(
        tmp_path / "twin.pth", family.MODEL_TYPE, config, head=HEAD
    )
    named = exported(family, model, variables)
    assert named.keys() == twin.state_dict().keys()
    for name, tensor in twin.state_dict().items():
        np.testing.assert_array_equal(named[name], tensor, err_msg=name)
    check_logits(model, variables, twin.double().eval(), pixels)
    check_training(family, model, variables, twin, pixels, gradient_tolerance, floor)
    fmjax.save(tmp_path / "again", model, variables)
    again, read = fmjax.load(tmp_path / "again")
    assert again == model
    for path, leaf in flatten(read).items():
        np.testing.assert_array_equal(leaf, flatten(variables)[path], err_msg=path)


def check_logits(model, variables, twin, pixels):
    """Without training, of the classifier alone."""
    out = jax.jit(model.apply)(variables, pixels)
    assert out.auxiliary_logits is None
    assert_near(out.logits, twin(torch.tensor(pixels).double().movedim(-1, 1)).detach(), "logits")


def check_training(family, model, variables, twin, pixels, tolerance, floor):
    """The batch's own statistics, what they do to gradients, and the running ones they leave."""
    theirs = twin.train()(torch.tensor(pixels).double().movedim(-1, 1))
    logits, earlier = (theirs, []) if isinstance(theirs, torch.Tensor) else theirs
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=tuple(logits.shape)) for _ in (logits, *earlier)]
    apply = apply_fn(model)

    @jax.jit
    def run(variables):
        def total(params):
            inputs = {"pixel_values": pixels}
            out, updates = apply(variables | {"params": params}, inputs, None, train=True)
            found = (out.logits, *(out.auxiliary_logits or ()))
            pairs = zip(found, weights, strict=True)
            return sum((some * weight).sum() for some, weight in pairs), (found, updates)

        return jax.value_and_grad(total, has_aux=True)(variables["params"])

    (_, (found, updates)), grads = run(variables)
    for ours, other in zip(found, (logits, *earlier), strict=True):
        assert_near(ours, other.detach(), "logits in training", 2e-5)
    pairs = zip((logits, *earlier), weights, strict=True)
    sum((some * torch.tensor(weight)).sum() for some, weight in pairs).backward()
    statistics = variables.get("batch_stats", {})
    ours = exported(family, model, {"batch_stats": statistics, "params": grads})
    largest = max(float(parameter.grad.abs().max()) for parameter in twin.parameters())
    for name, parameter in twin.named_parameters():
        scale = max(float(parameter.grad.abs().max()), floor * largest)
        error = np.abs(ours[name] - parameter.grad.numpy()).max() / scale
        assert error < tolerance, f"gradient of {name}: {error}"
    moved = exported(family, model, {"params": variables["params"], **updates})
    for name, buffer in twin.named_buffers():
        assert_near(moved[name], buffer, name, 2e-5)


def check_counts(family, counts):
    """Classifiers of 1,000 classes have torchvision's numbers of parameters, by variant."""
    for variant, count in counts.items():
        config = dataclasses.replace(
            family.VARIANTS[variant], id2label=tuple(map(str, range(1000)))
        )
        model = family.Model(config, head=HEAD)
        assert count_parameters(fmjax.hub.abstract_variables(model)) == count, variant
