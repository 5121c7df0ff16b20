"""A family against its PyTorch original: the same random config and weights, every number.

Used by the tests of tests/models: ``from parity import check_head``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch
import transformers

import fmjax
from fmjax.config import config_to_json, parse_config
from fmjax.tasks.apply import apply_fn
from fmjax.tree import count_parameters, flatten, is_running, split, unflatten
from fmjax.weights import export_params

# On tiny models PyTorch's threads do nothing but wait for each other.
torch.set_num_threads(1)

OUTPUTS = (
    "logits",
    "last_hidden_state",
    "pooler_output",
    "prediction_logits",
    "seq_relationship_logits",
    "sop_logits",
    "mc_logits",
    "start_logits",
    "end_logits",
    "encoder_last_hidden_state",
    "pred_boxes",
    "intermediate_hidden_states",
    "reconstruction",
    "extract_features",
    "projected_states",
    "projected_quantized_states",
    "codevector_perplexity",
    "embeddings",
    "image_embeds",
    "text_embeds",
    "logits_per_image",
    "logits_per_text",
    "text_model_output.last_hidden_state",
    "vision_model_output.last_hidden_state",
)
LAYERS = (
    "hidden_states",
    "reshaped_hidden_states",
    "attentions",
    "cross_attentions",
    "encoder_hidden_states",
    "encoder_attentions",
    *(
        f"{side}_model_output.{name}"
        for side in ("text", "vision")
        for name in ("hidden_states", "attentions")
    ),
)


def part_of(out, name):
    """A field of an output, or of one inside it; None where it is not set."""
    for field in name.split("."):
        out = None if out is None else getattr(out, field)
    return out


def assert_near(ours, reference, what, tolerance=1e-5):
    """Within `tolerance` of the reference's largest value."""
    reference = np.asarray(reference, np.float64)
    ours = np.asarray(ours, np.float64)
    assert ours.shape == reference.shape, f"{what}: {ours.shape} is not {reference.shape}"
    scale = max(np.abs(reference).max(initial=0), 1e-6)
    error = np.abs(ours - reference).max(initial=0) / scale
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def torch_twin(family, config, head, seed=0, spread=0.2, implementation="eager"):
    """transformers' model of the same config, every weight random (norms and biases too)."""
    data = config_to_json(config, {})
    data.pop("label2id", None)
    hf = transformers.AutoConfig.for_model(family.MODEL_TYPE, **data)
    hf._attn_implementation = implementation
    hf._experts_implementation = "eager"  # grouped products do not take float64
    torch.manual_seed(seed)
    twin = getattr(transformers, family.HEADS[head])(hf).eval()
    for parameter in twin.parameters():
        if parameter.requires_grad:  # sinusoids are parameters that do not
            parameter.data += spread * torch.randn_like(parameter)
    for bias in logits_biases(twin):
        bias += spread * torch.randn_like(bias)
    for running in running_statistics(twin):
        running += spread * torch.randn_like(running).abs()  # a variance is positive
    return twin


def logits_biases(twin):
    """Constants that files have and PyTorch does not train, of BART and its siblings."""
    return [buffer for name, buffer in twin.named_buffers() if name == "final_logits_bias"]


def running_statistics(twin):
    """Means and variances of batch normalisation, which move without gradients, and the scales and
    biases of a frozen one.
    """
    return [
        buffer
        for name, buffer in twin.named_buffers()
        if ".running_" in name or (".normalization." in name and buffer.is_floating_point())
    ]


def text_inputs(config, head, *, seed=0, length=9, pad_id=None):
    """Random ids and a mask with padding on the right of the second row."""
    rng = np.random.default_rng(seed)
    shape = (2, 3, length) if head == "multiple_choice" else (2, length)
    mask = np.ones(shape, np.int64)
    mask[1, ..., length - 3 :] = 0
    ids = rng.integers(3, config.vocab_size, shape)
    if pad_id is not None:
        ids = np.where(mask == 1, ids, pad_id)
    return {"input_ids": ids, "attention_mask": mask}


