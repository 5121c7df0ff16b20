"""Families trained on meshes of 8 devices: ``python parallel_run.py CHECK FAMILY:MESH ...``.

CHECK is ``losses`` (and where the state lies), ``collectives``, ``restores`` or ``loads``. It is a
process of its own, because a process has as many devices as it began with.
"""

import dataclasses
import re
import sys
import tempfile
from functools import cache, partial
from unittest import mock

import jax
import numpy as np
import optax

import fmjax
from fmjax.hub import abstract_variables, family_of
from fmjax.tasks import causal_lm, masked_lm, seq2seq, sequence_classification
from fmjax.train import (
    Checkpoints,
    Memory,
    adamw,
    gradient,
    init_state,
    jit_init,
    jit_step,
    layout,
    make_train_step,
    parse_mesh,
    track_ema,
)
from fmjax.tree import flatten, map_with_path

B, T, V = 16, 8, 64
THRESHOLD = 256
PLACES = partial(layout, threshold=THRESHOLD)
LONG, SHORT = optax.chain(adamw(1e-2), track_ema(0.9)), optax.sgd(0.1, momentum=0.9)
KEY = jax.random.key(1)


def sized(model_type, **fields):
    return dataclasses.replace(family_of(model_type).VARIANTS["tiny"], **fields)


LLAMA = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attention_dropout": 0.0,
}  # fmt: skip
CASES = {
    # Dropout is drawn alike on any mesh. 65 words do not divide and stay whole.
    "bert": ("masked_lm", sized(
        "bert", vocab_size=V, hidden_size=32, intermediate_size=64, max_position_embeddings=T,
        num_hidden_layers=1)),
    "gpt2": ("causal_lm", sized(
        "gpt2", vocab_size=V + 1, n_embd=32, n_head=2, n_positions=T, n_layer=1,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)),
    "llama": ("causal_lm", sized("llama", **LLAMA)),
    "t5": ("seq2seq_lm", sized(
        "t5", vocab_size=V, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=1,
        num_decoder_layers=1, dropout_rate=0.0)),
    "vit": ("image_classification", sized("vit", hidden_size=32, num_hidden_layers=1)),
    "mixtral": ("causal_lm", sized(
        "mixtral", **LLAMA, num_local_experts=4, router_jitter_noise=0.0, num_hidden_layers=1)),
}  # fmt: skip


def tx_of(family):
    """All kinds of moments for one family; it takes the compiler as long as the model does."""
    return LONG if family == "llama" else SHORT


def loss_of(model):
    match model.head:
        case "masked_lm":
            return masked_lm.loss(model)
        case "causal_lm":
            return causal_lm.loss(model)
        case "seq2seq_lm":
            return seq2seq.loss(model)
        case "image_classification":
            return sequence_classification.loss(model)


def make_batch(seed, model):
    rng = np.random.default_rng(seed)
    weight = (rng.uniform(size=B) > 0.2).astype(np.float32)
    if model.head == "image_classification":
        pixels = rng.normal(size=(B, *family_of("vit").inputs(model.config, model.head)[
            "pixel_values"].shape[1:]))  # fmt: skip
        return {
            "pixel_values": pixels.astype(np.float32),
            "labels": rng.integers(0, 2, B).astype(np.int32),
            "weight": weight,
        }
    ids = rng.integers(5, V, (B, T)).astype(np.int32)
    mask = (np.arange(T) < rng.integers(3, T + 1, (B, 1))).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": mask, "weight": weight}
    if model.head != "causal_lm":
        batch["labels"] = np.where(mask > 0, rng.integers(5, V, (B, T)), -100).astype(np.int32)
    return batch


@cache
def built(family):
    """(model, step not compiled, its state before the first step); Llama's layers are scanned."""
    head, config = CASES[family]
    scan = family == "llama"
    model, variables = fmjax.create(family, config, head=head, rng=jax.random.key(0), scan=scan)
    return (
        model,
        make_train_step(gradient(loss_of(model)), tx_of(family)),
        jax.device_get(variables),
    )


def run(family, step, state, steps=5):
    losses = []
    for i in range(steps):
        state, metrics = step(state, make_batch(i, built(family)[0]))
        losses.append(float(metrics["loss"].value))
    return state, losses


@cache
def reference(family):
    _, step, variables = built(family)
    return run(family, jit_step(step), init_state(to_device(variables), tx_of(family), KEY))[1]


def to_device(variables):
    return jax.tree.map(jax.numpy.array, variables)


def started(family, mesh):
    """(state on the mesh, its shardings): what is made of divided weights lies as they do."""
    variables = built(family)[2]
    state = init_state(jax.device_put(variables, PLACES(variables, mesh)), tx_of(family), KEY)
    return state, PLACES(state, mesh)


