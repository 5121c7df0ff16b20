"""Whisper against transformers' PyTorch Whisper, from the same configs and weights."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from parity import (
    check_decoding,
    check_defaults,
    check_fixture,
    check_head,
    check_old_file,
    check_seq2seq_decoding,
    check_sizes,
    shuffled,
)

import fmjax
from fmjax.hub import abstract_variables
from fmjax.models import whisper
from fmjax.tree import count_parameters

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"

CONFIG = whisper.Config(
    vocab_size=51, num_mel_bins=7, d_model=30, encoder_layers=2, encoder_ffn_dim=44,
    encoder_attention_heads=3, decoder_layers=2, decoder_ffn_dim=26, decoder_attention_heads=5,
    max_source_positions=9, max_target_positions=12, classifier_proj_size=11, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
)  # fmt: skip
UNTIED = dataclasses.replace(
    CONFIG, tie_word_embeddings=False, activation_function="relu", use_weighted_layer_sum=True,
    id2label=("a", "b", "c"), encoder_layers=1, decoder_layers=1,
)  # fmt: skip


def frames(config, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, config.frames, config.num_mel_bins)).astype(np.float32)


def inputs_of(config, head):
    rng = np.random.default_rng(1)
    ids = rng.integers(4, config.vocab_size, (2, 6))
    if head == "causal_lm":
        states = rng.normal(size=(2, config.max_source_positions, config.d_model))
        return {"input_ids": ids, "encoder_hidden_states": states}
    if head == "audio_classification":
        return {"input_features": frames(config)}
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2])
    return {
        "input_features": frames(config), "decoder_input_ids": ids, "decoder_attention_mask": mask
    }  # fmt: skip


def our_arguments(twin):
    """PyTorch's model called by our arguments: frames before bins, and the encoder's states."""
    forward = twin.forward

    def called(**given):
        if "input_features" in given:
            given["input_features"] = given["input_features"].movedim(-1, 1)
        if "encoder_hidden_states" in given:
            given["encoder_outputs"] = given.pop("encoder_hidden_states")
        return forward(**given)

    twin.forward = called


@pytest.mark.parametrize(
    ("head", "config"),
    [
        ("seq2seq_lm", CONFIG),
        pytest.param("seq2seq_lm", UNTIED, marks=pytest.mark.slow),
        pytest.param("model", UNTIED, marks=pytest.mark.slow),
        pytest.param("causal_lm", CONFIG, marks=pytest.mark.slow),
        pytest.param("audio_classification", CONFIG, marks=pytest.mark.slow),
        ("audio_classification", UNTIED),
    ],
)
def test_equals_pytorch(head, config, tmp_path):
    check_head(
        whisper, config, head, tmp_path, inputs_of(config, head), prepare=our_arguments,
    )  # fmt: skip


def test_the_flax_fixture_equals_pytorch():
    check_fixture(FIXTURES / "whisper-cond")


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding(scan):
    model, variables = fmjax.create(
        "whisper", CONFIG, head="seq2seq_lm", rng=jax.random.key(0), scan=scan
    )
    check_seq2seq_decoding(model, shuffled(variables), inputs=inputs_of(CONFIG, "seq2seq_lm"))


@pytest.mark.slow
def test_cached_decoding_of_the_decoder_alone():
    model, variables = fmjax.create("whisper", CONFIG, head="causal_lm", rng=jax.random.key(0))
    check_decoding(model, shuffled(variables), length=7)


@pytest.mark.slow
def test_old_files_load(tmp_path):
    """A tied copy; the classifier's encoder under the prefix of the other heads."""
    check_old_file(whisper, CONFIG, "seq2seq_lm", tmp_path / "a", extra=("proj_out.weight",))
    check_old_file(
        whisper, UNTIED, "audio_classification", tmp_path / "b",
        rename=lambda name: f"model.{name}" if name.startswith("encoder") else name,
    )  # fmt: skip


def test_published_sizes():
    check_sizes(whisper, dict.fromkeys(whisper.VARIANTS, "WhisperModel"))


@pytest.mark.slow
def test_published_sizes_are_the_papers():
    """Table 1, in millions; the sinusoids are counted."""
    for name, millions in (("tiny", 39), ("base", 74), ("small", 244), ("medium", 769)):
        config = whisper.VARIANTS[f"whisper-{name}"]
        count = count_parameters(abstract_variables(whisper.Model(config)))
        # The paper rounds its own count, which has the tiny model's 37.8 million as 39.
        assert abs(count / 1e6 - millions) <= 0.04 * millions, name
    count = count_parameters(abstract_variables(whisper.Model(whisper.VARIANTS["whisper-large"])))
    assert round(count / 1e6, -1) in (1540, 1550)


@pytest.mark.slow
def test_config_defaults_are_transformers_defaults():
    check_defaults(whisper)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder_attention_heads": 7}, "decoder_attention_heads=7"),
        ({"d_model": 33}, "d_model=33 must be even"),
        ({"apply_spec_augment": True, "mask_time_length": 99}, "mask_time_length=99 is more than"),
        ({"dropout": 1.0, "mask_time_prob": 2.0}, "dropout=1.0 must be.*mask_time_prob=2.0 must"),
    ],
)
def test_bad_configs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **change)


IDS = np.ones((1, 4), np.int32)


@pytest.mark.parametrize(
    ("head", "inputs", "words"),
    [
        ("model", {"decoder_input_ids": IDS}, "exactly one of input_features and encoder_outputs"),
        ("model", {"input_features": frames(CONFIG)}, "exactly one of decoder_input_ids"),
        ("model", {"input_features": frames(CONFIG).swapaxes(1, 2)}, r"must be \[B, 18, 7\]"),
        ("model", {"input_features": frames(CONFIG), "input_ids": IDS}, "does not take input_ids"),
        ("causal_lm", {"input_features": frames(CONFIG)}, "does not take input_features"),
        ("audio_classification", {"decoder_input_ids": IDS}, "does not take decoder_input_ids"),
    ],
)
def test_bad_inputs_are_refused(head, inputs, words):
    model = whisper.Model(CONFIG, head=head)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))


@pytest.mark.slow
def test_spec_augment_is_on_in_training_alone():
    config = dataclasses.replace(CONFIG, apply_spec_augment=True, mask_time_length=4)
    model, variables = fmjax.create("whisper", config, rng=jax.random.key(0))
    inputs = inputs_of(config, "model")

    @jax.jit
    def run(key):
        rngs = {"dropout": key}
        return model.apply(variables, **inputs, train=True, rngs=rngs).encoder_last_hidden_state

    plain = model.apply(variables, **inputs).encoder_last_hidden_state
    first, second = run(jax.random.key(0)), run(jax.random.key(1))
    assert not np.allclose(first, plain, atol=1e-4)
    assert not np.allclose(first, second, atol=1e-4)