def check_head(
    family,
    config,
    head: str,
    tmp_path: Path,
    inputs: dict[str, np.ndarray],
    *,
    seed: int = 0,
    tolerance: float = 1e-5,
    gradient_tolerance: float = 1e-5,
    gradient_floor: float = 1e-2,
    attentions: bool = True,
    spread: float = 0.2,
    unused: Collection[str] = (),
    implementation: str = "eager",
    prepare: Callable[[Any], None] = lambda twin: None,
) -> None:
    """Outputs, hidden states, attentions, gradients, and the weights' way there and back.

    Args:
        family: a module of fmjax.models.
        config: its Config; what is saved by PyTorch must be read as an equal one.
        head: a key of its HEADS.
        tmp_path: an empty folder.
        inputs: by Hugging Face's names, for both sides.
        seed: of the weights.
        tolerance: of outputs, relative to the reference's largest value.
        gradient_tolerance: relative to a tensor's largest gradient, or to `gradient_floor` times
            the model's largest: sums that nearly cancel (query and key kernels) have no more.
        attentions: whether both sides return attention probabilities.
        spread: of the random numbers added to all weights.
        unused: tensors that PyTorch has and does not use, which are not compared.
        implementation: of PyTorch's attention.
        prepare: called with PyTorch's model, to make of it what files hold and its class does not.
    """
    twin = torch_twin(family, config, head, seed, spread, implementation)
    prepare(twin)
    twin.save_pretrained(tmp_path / "torch")
    model, variables = fmjax.load(tmp_path / "torch")
    assert model.head == head
    assert model.config == config
    check_numbers(
        family, model, variables, twin, inputs, tmp_path,
        tolerance=tolerance, gradient_tolerance=gradient_tolerance,
        gradient_floor=gradient_floor, attentions=attentions, unused=unused,
    )  # fmt: skip
    check_round_trip(model, variables, type(twin), tmp_path, unused=unused)


def torch_outputs(twin, inputs, *, attentions=True):
    """The twin's outputs in float64, under our names."""
    tensors = {
        name: torch.tensor(value).double() if value.dtype.kind == "f" else torch.tensor(value)
        for name, value in inputs.items()
    }
    images = "pixel_values" in tensors
    if images:
        tensors["pixel_values"] = tensors["pixel_values"].movedim(-1, 1)
    extra = {"output_attentions": True} if attentions else {}
    out = twin(**tensors, output_hidden_states=True, return_dict=True, **extra)
    named: dict[str, Any] = dict(out)
    for side in ("text_model_output", "vision_model_output"):
        inner = named.pop(side, {})
        named |= {f"{side}.{name}": value for name, value in inner.items()}
    if images:
        named = {
            name: value
            if name.endswith("attentions") or name == "intermediate_hidden_states"
            else jax.tree.map(channels_last, value)
            for name, value in named.items()
            if name != "cache"
        }
        if "pooler_output" in named:
            named["pooler_output"] = named["pooler_output"].flatten(1)  # [B, 1, 1, C] of convnets
    for name in ("hidden_states", "attentions"):
        if f"decoder_{name}" in named:
            named[name] = named.pop(f"decoder_{name}")
    return named


def channels_last(value):
    """Images [B, C, X, Y] as [B, X, Y, C]; anything else as it is."""
    return value.movedim(1, -1) if value.ndim == 4 else value


def check_numbers(
    family, model, variables, twin, inputs, tmp_path, *,
    tolerance=1e-5, gradient_tolerance=1e-5, gradient_floor=1e-2, attentions=True, unused=(),
) -> None:  # fmt: skip
    """Outputs, hidden states, attentions and gradients; see `check_head`."""
    twin = twin.double()
    reference = torch_outputs(twin, inputs, attentions=attentions)
    rng = np.random.default_rng(0)
    names = [name for name in OUTPUTS if reference.get(name) is not None]
    # A cotangent for each output, and one for a hidden state inside.
    weights = {name: rng.normal(size=tuple(reference[name].shape)) for name in names}

    statistics, trained = split(variables, is_running)

    def run(trained):
        out = model.apply(
            trained | statistics,
            **inputs,
            output_hidden_states=True,
            output_attentions=attentions,
        )
        total = sum(jnp.vdot(part_of(out, name), weights[name]) for name in names)
        return total, out

    (_, out), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(trained)
    grads |= jax.tree.map(jnp.zeros_like, statistics)  # constants to PyTorch
    for name in OUTPUTS:
        ours = part_of(out, name)
        assert (ours is None) == (name not in names), f"{name}: ours {ours}, theirs {names}"
        if ours is not None:
            assert_near(ours, reference[name].detach(), name, tolerance)
    for name in LAYERS:
        theirs = reference.get(name)
        ours = part_of(out, name)
        if not theirs or theirs[0] is None:
            assert not ours or not attentions, f"{name}: PyTorch returns none"
            continue
        assert ours is not None, f"{name} is missing"
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if mine.ndim == 3:  # with choices, PyTorch's last hidden state alone is [B, N, T, D]
                other = other.reshape(-1, *other.shape[-2:])
            assert_near(mine, other.detach(), f"{name} {i}", tolerance)
    sum((reference[name] * torch.tensor(weights[name])).sum() for name in names).backward()
    for parameter in twin.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.data = grad
    for constant in (*logits_biases(twin), *running_statistics(twin)):
        constant.zero_()
    # Saved, so that gradients come under the names of files.
    twin.save_pretrained(tmp_path / "gradients")
    theirs = safetensors.numpy.load_file(tmp_path / "gradients" / "model.safetensors")
    largest = max(np.abs(grad).max(initial=0) for grad in theirs.values())
    ours = exported(family, model, grads)
    zeros = exported(family, model, jax.tree.map(jnp.zeros_like, grads))  # rules may add constants
    assert not (lacking := theirs.keys() - ours.keys() - set(unused)), lacking
    for name in theirs.keys() - set(unused):
        grad = theirs[name]
        scale = max(np.abs(grad).max(initial=0), gradient_floor * largest)
        error = np.abs(ours[name] - zeros[name] - grad).max(initial=0) / scale
        assert error <= gradient_tolerance, f"gradient of {name}: relative error {error:.2e}"


