"""wav2vec 2.0 against transformers: heads, norms, adapters, masks, the recorded fixture, sizes."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from encoder_checks import check_classes
from parity import check_defaults, check_fixture, check_head, check_sizes, torch_twin
from waves import SIZES, STABLE, tied, waves

import fmjax
from fmjax import hub
from fmjax.models import wav2vec2
from fmjax.nn.spans import draw_spans
from fmjax.tree import count_parameters, flatten

LABELLED = ("sequence_classification", "audio_frame_classification", "xvector")
FIXTURES = Path(__file__).parents[1] / "fixtures"


def settings_of(head, kind):
    settings = SIZES | (STABLE if kind == "stable" else {})
    if head in LABELLED:
        settings |= {"id2label": ("a", "b", "c"), "use_weighted_layer_sum": kind == "stable"}
    if head in ("model", "ctc") and kind == "stable":
        settings |= {"adapter_attn_dim": 4}
    return settings


# The plain suite compares both kinds of norms once each, and the pretraining head.
FAST = {("ctc", "plain"), ("sequence_classification", "stable"), ("pretraining", "plain")}
CASES = [
    pytest.param(head, kind, marks=() if (head, kind) in FAST else pytest.mark.slow)
    for head in wav2vec2.HEADS
    for kind in ("plain", "stable")
]


@pytest.mark.parametrize(("head", "kind"), CASES)
def test_equals_pytorch(head, kind, tmp_path):
    config = wav2vec2.Config(**settings_of(head, kind))
    masked = head in ("model", "pretraining")
    inputs = waves(config, masked=masked)
    check_head(wav2vec2, config, head, tmp_path, inputs, prepare=tied)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["model", "sequence_classification", "xvector"])
def test_without_a_mask_equals_pytorch(head, tmp_path):
    config = wav2vec2.Config(**settings_of(head, "plain"))
    inputs = {"input_values": waves(config)["input_values"]}
    check_head(wav2vec2, config, head, tmp_path, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("width", [12, 10])
@pytest.mark.parametrize("head", ["model", "ctc"])
def test_fewer_states_equal_pytorch(head, width, tmp_path):
    """Convolutions after the encoder, and the frames that CTC then counts."""
    config = wav2vec2.Config(
        **SIZES | {"add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": width}
    )
    inputs = waves(config)
    check_head(wav2vec2, config, head, tmp_path, inputs)
    twin = torch_twin(wav2vec2, config, head)
    lengths = torch.tensor(inputs["attention_mask"].sum(axis=1))
    theirs = twin._get_feat_extract_output_lengths(lengths).numpy()
    model, variables = fmjax.load(tmp_path / "fmjax")
    np.testing.assert_array_equal(model.frames(lengths.numpy()), theirs)
    if head == "ctc":
        out = jax.jit(lambda v: model.apply(v, **inputs))(variables)
        np.testing.assert_array_equal(out.logit_lengths, theirs)


def test_the_flax_fixture_equals_pytorch():
    """The old library's names and layout; its last hidden state is normed, as ours."""
    check_fixture(FIXTURES / "wav2vec2_layer-ctc")


@pytest.mark.slow
def test_old_files_load(tmp_path):
    """Old names of the kernel's parts, no vector for masks, keys that nobody reads."""
    model, variables = fmjax.create("wav2vec2", "tiny", head="ctc", rng=jax.random.key(0))
    fmjax.save(tmp_path, model, variables)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    conv = "wav2vec2.encoder.pos_conv_embed.conv."
    tensors[f"{conv}weight_g"] = tensors.pop(f"{conv}parametrizations.weight.original0")
    tensors[f"{conv}weight_v"] = tensors.pop(f"{conv}parametrizations.weight.original1")
    del tensors["wav2vec2.masked_spec_embed"]
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    data = json.loads((tmp_path / "config.json").read_text())
    data |= {"num_feat_extract_layers": 2, "mask_channel_prob": 0.0, "feat_extract_dropout": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(data))
    again, read = fmjax.load(tmp_path)
    assert again == model
    flat = flatten(read)
    assert not flat.pop("params/embed/mask").any()
    for path, leaf in flat.items():
        np.testing.assert_array_equal(leaf, flatten(variables)[path], err_msg=path)


def test_padding_changes_nothing():
    """Whatever stands in the padding; with a norm over time it would."""
    config = wav2vec2.Config(**SIZES | STABLE)
    model, variables = fmjax.create("wav2vec2", config, head="ctc", rng=jax.random.key(0))
    inputs = waves(config)
    run = jax.jit(lambda values: model.apply(variables, values, inputs["attention_mask"]))
    clean = run(inputs["input_values"])
    noisy = run(inputs["input_values"] + 9 * (1 - inputs["attention_mask"]))
    length = int(clean.logit_lengths[1])
    assert length == model.frames(50) < clean.logits.shape[1]
    np.testing.assert_allclose(noisy.logits[0], clean.logits[0], atol=1e-6)
    np.testing.assert_allclose(noisy.logits[1, :length], clean.logits[1, :length], atol=1e-6)


