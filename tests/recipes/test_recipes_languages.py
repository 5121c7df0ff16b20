"""A language's adapters against PyTorch's ``load_adapter``."""

import jax
import pytest
import safetensors.torch
import torch
from parity import assert_near, torch_twin
from waves import SIZES, STABLE, waves

import fmjax
from fmjax.models import wav2vec2
from fmjax.recipes.languages import load_language

CONFIG = wav2vec2.Config(**SIZES | STABLE | {"adapter_attn_dim": 4})


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_a_language_equals_pytorch(scan, tmp_path):
    """It has other characters, too."""
    twin = torch_twin(wav2vec2, CONFIG, "ctc")
    twin.save_pretrained(tmp_path)
    other = wav2vec2.Config(**SIZES | STABLE | {"adapter_attn_dim": 4, "vocab_size": 17})
    language = torch_twin(wav2vec2, other, "ctc", seed=1)._get_adapters()
    safetensors.torch.save_file(
        {name: tensor.detach().clone() for name, tensor in language.items()},
        tmp_path / "adapter.fra.safetensors",
        metadata={"format": "pt"},
    )
    twin.config._name_or_path = str(tmp_path)
    twin.load_adapter("fra")
    model, variables = load_language(tmp_path, "fra", *fmjax.load(tmp_path, scan=scan))
    assert model.config.vocab_size == 17
    inputs = waves(CONFIG)
    theirs = twin.double()(
        torch.tensor(inputs["input_values"]).double(), torch.tensor(inputs["attention_mask"])
    ).logits.detach()
    assert_near(jax.jit(model.apply)(variables, **inputs).logits, theirs, "logits")


def test_what_is_no_language_is_refused(tmp_path):
    model = wav2vec2.Model(CONFIG, head="ctc")
    with pytest.raises(ValueError, match="adapter_attn_dim=None"):
        load_language(tmp_path, "eng", wav2vec2.Model(wav2vec2.Config(**SIZES), head="ctc"), {})
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "adapter.deu.safetensors")
    with pytest.raises(FileNotFoundError, match=r"it has the languages \['deu'\]"):
        load_language(tmp_path, "eng", model, {})
    with pytest.raises(ValueError, match="no file of a language"):
        load_language(tmp_path, "deu", model, {})
