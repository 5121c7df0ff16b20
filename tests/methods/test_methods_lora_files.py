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
from fmjax.methods import lora, lora_files
from fmjax.methods.adapted_layers import is_adapter, of_modules
from fmjax.models import bert, gpt2, llama
from fmjax.tree import merge, split

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
@pytest.mark.parametrize("case", CASES)
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
    ours = model.apply(adapted, **inputs).last_hidden_state
    assert_near(ours, torch_output(twin, inputs).detach(), "PEFT")
    again = lora_files.load(tmp_path / "ours", model, variables)
    assert_near(model.apply(again, **inputs).last_hidden_state, ours, "read again")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["r"] == 4
