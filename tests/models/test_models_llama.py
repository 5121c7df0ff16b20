"""Llama against transformers' PyTorch Llama, from the same configs and weights."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from parity import check_decoding, check_defaults, check_head, check_sizes, shuffled, text_inputs

import fmjax
from fmjax.config import parse_config
from fmjax.models import llama
from fmjax.nn.position import RopeScaling
from fmjax.tree import flatten

CONFIG = llama.Config(
    vocab_size=51, hidden_size=30, intermediate_size=44, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, head_dim=4, max_position_embeddings=32,
    pad_token_id=2, id2label=("a", "b", "c"),
)  # fmt: skip
BIASED = dataclasses.replace(
    CONFIG, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, hidden_act="gelu",
    num_key_value_heads=6, head_dim=8, rope_theta=500.0, rms_norm_eps=1e-3, pad_token_id=-1,
)  # fmt: skip


def scaled(scaling, positions=7, **changes):
    """Beyond the original context, where dynamic and longrope have other frequencies."""
    return dataclasses.replace(
        CONFIG, rope_scaling=scaling, max_position_embeddings=positions, **changes
    )


DYNAMIC = scaled(RopeScaling("dynamic", factor=2.0))
LONGROPE = scaled(
    RopeScaling(
        "longrope", factor=4.0, original_max_position_embeddings=8, short_factor=(1.0, 1.5),
        long_factor=(2.0, 4.0),
    ),
    num_hidden_layers=1,  # the head is the same after one layer
)  # fmt: skip
LLAMA3 = scaled(
    RopeScaling(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    positions=32,
)  # fmt: skip
YARN = scaled(
    RopeScaling("yarn", factor=4.0, original_max_position_embeddings=8),
    id2label=("LABEL_0", "LABEL_1"),
    num_hidden_layers=1,
)
LINEAR = dataclasses.replace(BIASED, rope_scaling=RopeScaling("linear", factor=2.0))
CASES = [
    ("model", DYNAMIC),
    ("causal_lm", LLAMA3),
    ("causal_lm", LINEAR),
    ("sequence_classification", CONFIG),
    ("token_classification", LONGROPE),
    ("question_answering", YARN),
]


@pytest.mark.parametrize(("head", "config"), CASES)
def test_equals_pytorch(head, config, tmp_path):
    check_head(llama, config, head, tmp_path, text_inputs(config, head, pad_id=2))


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding(scan):
    model, variables = fmjax.create(
        "llama", "tiny", head="causal_lm", rng=jax.random.key(0), scan=scan
    )
    check_decoding(model, shuffled(variables))


def test_published_sizes():
    check_sizes(llama, dict.fromkeys(llama.VARIANTS, "LlamaModel"))


def test_config_defaults_are_transformers_defaults():
    check_defaults(llama, num_key_value_heads=32, head_dim=128)


def test_files_of_every_age_load(tmp_path):
    """The first files kept frequencies in every layer, tied copies, and version 4's config."""
    config = dataclasses.replace(
        CONFIG, tie_word_embeddings=True, rope_scaling=RopeScaling("linear", factor=2.0)
    )
    model, variables = fmjax.create("llama", config, head="causal_lm", rng=jax.random.key(0))
    fmjax.save(tmp_path / "new", model, variables)
    (tmp_path / "old").mkdir()
    twin = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "new")
    tensors = twin.state_dict()
    assert "lm_head.weight" in tensors
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin")
    data = json.loads((tmp_path / "new" / "config.json").read_text())
    data["rope_scaling"] = {"type": "linear", "factor": 2.0}
    data |= {"pretraining_tp": 1, "max_sequence_length": 2048, "torch_dtype": "float16"}
    (tmp_path / "old" / "config.json").write_text(json.dumps(data))
    again, old = fmjax.load(tmp_path / "old")
    assert again == model
    for path, leaf in flatten(variables).items():
        np.testing.assert_array_equal(flatten(old)[path], leaf, err_msg=path)


def test_heads_load_each_others_checkpoints(tmp_path):
    """Question answering calls the base model "transformer.", the other heads "model."."""
    config = dataclasses.replace(CONFIG, id2label=("LABEL_0", "LABEL_1"))
    others = {
        "model": ["question_answering"],
        "causal_lm": ["question_answering"],
        "question_answering": ["model", "sequence_classification"],
    }
    for head in others:
        model, variables = fmjax.create("llama", config, head=head, rng=jax.random.key(0))
        fmjax.save(tmp_path / head, model, variables)
        for other in others[head]:
            new = () if other == "model" else ("head/",)
            loaded = flatten(fmjax.load(tmp_path / head, head=other, new=new)[1])
            for path, leaf in flatten(variables).items():
                if "/head/" not in path:
                    np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)


def test_the_flax_classes_checkpoints_load(tmp_path):
    """FlaxLlamaForCausalLM's tree (transformers 4.57): its names are PyTorch's, kernels turned."""
    import flax.serialization

    model, variables = fmjax.create("llama", CONFIG, head="causal_lm", rng=jax.random.key(0))
    flat = {path.removeprefix("params/"): leaf for path, leaf in flatten(variables).items()}
    layers = {}
    for i in range(2):
        here = f"layers_{i}"
        attn = {
            f"{old}_proj": {"kernel": flat[f"{here}/attn/{name}/kernel"]}
            for old, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
        }
        mlp = {
            f"{name}_proj": {"kernel": flat[f"{here}/mlp/{name}/kernel"]}
            for name in ("gate", "up", "down")
        }
        layers[str(i)] = {
            "self_attn": attn,
            "mlp": mlp,
            "input_layernorm": {"weight": flat[f"{here}/norm_1/scale"]},
            "post_attention_layernorm": {"weight": flat[f"{here}/norm_2/scale"]},
        }
    tree = {
        "model": {
            "embed_tokens": {"embedding": flat["embed/word/embedding"]},
            "layers": layers,
            "norm": {"weight": flat["final_norm/scale"]},
        },
        "lm_head": {"kernel": flat["head/kernel"]},
    }
    fmjax.save(tmp_path / "torch", model, variables)
    (tmp_path / "flax").mkdir()
    shutil.copy(tmp_path / "torch" / "config.json", tmp_path / "flax")
    (tmp_path / "flax" / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    again, loaded = fmjax.load(tmp_path / "flax")
    assert again == model
    for path, leaf in flatten(variables).items():
        np.testing.assert_array_equal(flatten(loaded)[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "hidden_size=4096 is not a multiple of num_attention_heads=7"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 5}, "an even head size, not 5"),
        ({"attention_dropout": 1.0, "pad_token_id": 32000}, "attention_dropout=1.0.*; pad_token"),
        ({"hidden_act": "sin"}, "'sin' is not one of"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        (
            {"rope_scaling": RopeScaling("longrope", short_factor=(1.0,), long_factor=(1.0,))},
            "short_factor has 1 numbers; 128 rotated features of a head need 64",
        ),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        llama.Config(**change)


def test_unknown_rope_types_are_refused():
    data = {"rope_scaling": {"rope_type": "mrope", "factor": 2.0}, "num_heads": 3}
    with pytest.raises(ValueError, match=r"(?s)rope_type 'mrope'.*num_heads=3"):
        parse_config(llama.Config, data, llama.FIXED)