def test_training_masks_time_and_features():
    """The model's own masks are spans, differ by the key, and are none where the config says so."""
    rates = "hidden_dropout activation_dropout attention_dropout layerdrop final_dropout"
    rates = dict.fromkeys(rates.split(), 0.0)
    masks = {"mask_time_prob": 0.5, "mask_time_length": 3, "mask_feature_prob": 0.0}
    config = wav2vec2.Config(**SIZES | rates | masks)
    model, variables = fmjax.create("wav2vec2", config, rng=jax.random.key(0))
    values = waves(config)["input_values"]

    def run(model, key):
        return model.apply(
            variables, values, train=True, rngs={"dropout": jax.random.key(key)}
        ).last_hidden_state

    plain = model.apply(variables, values).last_hidden_state
    assert not np.allclose(run(model, 1), plain, atol=1e-3)
    assert not np.allclose(run(model, 1), run(model, 2), atol=1e-3)
    off = model.clone(config=dataclasses.replace(config, apply_spec_augment=False))
    np.testing.assert_allclose(run(off, 1), plain, atol=1e-6)


def test_spans_are_as_many_and_as_long_as_asked():
    lengths = np.array([100, 60, 3, 4])
    draw = jax.jit(
        jax.vmap(lambda key: draw_spans(key, lengths, 100, probability=0.3, length=4, least=1))
    )
    masks = np.asarray(draw(jax.random.split(jax.random.key(0), 500)))
    assert not masks[:, 1, 60:].any()
    assert not masks[:, 2].any()  # no span fits
    np.testing.assert_array_equal(masks[:, 3].sum(axis=-1), 4)
    # 0.3 * 100 / 4 spans of 4 that may overlap, at 97 places: each of the inner places is covered
    # unless none of the 4 starts before it was drawn.
    expected = 1 - (1 - 7.5 / 97) ** 4
    assert abs(masks[:, 0, 10:90].mean() - expected) < 0.02
    runs = np.diff(masks[:, 0].astype(int), axis=-1, prepend=0, append=0)
    begin, end = np.nonzero(runs == 1)[1], np.nonzero(runs == -1)[1]
    assert (end - begin).min() == 4
    none = draw_spans(jax.random.key(0), lengths, 3, probability=0.9, length=4, least=2)
    assert not none.any()


def test_published_sizes():
    """Baevski et al. 2020, section 4.2; Babu et al. 2021, table 2; Pratap et al. 2023."""
    check_classes(wav2vec2)
    check_sizes(wav2vec2, dict.fromkeys(wav2vec2.VARIANTS, "Wav2Vec2Model"))
    millions = {"base": 95, "large": 317, "xls_r_300m": 317, "xls_r_1b": 965, "xls_r_2b": 2162}
    for name, published in millions.items():
        model = wav2vec2.Model(wav2vec2.VARIANTS[name], head="pretraining")
        count = count_parameters(hub.abstract_variables(model)) / 1e6
        assert abs(count / published - 1) < 0.005, (name, count)


def test_config_defaults_are_transformers_defaults():
    check_defaults(wav2vec2)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="hidden_size=10 is not a multiple") as error:
        wav2vec2.Config(
            hidden_size=10, conv_dim=(3,), feat_extract_norm="batch", codevector_dim=3,
            adapter_attn_dim=4, ctc_loss_reduction="none", mask_time_prob=2.0, hidden_act="bump",
        )  # fmt: skip
    for words in (
        "conv_dim=(3,)", "feat_extract_norm='batch'", "codevector_dim=3", "adapter_attn_dim=4",
        "ctc_loss_reduction='none'", "mask_time_prob=2.0", "hidden_act='bump'",
    ):  # fmt: skip
        assert words in str(error.value)
    model, variables = fmjax.create("wav2vec2", "tiny", rng=jax.random.key(0))
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        model.apply(variables, np.zeros((1, 20, 1)))
    with pytest.raises(ValueError, match="9 samples; this model needs at least 10"):
        model.apply(variables, np.zeros((1, 9)))
    with pytest.raises(ValueError, match=r"that of input_values, \(1, 40\)"):
        model.apply(variables, np.zeros((1, 40)), np.zeros((1, 6)))
    with pytest.raises(ValueError, match="make 6 frames each"):
        model.apply(variables, np.zeros((1, 40)), mask_time_indices=np.zeros((1, 40)))
    bare = wav2vec2.Model(dataclasses.replace(model.config, mask_time_prob=0, mask_feature_prob=0))
    with pytest.raises(ValueError, match="needs a model with a vector for masked frames"):
        bare.apply(variables, np.zeros((1, 40)), mask_time_indices=np.zeros((1, 6)))
