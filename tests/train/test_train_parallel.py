"""Meshes with any axes compute what one device does, and hold no more than their parts."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import two_processes
from jax.sharding import AbstractMesh

from fmjax.hub import abstract_variables
from fmjax.models import families, family_of
from fmjax.models.llama import Config
from fmjax.models.mixtral import Config as MixtralConfig
from fmjax.nn.placement import nearest_parts
from fmjax.train import (
    Checkpoints,
    adamw,
    gradient,
    init_state,
    jit_step,
    layout,
    make_mesh,
    make_train_step,
    parse_mesh,
    start,
)
from fmjax.train.sharding import batch_spec
from fmjax.tree import flatten, is_stacked

HERE = Path(__file__).parent.parent
PRODUCT = "data=2,fsdp=2,tensor=2"
EXPERTS = "fsdp=2,expert=2,tensor=2"


def with_devices(count):
    """The environment of a process that has so many devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=4", f"device_count={count}")
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parent)}


def hold(*cases):
    done = subprocess.run(
        [sys.executable, HERE / "parallel_run.py", *cases],
        env=with_devices(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == [f"{case} holds" for case in cases]


def test_products_of_axes_on_encoders_and_what_is_stored():
    hold(
        f"losses:bert:{PRODUCT}",
        f"losses:llama:{PRODUCT}",
        f"collectives:llama:{PRODUCT}",
        f"restores:llama:{PRODUCT}",
        f"loads:llama:{PRODUCT}",
    )


@pytest.mark.slow
def test_products_of_axes_on_the_other_families():
    hold(
        f"losses:gpt2:{PRODUCT}",
        f"losses:t5:{PRODUCT}",
        f"losses:vit:{PRODUCT}",
        f"losses:mixtral:{EXPERTS}",
        f"loads:mixtral:{EXPERTS}",
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit", "mixtral"])
def test_each_axis_alone(family):
    hold(*(f"losses:{family}:{mesh}" for mesh in ("data=8", "fsdp=8", "tensor=2")))


@pytest.mark.slow
def test_collectives_of_each_axis_alone():
    hold(
        *(f"collectives:llama:{mesh}" for mesh in ("data=8", "fsdp=8", "data=4,tensor=2")),
        *(f"{check}:mixtral:data=2,expert=4" for check in ("losses", "collectives")),
        f"restores:mixtral:{EXPERTS}",
    )


def test_two_processes_are_one_and_a_dead_one_is_named(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [
        subprocess.Popen(
            [sys.executable, HERE / "two_processes.py", str(port), str(index), tmp_path],
            env=with_devices(4),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    step = jit_step(make_train_step(gradient(two_processes.loss_fn), two_processes.TX))
    state, losses = two_processes.train(step, two_processes.make_state())
    for index in range(2):
        written = tmp_path / f"{index}.json"
        assert written.exists(), outputs[index][1][-3000:]
        seen = json.loads(written.read_text())
        np.testing.assert_allclose(seen["losses"], losses, rtol=1e-5)
        assert (seen["same"], seen["step"]) == (True, two_processes.STEPS)
        uneven, shared = seen["refused"]
        assert "'weight': 3} do not divide by the 4 devices" in uneven
        assert f"process {index} gave 8 rows and its devices hold 16 of 16" in shared
        assert f"process {index} of 2" in outputs[index][1]
        assert "start all again by the same command" in outputs[index][1]
    # What two wrote, one process goes on from.
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore_last(jax.eval_shape(two_processes.make_state))
    for old, new in zip(
        *(jax.tree.leaves((s.trainable, s.opt_state)) for s in (state, restored.state)), strict=True
    ):
        np.testing.assert_allclose(old, new, rtol=1e-4, atol=1e-6)
    survivor, (out, error) = both[0], outputs[0]
    assert survivor.returncode != 0
    assert "nobody noticed" not in out
    assert "unhealthy (stopped sending heartbeats):\n1\n" in error


def spec(path, tree):
    return tuple(flatten(tree)[path].spec)


def test_the_table_lays_out_a_published_size():
    """Llama 3 of 70 B on 8 x 8 devices: each holds its 64th, and norms."""
    mesh = AbstractMesh((4, 8, 8), ("data", "fsdp", "tensor"))
    llama = family_of("llama")
    model = llama.Model(llama.VARIANTS["3-70b"], head="causal_lm", scan=True)
    variables = abstract_variables(model)
    places = layout(variables, mesh)
    whole, held = 0, 0
    for path, leaf in flatten(variables).items():
        shard = flatten(places)[path].shard_shape(leaf.shape)
        whole, held = whole + leaf.size, held + math.prod(shard)
    assert whole / 64 < held < 1.002 * whole / 64
    layers = "params/layers/"
    wide = ("fsdp", "tensor")
    assert spec(f"{layers}attn/query/kernel", places) == (None, *wide)
    assert spec(f"{layers}attn/out/kernel", places) == (None, *wide[::-1])
    assert spec(f"{layers}mlp/down/kernel", places) == (None, *wide[::-1])
    assert spec(f"{layers}norm_1/scale", places) == (None, None)
    assert spec("params/embed/word/embedding", places) == wide[::-1]
    assert spec("params/head/kernel", places) == wide
    assert batch_spec(mesh) == jax.P(("data", "fsdp"))


def test_experts_and_moments_and_what_is_none_of_them():
    mesh = AbstractMesh((2, 2, 2), ("fsdp", "expert", "tensor"))
    mixtral = family_of("mixtral")
    config = MixtralConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    variables = abstract_variables(mixtral.Model(config, head="causal_lm"))
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    state = jax.eval_shape(lambda: init_state(_zeros(variables), tx, jax.random.key(0)))
    places = layout(state, mesh, threshold=64)
    up = "params/layers_0/mlp/up/kernel"
    assert spec(up, places.trainable) == ("expert", "fsdp", "tensor")
    assert spec("params/embed/word/embedding", places.trainable) == (None, "fsdp")  # 31 words
    rows = places.opt_state[0].v_row["params"]["layers_0"]["mlp"]["up"]["kernel"]
    assert "tensor" not in str(rows.spec)  # factored: not as its parameter lies
    assert places.rng.spec == jax.P()
    plain = init_state({"params": {"mlp": {"up": {"kernel": jnp.ones((8, 16))}}}}, adamw(1e-3),
                       jax.random.key(0))  # fmt: skip
    placed = layout(plain, mesh, threshold=1)
    specs = {str(leaf.spec) for leaf in jax.tree.leaves(placed.opt_state) if any(leaf.spec)}
    assert specs == {str(jax.P("fsdp", "tensor"))}
    assert spec("params/mlp/up/kernel", placed.trainable) == ("fsdp", "tensor")


def _zeros(variables):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)


@pytest.mark.slow
@pytest.mark.parametrize("name", families())
def test_every_family_is_laid_out(name):
    """Of its largest published model nothing above the threshold is whole."""
    family = family_of(name)
    model = family.Model(list(family.VARIANTS.values())[-1], head="model", scan=True)
    mesh = AbstractMesh((2, 2), ("fsdp", "tensor"))
    variables = flatten(abstract_variables(model))
    places = flatten(layout(abstract_variables(model), mesh))
    for path, leaf in variables.items():
        layers = leaf.shape[0] if is_stacked(path) else 1
        if leaf.size // layers >= 2**16:
            assert "fsdp" in str(places[path].spec), path
        if path.endswith(("mlp/up/kernel", "attn/query/kernel")):
            assert "tensor" in str(places[path].spec), path


def test_what_does_not_divide_is_named():
    mesh = AbstractMesh((3, 4), ("fsdp", "tensor"))
    kernel = jax.ShapeDtypeStruct((8, 30), jnp.float32)
    wide = jax.ShapeDtypeStruct((30, 4), jnp.float32)
    odd = jax.ShapeDtypeStruct((10, 16), jnp.float32)
    tree = {"params": {"mlp": {"up": {"kernel": kernel}, "down": {"kernel": wide}}, "x": odd}}
    with pytest.raises(ValueError, match="does not divide the state") as error:
        layout(tree, mesh, threshold=64)
    text = str(error.value)
    assert "params/mlp/up/kernel (8, 30): 30 does not divide by tensor=4" in text
    assert "the nearest sizes of tensor that do: 3 and 5" in text
    assert "params/x (10, 16): 16 does not divide by fsdp=3; the nearest sizes of fsdp that" in text
    assert text.count("params/mlp/down/kernel (30, 4)") == 1
    assert layout({"params": {"x": odd}}, mesh)["params"]["x"].spec == jax.P(None, None)
    assert nearest_parts(7, 2) == "1 and 7"


def test_heads_and_experts_must_divide():
    def model_of(model_type, config):
        model = family_of(model_type).Model(config)
        return lambda: model.init(jax.random.key(0), input_ids=np.ones((2, 4), np.int32))

    sizes = {
        "vocab_size": 8, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 6, "head_dim": 4, "num_key_value_heads": 3,
    }  # fmt: skip
    grouped = model_of("llama", Config(**sizes))
    with (
        jax.set_mesh(make_mesh(tensor=2)),
        pytest.raises(
            ValueError, match="the 3 heads of layers_0/attn/key do not divide by the"
        ) as e,
    ):
        jax.eval_shape(grouped)
    assert "mesh's tensor=2; the nearest sizes of tensor that do: 1 and 3" in str(e.value)
    experts = model_of("mixtral", MixtralConfig(**sizes, num_local_experts=3))
    with (
        jax.set_mesh(make_mesh(expert=2)),
        pytest.raises(ValueError, match="the 3 experts do not divide by the mesh's expert=2"),
    ):
        jax.eval_shape(experts)
    jax.eval_shape(grouped)  # without a mesh


def test_meshes_are_parsed():
    assert dict(parse_mesh("data=2, tensor=2").shape) == {"data": 2, "tensor": 2}
    with pytest.raises(ValueError, match=r"mesh 'model=2,data=0,fsdp=2,fsdp=1'") as error:
        parse_mesh("model=2,data=0,fsdp=2,fsdp=1")
    for problem in ("'model' is no axis", "data has size '0'", "fsdp is there twice"):
        assert problem in str(error.value)
    with pytest.raises(ValueError, match="needs 8 devices and there are 4"):
        parse_mesh("data=8")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"index": 0}, "give all three"),
        ({"coordinator": "host:1", "processes": 2, "index": 2}, "below processes=2"),
        ({"heartbeat": 0}, "at least 1 second"),
    ],
)
def test_processes_that_cannot_be_are_refused(given, match):
    with pytest.raises(ValueError, match=match):
        start(**given)