def check_training(
    family,
    config,
    head: str,
    tmp_path: Path,
    inputs: dict[str, np.ndarray],
    *,
    tolerance: float = 1e-5,
    gradient_tolerance: float = 2e-5,
    prepare: Callable[[Any], None] = lambda twin: None,
    earlier: Collection[str] = (),
) -> None:
    """The batch's own statistics, what they do to gradients, and the running ones they leave.

    Args:
        family, config, head, tmp_path, tolerance, gradient_tolerance, prepare: see `check_head`;
            nothing is dropped.
        inputs: with "pixel_values".
        earlier: PyTorch's modules whose outputs are our ``auxiliary_logits``.
    """
    twin = torch_twin(family, config, head)
    prepare(twin)
    twin.save_pretrained(tmp_path / "before")
    model, variables = fmjax.load(tmp_path / "before")
    twin = twin.double().train()
    seen = []
    for name in earlier:
        twin.get_submodule(name).register_forward_hook(lambda module, given, out: seen.append(out))
    logits = twin(torch.tensor(inputs["pixel_values"]).double().movedim(-1, 1)).logits
    references = [channels_last(x) for x in (logits, *seen)]
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=tuple(x.shape)) for x in references]
    sum((x * torch.tensor(w)).sum() for x, w in zip(references, weights, strict=True)).backward()
    apply = apply_fn(model)

    @jax.jit
    def run(variables):
        def total(params):
            out, updates = apply(variables | {"params": params}, inputs, None, train=True)
            ours = (out.logits, *(out.auxiliary_logits or ()))
            return sum(map(jnp.vdot, ours, weights)), (ours, updates)

        return jax.value_and_grad(total, has_aux=True)(variables["params"])

    (_, (ours, updates)), grads = run(variables)
    for name, mine, other in zip(("logits", *earlier), ours, references, strict=True):
        assert_near(mine, other.detach(), name, tolerance)
    twin.save_pretrained(tmp_path / "after")
    _, after = fmjax.load(tmp_path / "after")
    moved = flatten(updates)
    assert moved.keys() == {key for key in flatten(after) if key.startswith("batch_stats/")}
    for path, value in moved.items():
        assert_near(value, flatten(after)[path], path)
        assert np.abs(value - flatten(variables)[path]).max() > 1e-4, path
    for parameter in twin.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.data = grad
    twin.save_pretrained(tmp_path / "gradients")
    _, read = fmjax.load(tmp_path / "gradients")
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(read["params"]))
    errors = {}
    for path, theirs in flatten(read["params"]).items():
        # A kernel before a norm over few pixels has gradients that nearly cancel.
        scale = max(float(jnp.abs(theirs).max()), 1e-2 * largest)
        errors[path] = float(jnp.abs(flatten(grads)[path] - theirs).max()) / scale
    worst = max(errors, key=lambda path: errors[path])
    assert errors[worst] <= gradient_tolerance, f"gradient of {worst}: {errors[worst]:.2e}"


def exported(family, model, tree) -> dict[str, np.ndarray]:
    """A tree shaped as the variables, as tensors by PyTorch's names."""
    table = family.rules(model.config, model.head)
    return {tensor.name: tensor.read() for tensor in export_params(table, flatten(tree))}


