"""Plans of tiny models on the CPU: what fits, what is best, and that numbers say where from."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import pytest

import fmjax.hub as hub
import fmjax.recipes.plan as recipe
from fmjax.cli import main
from fmjax.config import config_to_json, write_json
from fmjax.models import gpt2
from fmjax.perf.flops import count_flops
from fmjax.perf.memory import MemoryUse, bytes_per_chip, state_bytes
from fmjax.perf.program import Collective, Traffic
from fmjax.perf.targets import Target
from fmjax.recipes.plan import Settings, plan
from fmjax.recipes.plan_output import print_plan
from fmjax.recipes.plan_search import meshes
from fmjax.recipes.planned_step import Compiled, Work, describe, places
from fmjax.tasks import causal_lm
from fmjax.train import gradient


def test_one_device_in_full(tmp_path, capsys):
    """What is compiled is what the step's own compilation says, and what runs takes about that."""
    file, chart = tmp_path / "plan.json", tmp_path / "plan.png"
    command = "plan gpt2/tiny --target cpu --batch 8 --length 16 --precision float32 --remat none"
    command += " --dropout none"
    assert main([*command.split(), "--measure", "--json", str(file), "--chart", str(chart)]) == 0
    printed = capsys.readouterr().out
    assert "compiled" in printed
    assert "measured" in printed
    doc = json.loads(file.read_text())
    (row,) = doc["plans"]
    assert (doc["best"], row["status"], row["remat"]) == (0, "fits", "none")
    sizes = row["compiled"]["bytes"]
    assert sum(sizes.values()) == row["compiled"]["peak_bytes"] > row["bound"]["least_bytes"]
    assert sizes["parameters"] == 4 * doc["counted"]["parameters"]
    assert sizes["optimizer"] == 2 * sizes["parameters"] + 4
    assert "step_seconds" not in row["bound"]  # a CPU has no published figures
    assert row["measured"]["step_seconds"] > 0
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_flops_and_sizes_are_the_models():
    step = describe("gpt2/tiny", Work(batch=8, length=16, precision="float32"))
    model = gpt2.Model(gpt2.VARIANTS["tiny"], head="causal_lm")
    variables = hub.abstract_variables(model)
    batch = {"input_ids": jax.numpy.zeros((8, 16), "int32"), "weight": jax.numpy.ones(8)}
    args = (variables, {}, batch, jax.random.key(0))
    assert step.flops("none").total == count_flops(gradient(causal_lm.loss(model)), *args).total
    assert step.model_flops() == step.flops("none").total
    assert step.sizes()["trained"] == sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert step.tokens == 128


def test_products_of_8_bits_are_told_apart():
    plain, narrow = (
        describe("gpt2/tiny", Work(batch=8, length=16, matmuls=matmuls)).flops("none")
        for matmuls in ("float", "int8")
    )
    assert plain.of_8_bits == {}
    # Attention and the head multiply as they did.
    assert 0 < narrow.of_8_bits["int8"] < narrow.total == plain.total


def test_a_mixture_needs_less_than_it_executes():
    """Its tokens pass all experts, and its gradient computes their products anew."""
    step = describe("mixtral/tiny", Work(batch=2, length=8))
    needed, executed = step.model_flops(), step.flops("none").total
    config = step.config
    products = 3 * config.hidden_size * config.intermediate_size * 2 * config.num_hidden_layers
    # Forward once and backward twice; of all experts, forward once more.
    own = 3 * config.num_experts_per_tok
    assert executed - needed == pytest.approx(
        step.tokens * products * (4 * config.num_local_experts - own), rel=0.01
    )


def test_what_trains_is_the_methods():
    full, low = (
        describe("gpt2/base", Work(batch=1, length=8, method=method, rank=2))
        for method in ("full", "lora")
    )
    width, layers = gpt2.VARIANTS["base"].n_embd, gpt2.VARIANTS["base"].n_layer
    assert low.sizes()["trained"] == layers * 2 * (width * 2 + 2 * width)
    # Of three products a kernel, that of its own gradient is not needed.
    assert low.flops("none").total / full.flops("none").total == pytest.approx(2 / 3, rel=0.01)


@pytest.mark.slow
def test_weights_in_half_precision():
    half = describe("gpt2/tiny", Work(batch=8, length=16, method="dora", weights="bfloat16"))
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(half.state.non_trainable["params"])}
    assert dtypes == {"bfloat16"}
    assert half.flops("none").total > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "t5", "resnet", "bart", "roberta"])
