"""Nets that make images against PyTorch layers under the names of their files."""

import jax
import numpy as np
import torch
from parity import assert_near, exported
from torchvision_twins import randomise

import fmjax
from fmjax.tasks.apply import apply_fn
from fmjax.tree import count_parameters, flatten


def channels_first(array):
    """Numbers of any kind as PyTorch takes them, images' channels first."""
    tensor = torch.tensor(np.asarray(array))
    tensor = tensor.double() if tensor.is_floating_point() else tensor
    return tensor.movedim(-1, 1) if tensor.ndim == 4 else tensor


def check_outputs(
    family, config, head, twin, inputs, fields, tmp_path, *, train=False, tolerance=1e-5,
    gradient_tolerance=3e-5,
):  # fmt: skip
    """The way there and back, outputs, gradients, and the statistics that training leaves.

    Args:
        family: a module of fmjax.models.
        config: its Config.
        head: a key of its HEADS.
        twin: a module whose call on `inputs` gives a tensor a field, images channels first.
        inputs: of the model, by name, in the order of the twin's arguments.
        fields: of the output, in the order of the twin's results.
        tmp_path: an empty folder.
        train: whether batch normalisation is as in training.
        tolerance: of outputs, relative to the largest number.
        gradient_tolerance: relative to a tensor's largest gradient, or a hundredth of the model's.
    """
    randomise(twin)
    torch.save(twin.state_dict(), tmp_path / "twin.pth")
    model, variables = fmjax.load_weights(
        tmp_path / "twin.pth", family.MODEL_TYPE, config, head=head
    )
    named = exported(family, model, variables)
    assert named.keys() == twin.state_dict().keys()
    for name, tensor in twin.state_dict().items():
        np.testing.assert_array_equal(named[name], tensor, err_msg=name)
    fmjax.save(tmp_path / "again", model, variables)
    again, read = fmjax.load(tmp_path / "again")
    assert again == model
    assert flatten(read).keys() == flatten(variables).keys()
    twin = twin.double().train(train)
    theirs = twin(*map(channels_first, inputs.values()))
    theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=tuple(one.shape)) for one in theirs]
    sum((one * torch.tensor(w)).sum() for one, w in zip(theirs, weights, strict=True)).backward()
    weights = [np.moveaxis(w, 1, -1) if w.ndim == 4 else w for w in weights]
    apply = apply_fn(model)

    @jax.jit
    def run(variables):
        def total(params):
            out, updates = apply(variables | {"params": params}, inputs, None, train=train)
            ours = [getattr(out, field) for field in fields]
            return sum((a * w).sum() for a, w in zip(ours, weights, strict=True)), (ours, updates)

        return jax.value_and_grad(total, has_aux=True)(variables["params"])

    (_, (ours, updates)), grads = run(variables)
    for field, mine, other in zip(fields, ours, theirs, strict=True):
        other = other.movedim(1, -1) if other.ndim == 4 else other
        assert_near(mine, other.detach(), field, tolerance)
    collections = {"params": grads, **{k: v for k, v in variables.items() if k != "params"}}
    ours = exported(family, model, collections)
    parameters = dict(twin.named_parameters())
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in found.values())
    for name, parameter in parameters.items():
        grad = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        scale = max(float(np.abs(grad).max()), 1e-2 * largest)
        error = np.abs(ours[name] - grad).max() / scale
        assert error < gradient_tolerance, f"gradient of {name}: {error}"
    if updates:
        moved = exported(family, model, {"params": variables["params"], **updates})
        for name, buffer in twin.named_buffers():
            assert_near(moved[name], buffer, name, 2e-5)


def parameters(family, variant, head="model"):
    """How many a variant with this head has."""
    config = family.VARIANTS[variant]
    return count_parameters(fmjax.hub.abstract_variables(family.Model(config, head=head)))