def check_round_trip(model, variables, torch_class, tmp_path, *, unused=()) -> None:
    """PyTorch loads what `fmjax.save` writes, nothing missing, and every number is as it was."""
    fmjax.save(tmp_path / "fmjax", model, variables)
    again, info = torch_class.from_pretrained(tmp_path / "fmjax", output_loading_info=True)
    info["missing_keys"] = set(info["missing_keys"]) - set(unused)
    assert not any(info.values()), info
    before = torch_class.from_pretrained(tmp_path / "torch").state_dict()
    for name in again.state_dict().keys() - set(unused):
        assert torch.equal(again.state_dict()[name], before[name]), name
    model_again, variables_again = fmjax.load(tmp_path / "fmjax")
    assert model_again == model
    flat = flatten(variables_again)
    for path, leaf in flatten(variables).items():
        np.testing.assert_array_equal(flat[path], leaf, err_msg=path)


SKIPPED = ("loss", "logits_from_labels", "past_key_values")


def check_fixture(folder: Path, *, tolerance: float = 2e-4) -> None:
    """A checkpoint of tests/fixtures against the outputs that PyTorch recorded beside it."""
    model, variables = fmjax.load(folder)
    io = np.load(folder / "io.npz")
    inputs = {
        key.removeprefix("in."): io[key]
        for key in io.files
        if key.startswith("in.") and key != "in.labels" and "leftpad" not in key
    }
    images = "pixel_values" in inputs
    if images:
        inputs["pixel_values"] = np.moveaxis(inputs["pixel_values"], 1, -1)
    if "input_features" in inputs:  # frames come before bins here
        inputs["input_features"] = np.moveaxis(inputs["input_features"], 1, -1)
    out = jax.jit(
        lambda v: model.apply(v, **inputs, output_hidden_states=True, output_attentions=True)
    )(variables)
    checked = 0
    for key in io.files:
        field, _, index = key.removeprefix("pt.").partition(".")
        if not key.startswith("pt.") or field in SKIPPED:
            continue
        if field in ("decoder_hidden_states", "decoder_attentions"):
            field = field.removeprefix("decoder_")
        if field.startswith("generate"):
            continue
        if index and not index.isdecimal():
            field, index = f"{field}.{index}", ""
        ours = part_of(out, field) if not index else part_of(out, field)[int(index)]
        reference = io[key]
        if images and field != "attentions":
            reference = channels_last(torch.tensor(reference))
        assert_near(ours, reference, key, tolerance)
        checked += 1
    assert checked >= 3


