"""Low-rank adapters against the library PEFT: numbers, gradients, and files both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from parity import assert_near, text_inputs, torch_twin

import fmjax
from fmjax.methods import ia3, lora, lora_files
from fmjax.methods.adapted_layers import is_adapter, of_modules
from fmjax.methods.peft_files import read_adapter, write_adapter
from fmjax.models import bert, gpt2, llama
from fmjax.tree import merge, split, stack_layers

BERT = bert.Config(
    vocab_size=31, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=20, max_position_embeddings=16,
)  # fmt: skip
GPT2 = gpt2.Config(vocab_size=31, n_positions=16, n_embd=12, n_layer=2, n_head=3)
LLAMA = llama.Config(
    vocab_size=31, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, intermediate_size=20, max_position_embeddings=16,
)  # fmt: skip
# Family, config, head, whether scanned, and PEFT's options.
CASES = {
    "bert": (bert, BERT, "model", False, {"r": 3, "lora_alpha": 5}),
    "bert dora": (
        bert, BERT, "masked_lm", False,
        {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": r".*layer.*(query|dense)"},
    ),
    "bert rslora patterns": (
        bert, BERT, "sequence_classification", True,
        {
            "r": 4, "use_rslora": True, "task_type": "SEQ_CLS", "lora_dropout": 0.1,
            "target_modules": ["query", "value", "intermediate.dense"],
            "rank_pattern": {"layer.1.attention.self.query": 2}, "alpha_pattern": {"value": 3},
        },
    ),
    "gpt2 fused": (gpt2, GPT2, "causal_lm", False, {"r": 4, "target_modules": ["c_attn", "c_fc"]}),
    "gpt2 dora": (gpt2, GPT2, "model", True, {"r": 2, "use_dora": True, "fan_in_fan_out": True}),
    "llama": (
        llama, LLAMA, "causal_lm", True,
        {"r": 2, "target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    ),
}  # fmt: skip


def base(family, config, head, folder, scan=False):
    """PyTorch's model, ours and its variables, of the same random weights."""
    torch_twin(family, config, head).save_pretrained(folder)
    return torch_model(family, head, folder), *fmjax.load(folder, scan=scan)


def torch_model(family, head, folder):
    import transformers

    return getattr(transformers, family.HEADS[head]).from_pretrained(
        folder, attn_implementation="eager"
    )


def output(out):
    return out.last_hidden_state if getattr(out, "logits", None) is None else out.logits


def torch_output(twin, inputs):
    return output(twin.double().eval()(**{name: torch.tensor(x) for name, x in inputs.items()}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    # The others do the same and more.
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case in ("bert", "gpt2 fused")))
        for case in CASES
    ],
)
def test_peft(case, tmp_path):
    family, config, head, scan, options = CASES[case]
    twin, model, variables = base(family, config, head, tmp_path / "base", scan)
    twin = peft.get_peft_model(twin, peft.LoraConfig(**options))
    torch.manual_seed(1)
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    twin.save_pretrained(tmp_path / "theirs")
    adapted = lora_files.load(tmp_path / "theirs", model, variables)
    inputs = text_inputs(config, head)

    theirs = torch_output(twin, inputs)
    weights = np.random.default_rng(0).normal(size=theirs.shape)
    trained, rest = split(adapted, is_adapter)

    def run(trained):
        out = output(model.apply(merge(trained, rest), **inputs))
        return jnp.vdot(out, weights), out

    (_, ours), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(trained)
    assert_near(ours, theirs.detach(), "output")

    # Their gradients as an adapter's file, so that they come under our names.
    (theirs * torch.tensor(weights)).sum().backward()
    for parameter in twin.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    twin.float().save_pretrained(tmp_path / "gradients")
    reference = of_modules(lora_files.load(tmp_path / "gradients", model, variables))
    parts = of_modules(grads)
    for module, leaves in parts.items():
        for name, grad in leaves.items():
            theirs = reference[module][name]
            if name == "down" and family is gpt2 and "/attn/" in module:  # a shared A
                siblings = [f"{module.rpartition('/')[0]}/{x}" for x in ("query", "key", "value")]
                grad = sum(parts[x]["down"] for x in siblings)
            assert_near(grad, theirs, f"gradient of {module}/{name}", 2e-5)

    whole = ["head"] if "modules_to_save" in options or "task_type" in options else []
    lora_files.save(tmp_path / "ours", model, adapted, whole=whole)
    again = peft.PeftModel.from_pretrained(
        torch_model(family, head, tmp_path / "base"), tmp_path / "ours"
    )
    assert_near(ours, torch_output(again, inputs).detach(), "our file read by PEFT")
    names = [
        set(safetensors.numpy.load_file(tmp_path / side / "adapter_model.safetensors"))
        for side in ("ours", "theirs")
    ]
    assert names[0] == names[1]