def test_families(family):
    step = describe(f"{family}/tiny", Work(batch=4, length=8))
    assert step.flops("none").total > 0
    assert step.state.trainable


def test_a_folder(tmp_path):
    config = gpt2.VARIANTS["tiny"]
    extra = {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]}
    write_json(tmp_path / "config.json", config_to_json(config, extra))
    step = describe(str(tmp_path), Work(batch=4, length=8))
    assert (step.config, step.head) == (config, "sequence_classification")


def test_no_dropout():
    config = describe("bert/tiny", Work(batch=4, length=8, dropout="residual")).config
    assert config.attention_probs_dropout_prob == 0.0
    assert config.hidden_dropout_prob > 0.0
    assert describe("bert/tiny", Work(length=8, dropout="none")).config.hidden_dropout_prob == 0.0


def test_meshes_are_all_products():
    found = [tuple(mesh.values()) for mesh in meshes(8)]
    assert len(found) == len(set(found)) == 10
    assert {math.prod(mesh) for mesh in found} == {8}


def stand_in(activations, asked):
    """In place of the compiler: the state as it lies, and activations as told, by remat."""

    def compile_step(step, target, devices, axes, remat):
        asked.append((dict(axes), remat))
        state = places(step, devices, axes)
        trained = bytes_per_chip(state.trainable)
        memory = MemoryUse(*state_bytes(state), trained, activations[remat], 0)
        traffic = Traffic(8, (Collective("all-reduce", 2, 1, 4, 4),), 0)
        return Compiled(memory, traffic, 0.1, None, state, None)

    return compile_step


# BERT-tiny's weights, moments and gradients are 70 MB.
BERT = Settings(model="bert/tiny", target="cpu:4", batch=8, length=16)


def test_search_takes_what_fits(monkeypatch):
    asked = []
    monkeypatch.setattr(
        recipe, "compile_step", stand_in({"none": 10**9, "dots": 10**9, "block": 10**6}, asked)
    )
    doc = plan(dataclasses.replace(BERT, memory=40e6, compiles=4))
    best = doc["plans"][doc["best"]]
    assert (best["status"], best["remat"]) == ("fits", "block")
    assert best["mesh"]["fsdp"] * best["mesh"]["tensor"] > 1
    assert best["compiled"]["peak_bytes"] <= 40e6
    replicated = [row for row in doc["plans"] if row["mesh"]["data"] == 4]
    assert {row["status"] for row in replicated} == {"too large"}  # by the state's size alone
    assert all(mesh["data"] < 4 for mesh, _ in asked)
    # What keeps all activations was tried once: they are as many however chips are laid.
    assert [remat for _, remat in asked[:3]] == ["none", "dots", "block"]
    (first, *same), (other, _) = (mesh for mesh, _ in asked[:3]), asked[3]
    assert same == [first] * 2
    assert other != first
    assert len(doc["plans"]) == 3 * len(list(meshes(4)))


def test_search_recomputes_no_more_than_it_must(monkeypatch):
    """On an accelerator: what recomputes more is not compiled where less fits; the host's memory is
    the last resort."""
    asked = []
    monkeypatch.setattr(Target, "devices", lambda self: jax.devices("cpu")[: self.chips])
    sizes = {"none": 10**9, "dots": 10**6, "block": 10**6, "offload": 10**6}
    monkeypatch.setattr(recipe, "compile_step", stand_in(sizes, asked))
    one_mesh = dataclasses.replace(BERT, target="v5e:2x2", mesh="fsdp=4")
    doc = plan(dataclasses.replace(one_mesh, memory=40e6))
    assert [remat for _, remat in asked] == ["none", "dots"]
    assert doc["plans"][doc["best"]]["remat"] == "dots"
    rest = [row for row in doc["plans"] if row["remat"] in ("block", "offload")]
    assert [row["reason"] for row in rest] == ["less recomputed fits as well"] * 2
    asked.clear()
    sizes |= {"dots": 10**9, "block": 10**9}
    doc = plan(dataclasses.replace(one_mesh, memory=40e6, compiles=4))
    assert [remat for _, remat in asked] == ["none", "dots", "block", "offload"]
    assert doc["plans"][doc["best"]]["remat"] == "offload"