def check_decoding(model, variables, *, length=9, tolerance=1e-5, seed=0) -> None:
    """Cached decoding in pieces equals the full pass, with left padding too; it is causal."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, model.config.vocab_size, (2, length))
    run = jax.jit(lambda v, ids: model.apply(v, input_ids=ids).logits)
    unembed = jax.jit(lambda v, hidden: model.apply(v, hidden, method="unembed"))
    full = run(variables, ids)
    decode = jax.jit(
        lambda v, ids, mask, positions, cache: model.apply(
            v, input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache,
            output_logits=False,
        )
    )  # fmt: skip
    padding = 2
    capacity = length + padding + 1
    mask = np.ones((2, capacity), np.int32)
    mask[:, :padding] = 0
    padded = np.concatenate([np.full((2, padding), 3), ids], axis=1)
    positions = np.maximum(np.arange(length + padding) - padding, 0)[None].repeat(2, axis=0)
    cache, parts = model.init_cache(2, capacity), []
    pieces = ((0, length + padding - 2), *((i, i + 1) for i in (length, length + 1)))
    for start, end in pieces:
        out = decode(variables, padded[:, start:end], mask, positions[:, start:end], cache)
        cache = out.cache
        hidden = out.last_hidden_state
        parts.append(unembed(variables, hidden))
    assert int(cache["length"]) == length + padding
    logits = np.concatenate(parts, axis=1)[:, padding:]
    assert_near(logits, full, "cached", tolerance)
    changed = ids.copy()
    changed[:, length - 2 :] = 3
    after = run(variables, changed)
    scale = float(np.abs(full).max())
    np.testing.assert_allclose(
        after[:, : length - 2], full[:, : length - 2], atol=1e-5 * scale
    )  # causal


def seq2seq_inputs(config, *, seed=0, length=9, decoder_length=6, pad_id=None, end_id=None):
    """Random ids and masks for both sides, padding on the right of the second row.

    With `end_id`, as a sequence classifier takes them: that id at the end of each row's tokens, and
    nothing for the decoder.
    """
    rng = np.random.default_rng(seed)

    def side(length):
        mask = np.ones((2, length), np.int64)
        mask[1, length - 2 :] = 0
        ids = rng.integers(3, config.vocab_size, mask.shape)
        return ids if pad_id is None else np.where(mask == 1, ids, pad_id), mask

    ids, mask = side(length)
    if end_id is not None:
        ids = np.where(ids == end_id, 3 + (end_id == 3), ids)
        ids[0, -1] = ids[1, -3] = end_id
        return {"input_ids": ids, "attention_mask": mask}
    decoder_ids, decoder_mask = side(decoder_length)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }


def check_seq2seq_decoding(model, variables, *, tolerance=1e-5, seed=0, inputs=None) -> None:
    """Encoding and then cached decoding in pieces equals the full pass; the decoder is causal.

    Args:
        inputs: of another kind than `seq2seq_inputs`.
    """
    inputs = dict(inputs or seq2seq_inputs(model.config, seed=seed))
    ids = inputs.pop("decoder_input_ids")
    del inputs["decoder_attention_mask"]
    length, mask = ids.shape[1], inputs.get("attention_mask")
    run = jax.jit(lambda v, ids: model.apply(v, **inputs, decoder_input_ids=ids).logits)
    full = run(variables, ids)
    encoded = jax.jit(lambda v: model.apply(v, **inputs, method="encode"))(variables)
    states = encoded.last_hidden_state

    @jax.jit
    def decode(v, states, ids, cache):
        out = model.apply(
            v, encoder_outputs=states, attention_mask=mask, decoder_input_ids=ids, cache=cache,
            output_logits=False,
        )  # fmt: skip
        return model.apply(v, out.last_hidden_state, method="unembed"), out.cache

    cache, parts = model.init_cache(2, length + 1, states.shape[1]), []
    first, cache = decode(variables, states, ids[:, : length - 2], cache)
    parts.append(first)
    for i in (length - 2, length - 1):
        logits, cache = decode(variables, None, ids[:, i : i + 1], cache)
        parts.append(logits)
    assert int(cache["length"]) == length
    assert_near(np.concatenate(parts, axis=1), full, "cached", tolerance)
    changed = ids.copy()
    changed[:, length - 2 :] = 3
    after = run(variables, changed)
    scale = float(np.abs(full).max())
    np.testing.assert_allclose(
        after[:, : length - 2], full[:, : length - 2], atol=1e-5 * scale
    )  # causal


def check_old_file(
    family, config, head, tmp_path, *, extra=(), rename: Callable[[str], str] = str
) -> None:
    """A file as old versions wrote them loads the same: other names, more tensors.

    Args:
        family: a module of fmjax.models.
        config: its Config.
        head: a key of its HEADS.
        tmp_path: an empty folder.
        extra: names of tensors that are in the file too and that nobody needs.
        rename: from PyTorch's name of a tensor to the one in the file.
    """
    model, variables = fmjax.create(family.MODEL_TYPE, config, head=head, rng=jax.random.key(0))
    fmjax.save(tmp_path, model, variables)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors = {rename(name): tensor for name, tensor in tensors.items()}
    tensors |= {name: np.zeros((1, 1), np.float32) for name in extra}
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    again, read = fmjax.load(tmp_path)
    assert again == model
    flat = flatten(read)
    for path, leaf in flatten(variables).items():
        np.testing.assert_array_equal(flat[path], leaf, err_msg=path)


def check_sizes(family, classes: dict[str, str]) -> None:
    """Every published variant has as many parameters as PyTorch's bare model.

    Args:
        family: a module of fmjax.models.
        classes: by variant, the transformers class to count.
    """
    from fmjax import hub

    for name, torch_class in classes.items():
        config = family.VARIANTS[name]
        ours = count_parameters(hub.abstract_variables(family.Model(config)))
        assert ours == torch_size(family, config, torch_class), name


def torch_size(family, config, torch_class: str) -> int:
    """How many parameters PyTorch's model has: in a moment, where ours would be traced."""
    data = config_to_json(config, {})
    data.pop("label2id", None)
    with torch.device("meta"):
        twin = getattr(transformers, torch_class)(
            transformers.AutoConfig.for_model(family.MODEL_TYPE, **data)
        )
    return sum(p.numel() for p in twin.parameters())


def check_defaults(family, **filled) -> None:
    """The Config's defaults are those of transformers' class.

    Args:
        family: a module of fmjax.models.
        filled: fields that PyTorch's class computes where they are not given.
    """
    theirs = transformers.AutoConfig.for_model(family.MODEL_TYPE).to_dict()
    theirs = json.loads(json.dumps(theirs))  # as in a file: lists, not tuples
    assert parse_config(family.Config, theirs, family.FIXED) == family.Config(**filled)


def shuffled(variables, seed=0, spread=0.2):
    """The variables with random numbers added everywhere, norms and biases too."""
    rng = np.random.default_rng(seed)
    flat = flatten(variables)
    return unflatten(
        {path: leaf + spread * rng.normal(size=leaf.shape) for path, leaf in flat.items()}
    )