def losses(family, mesh):
    """The mesh's losses are those of one device, and what is large is nowhere whole."""
    state, places = started(family, mesh)
    differing = []

    def compare(path, leaf, place):
        if leaf.ndim and not leaf.sharding.is_equivalent_to(place, leaf.ndim):
            differing.append(path)

    names = map_with_path(lambda path, leaf: path, state)
    jax.tree.map(compare, names, state, places)
    assert not differing, differing
    state, found = run(family, jit_step(built(family)[1], mesh, state_shardings=places), state)
    np.testing.assert_allclose(found, reference(family), rtol=1e-5)
    assert np.ptp(found) > 1e-3
    divided = set()

    def check(path, leaf):
        numbers = leaf.addressable_shards[0].data.size
        stack = leaf.shape[0] if "/layers/" in path else 1
        if "fsdp" in mesh.shape and leaf.ndim and leaf.size // stack >= THRESHOLD:
            assert numbers * mesh.shape["fsdp"] <= leaf.size, (path, leaf.sharding)
            divided.add(path.split("/")[0])
        if re.search(r"(query|up|out)/kernel", path) and "tensor" in mesh.shape:
            assert "tensor" in jax.tree.leaves(tuple(leaf.sharding.spec)), (path, leaf.sharding)
        if family == "mixtral" and "mlp/up/kernel" in path and "expert" in mesh.shape:
            assert leaf.sharding.spec[0] == "expert", (path, leaf.sharding)

    map_with_path(check, state)
    assert divided == ({"trainable", "opt_state"} if "fsdp" in mesh.shape else set())


def collectives(family, mesh):
    """The compiled step has the collectives that the mesh's axes need, and no others."""
    state, places = started(family, mesh)
    compiled = []
    jit = jax.jit

    def remembering(*args, **options):
        compiled.append(jit(*args, **options))
        return compiled[-1]

    with mock.patch("jax.jit", remembering):
        jit_step(built(family)[1], mesh, state_shardings=places)
    with jax.set_mesh(mesh):
        text = compiled[-1].lower(state, make_batch(0, built(family)[0])).compile().as_text()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = set(re.findall(rf" ({kinds})(?:-start)?\(", text))
    expected = {"all-reduce"}
    if "fsdp" in mesh.shape:
        expected |= {"all-gather"}
    if "expert" in mesh.shape:
        expected |= {"all-gather", "all-to-all", "reduce-scatter"}
    assert found | {"reduce-scatter"} == expected | {"reduce-scatter"}, found
    # Of gathers none is of examples: parameters move, not activations.
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
    shapes = {tuple(map(int, sizes.split(","))) for sizes in gathered}
    if "expert" not in mesh.shape:
        assert not [shape for shape in shapes if len(shape) > 2], shapes


def restores(family, mesh):
    """A state made where it lies, saved from one mesh, comes back on others, bitwise."""

    def make():
        return init_state(to_device(built(family)[2]), tx_of(family), KEY)

    init = jit_init(make, mesh, PLACES)
    state, abstract = init(), jax.eval_shape(init)
    assert jax.tree.map(lambda leaf: leaf.sharding, abstract) == PLACES(state, mesh)
    assert all(
        leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)
        for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True)
    )

    def on(text):
        def placed(leaf, place):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        return jax.tree.map(placed, abstract, PLACES(abstract, parse_mesh(text)))

    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        checkpoints.save(state, {}, Memory())
        checkpoints.wait()
        for template in (on("fsdp=8"), on("data=4,tensor=2"), jax.eval_shape(make)):
            restored = checkpoints.restore_last(template)
            for old, new, wanted in zip(
                *map(jax.tree.leaves, (state, restored.state, template)), strict=True
            ):
                assert wanted.sharding is None or new.sharding == wanted.sharding
                if jax.dtypes.issubdtype(old.dtype, jax.dtypes.prng_key):
                    old, new = jax.random.key_data(old), jax.random.key_data(new)
                np.testing.assert_array_equal(np.asarray(old), np.asarray(new))


def loads(family, mesh):
    """Weights go from their file to where they lie, and no array is read as a whole."""
    _, _, variables = built(family)
    scanned = family == "llama"
    model = built(family)[0]
    read = []
    make = jax.make_array_from_callback

    def spying(shape, sharding, callback):
        def spy(at):
            part = callback(at)
            read.append(part.size)
            return part

        return make(shape, sharding, spy)

    with tempfile.TemporaryDirectory() as folder:
        fmjax.save(folder, model, variables)
        with (
            mock.patch("jax.make_array_from_callback", spying),
            mock.patch("fmjax.weights.rules._own", None),  # which copies whole tensors
        ):
            _, loaded = fmjax.load(folder, scan=scanned, shardings=partial(PLACES, mesh=mesh))
    places = flatten(PLACES(abstract_variables(model), mesh))
    flat = flatten(loaded)
    for path, leaf in flatten(variables).items():
        np.testing.assert_array_equal(np.asarray(flat[path]), leaf)
        assert flat[path].sharding == places[path]
    held = sum(shard.data.size for leaf in flat.values() for shard in leaf.addressable_shards)
    whole = sum(leaf.size for leaf in flat.values())
    assert sum(read) <= held < whole * len(jax.devices())


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    check = {"losses": losses, "collectives": collectives, "restores": restores, "loads": loads}
    for case in sys.argv[1:]:
        name, family, text = case.split(":")
        check[name](family, parse_mesh(text))
        print(case, "holds", flush=True)