@pytest.mark.filterwarnings("ignore")
def test_fused_layers_with_updates_of_their_own(tmp_path):
    """Query and value of GPT-2 have different A's, and the key none: ranks side by side."""
    _, model, variables = base(gpt2, GPT2, "model", tmp_path / "base")
    adapted = lora.add(variables, jax.random.key(0), rank=2, alpha=3, weight_decomposed=True)
    adapted = jax.tree.map(lambda x: x, adapted)
    adapted["adapters"] = jax.tree.map(lambda x: x + 0.1 * (x.ndim > 0), adapted["adapters"])
    lora_files.save(tmp_path / "ours", model, adapted)
    twin = peft.PeftModel.from_pretrained(
        torch_model(gpt2, "model", tmp_path / "base"), tmp_path / "ours"
    )
    inputs = text_inputs(GPT2, "model")
    run = jax.jit(lambda variables: model.apply(variables, **inputs).last_hidden_state)
    ours = run(adapted)
    assert_near(ours, torch_output(twin, inputs).detach(), "PEFT")
    again = lora_files.load(tmp_path / "ours", model, variables)
    assert_near(run(again), ours, "read again")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["r"] == 4


def test_what_does_not_fit_is_refused(tmp_path):
    model, variables = fmjax.create("bert", BERT, rng=jax.random.key(0))
    start = lora.add(variables, jax.random.key(0), rank=2, alpha=2)
    folder = lora_files.save(tmp_path / "good", model, start)
    config, tensors = read_adapter(folder)

    def refused(message, config=config, tensors=tensors, model=model):
        write_adapter(tmp_path / "bad", model, "LORA", config, tensors)
        with pytest.raises(ValueError, match=message):
            lora_files.load(tmp_path / "bad", model, variables)

    refused(r"(?s)bias='all'.*new_option=3.*use_qalora=True.*r='2'.*lora_dropout=1", {
        **config, "bias": "all", "use_qalora": True, "new_option": 3, "r": "2", "lora_dropout": 1,
        "off_today": False,
    })  # fmt: skip
    refused("init_lora_weights='pissa'", {**config, "init_lora_weights": "pissa"})
    refused("peft_type='IA3' is not 'LORA'", {**config, "peft_type": "IA3"})
    refused("no regular expression", {**config, "rank_pattern": {"(": 3}})
    first = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
    fewer = {name: x for name, x in tensors.items() if name != first}
    query = "encoder.layer.0.attention.self.query"
    refused(f"{query}: has no lora_A", tensors=fewer)
    refused(rf"(?s){query}: .*lora_A is \(2, 11\).*is \(2, 12\)", tensors={
        **tensors, first: tensors[first][:, 1:]
    })  # fmt: skip
    refused(r"lora_A is \(2, 12\).*is \(3, 12\)", {**config, "r": 3})
    fewer = {name: x for name, x in tensors.items() if "layer.1.attention.self.query" not in name}
    refused("target_modules has it, the file has no tensors for it", tensors=fewer)
    refused("target_modules leaves it out", {**config, "target_modules": ["query"]})
    refused("scores.lora_A.weight: nothing|scores: the model has no such", tensors={
        **tensors, "base_model.model.scores.lora_A.weight": tensors[first],
        "base_model.model.embed.lora_embedding_A": tensors[first],
    })  # fmt: skip
    refused("embed.lora_embedding_A: nothing in the model reads it", tensors={
        **tensors, "base_model.model.embed.lora_embedding_A": tensors[first],
    })  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        lora_files.load(tmp_path, model, variables)


def test_what_peft_cannot_hold_is_refused(tmp_path):
    model, variables = fmjax.create("bert", BERT, rng=jax.random.key(0))
    key = jax.random.key(0)
    mixed = lora.add(variables, key, rank=2, alpha=2, dropout=0.1)
    mixed = lora.add(mixed, key, rank=2, alpha=2, weight_decomposed=True, targets=("*/attn/key",))
    with pytest.raises(ValueError, match=r"(?s)magnitudes.*dropout of \['0.0', '0.1'\]"):
        lora_files.save(tmp_path, model, mixed)
    with pytest.raises(ValueError, match="out_scale are not one low-rank update"):
        lora_files.save(tmp_path, model, ia3.add(variables))
    with pytest.raises(ValueError, match="there are none"):
        lora_files.save(tmp_path, model, variables)
    with pytest.raises(ValueError, match=r"no module's path matches \['heads'\]"):
        lora_files.save(tmp_path, model, lora.add(variables, key, rank=2, alpha=2), whole=["heads"])


def test_layers_that_are_not_all_adapted(tmp_path):
    """Of a scanned model: those without get zeros, which are not written again."""
    model, variables = fmjax.create("bert", BERT, rng=jax.random.key(0))
    start = lora.add(variables, jax.random.key(0), rank=2, alpha=2, targets=("layers_1/attn/*",))
    folder = lora_files.save(tmp_path / "one", model, start)
    scanned = model.clone(scan=True)
    loaded = lora_files.load(folder, scanned, stack_layers(variables))
    again = lora_files.save(tmp_path / "two", scanned, loaded)
    (config, tensors), (config_again, tensors_again) = map(read_adapter, (folder, again))
    assert config == config_again
    assert all("layer.1." in name for name in tensors)
    jax.tree.map(np.testing.assert_array_equal, tensors, tensors_again)
