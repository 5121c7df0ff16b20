"""What the tests of several encoder families check alike."""

from __future__ import annotations

import jax
import numpy as np
import transformers
from parity import assert_near, shuffled
from safetensors.numpy import save_file

import fmjax
from fmjax.config import config_to_json, parse_config, write_json
from fmjax.tree import flatten
from fmjax.weights import open_checkpoint

NOT_OF_TRANSFORMERS = {"problem_type", "id2label", "label2id"}


def check_defaults(family, *, extra=()):
    """Our config's defaults are transformers', and its config.json is read as ours.

    Args:
        family: a module of fmjax.models.
        extra: fields that transformers reads and has no default for in its class.
    """
    theirs = transformers.AutoConfig.for_model(family.MODEL_TYPE).to_dict()
    ours = config_to_json(family.Config(), {})
    for key in ours.keys() - NOT_OF_TRANSFORMERS - set(extra):
        assert ours[key] == theirs[key], key
    assert parse_config(family.Config, theirs, family.FIXED) == family.Config()


def check_classes(family):
    """Every head is a class of transformers, and every class of the family is a head."""
    body = family.HEADS["model"].removesuffix("Model")
    theirs = {
        name
        for name in dir(transformers)
        if name.startswith((f"{body}For", f"{body}LMHead")) and not name.endswith("Output")
    }
    assert set(family.HEADS.values()) == theirs | {family.HEADS["model"]}


def encoder_states(config, *, length=5, seed=0):
    """Inputs of cross-attention, the second row padded."""
    states = np.random.default_rng(seed).normal(size=(2, length, config.hidden_size))
    mask = np.ones((2, length), np.int64)
    mask[1, length - 2 :] = 0
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def check_cached(family, config, *, scan, length=9, padding=2, tolerance=1e-5):
    """Cached decoding in pieces equals the full pass, left padding and cross-attention included.

    With cross-attention the encoder's states are given in the first call only.
    """
    model, variables = fmjax.create(
        family.MODEL_TYPE, config, head="causal_lm", rng=jax.random.key(0), scan=scan
    )
    variables = shuffled(variables)
    cross = encoder_states(config) if config.add_cross_attention else {}
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (2, length))
    run = jax.jit(lambda v, ids: model.apply(v, input_ids=ids, **cross).logits)
    full = run(variables, ids)
    capacity = length + padding + 1
    mask = np.ones((2, capacity), np.int32)
    mask[:, :padding] = 0
    padded = np.concatenate([np.full((2, padding), 3), ids], axis=1)
    positions = np.maximum(np.arange(length + padding) - padding, 0)[None].repeat(2, axis=0)

    @jax.jit
    def decode(variables, cache, **inputs):
        out = model.apply(variables, cache=cache, output_logits=False, **inputs)
        return model.apply(variables, out.last_hidden_state, method="unembed"), out.cache

    cache = model.init_cache(2, capacity, 5 if cross else None)
    parts = []
    for start, end in ((0, length + padding - 2), *((i, i + 1) for i in (length, length + 1))):
        states = {} if start == 0 else {"encoder_hidden_states": None}
        logits, cache = decode(
            variables,
            cache,
            input_ids=padded[:, start:end],
            attention_mask=mask,
            position_ids=positions[:, start:end],
            **{**cross, **(states if cross else {})},
        )
        parts.append(logits)
    assert int(cache["length"]) == length + padding
    assert_near(np.concatenate(parts, axis=1)[:, padding:], full, "cached", tolerance)
    changed = ids.copy()
    changed[:, length - 2 :] = 3
    after = run(variables, changed)
    scale = float(np.abs(full).max())
    np.testing.assert_allclose(
        after[:, : length - 2], full[:, : length - 2], atol=1e-5 * scale
    )  # causal


def save_flax_names(folder, family, config, head, *, dropped=()):
    """A model with random weights, saved as transformers' old Flax classes did it.

    Args:
        folder: an empty one; "flax" in it is what the Flax class wrote.
        family: a module of fmjax.models.
        config: its Config.
        head: a key of its HEADS.
        dropped: tensors that Flax files lack.

    Returns:
        The variables.
    """
    model, variables = fmjax.create(family.MODEL_TYPE, config, head=head, rng=jax.random.key(0))
    saved = fmjax.save(folder / "torch", model, variables)
    tensors = {}
    with open_checkpoint(saved) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            if name in dropped:
                continue
            value = np.array(tensor.read())
            stem, _, leaf = name.rpartition(".")
            if leaf == "weight":
                norm = value.ndim == 1
                embedding = stem.endswith("_embeddings")
                leaf = "scale" if norm else "embedding" if embedding else "kernel"
            tensors[f"{stem}.{leaf}"] = value.T.copy() if leaf == "kernel" else value
    (folder / "flax").mkdir()
    save_file(tensors, folder / "flax" / "model.safetensors", metadata={"format": "flax"})
    architectures = {"architectures": [f"Flax{family.HEADS[head]}"]}
    data = config_to_json(config, {"model_type": family.MODEL_TYPE, **architectures})
    write_json(folder / "flax" / "config.json", data)
    return variables


def check_flax_names(folder, family, config, head, *, dropped=()):
    """A checkpoint under the names of transformers' old Flax class loads, to the last bit."""
    variables = save_flax_names(folder, family, config, head, dropped=dropped)
    model, read = fmjax.load(folder / "flax")
    assert model.config == config
    assert model.head == head
    flat = flatten(read)
    for path, value in flatten(variables).items():
        np.testing.assert_array_equal(flat[path], value, err_msg=path)