@pytest.mark.slow
def test_policies_in_compiled_programs():
    peaks = {}
    for remat in ("none", "dots", "block"):
        settings = Settings(model="gpt2/tiny", target="cpu", batch=64, length=32, remat=remat)
        (row,) = plan(settings)["plans"]
        assert (row["remat"], row["status"]) == (remat, "fits")
        peaks[remat] = row["compiled"]["peak_bytes"]
    assert peaks["block"] < peaks["dots"] < peaks["none"]


def test_search_that_finds_nothing(monkeypatch, capsys):
    def refuses(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: the memory required for HLO temporaries (0.5G) exceeds 15.75G"
        )

    monkeypatch.setattr(recipe, "compile_step", refuses)
    doc = plan(dataclasses.replace(BERT, memory=40e6, remat="none"))
    assert doc["best"] is None
    said = [row["reason"] for row in doc["plans"] if row["status"] == "too large"]
    assert any("temporaries (0.5G)" in reason for reason in said)
    assert any("state and gradients alone" in reason for reason in said)
    print_plan(doc)
    assert "nothing that was compiled fits" in capsys.readouterr().out


def test_bounds_where_figures_are_published(monkeypatch):
    """Of an accelerator, whose devices are not needed where nothing is compiled."""
    monkeypatch.setattr(recipe, "compile_step", stand_in({"none": 10**6}, []))
    monkeypatch.setattr(Target, "devices", lambda self: jax.devices("cpu")[: self.chips])
    doc = plan(dataclasses.replace(BERT, target="v5e:2x2", price=2.0, compiles=1, remat="none"))
    bound = doc["plans"][doc["best"]]["bound"]
    assert bound["compute_seconds"] == pytest.approx(doc["counted"]["model_flops"] / 4 / 197e12)
    assert bound["step_seconds"] == bound["compute_seconds"]
    assert bound["mfu"] == pytest.approx(1)
    rate = 8 * 16 / bound["step_seconds"]
    assert bound["cost_per_billion_tokens"] == pytest.approx(2 * 4 / 3600 * 1e9 / rate)


@pytest.mark.slow
def test_recomputing_costs():
    step = describe("gpt2/tiny", Work(batch=8, length=16))
    block, dots, none = (step.flops(remat).total for remat in ("block", "dots", "none"))
    assert block > dots > none


@pytest.mark.slow
def test_search_with_the_compiler():
    doc = plan(dataclasses.replace(BERT, memory=60e6, compiles=2))
    best = doc["plans"][doc["best"]]
    assert best["compiled"]["peak_bytes"] <= 60e6
    assert best["compiled"]["collectives"]
    assert best["compiled"]["sent_bytes"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": "tpu"}, "'tpu' is unknown; known are v4"),
        ({"model": "bert"}, "neither a folder with a config.json nor FAMILY/VARIANT"),
        ({"model": "bert/huge"}, "bert has no variant 'huge'; it has"),
        ({"model": "nobody/base"}, "the families are"),
        ({"head": "pretraining"}, "no head 'pretraining' that can be planned; it has"),
        ({"batch": 0, "rank": 0}, "batch=0 must be at least 1; rank=0"),
        ({"microbatches": 3}, "batch=8 is no multiple of microbatches=3"),
        ({"mesh": "data=2"}, "it is of 2 chips, and cpu:4 has 4"),
        ({"mesh": "rows=4"}, "'rows' is no axis"),
        ({"mesh": "data=4", "batch": 6}, "batch=6 does not divide by the 4 parts"),
        pytest.param({"mesh": "tensor=4"}, "the nearest sizes of tensor", marks=pytest.mark.slow),
        ({"price": -1.0, "compiles": 0}, "price=-1.0 must not be negative; compiles=0"),
        ({"chart": Path("a.gif")}, "must end with .png, .svg or .pdf"),
        ({"json": Path("nowhere/a.json")}, "json=nowhere/a.json: there is no folder nowhere"),
        ({"target": "h100", "measure": True}, "h100 is not here to run on"),
        ({"remat": "offload"}, "a CPU, whose memory is the host's; choose 'block'"),
    ],
)
def test_bad_input(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        plan(dataclasses.replace(BERT, **changes))


def test_bad_input_on_the_command_line(capsys):
    assert main(["plan", "bert/tiny", "--target", "v7x:2x2"]) == 2
    assert "target 'v7x:2x2': 'v7x' is unknown" in capsys.readouterr().err
